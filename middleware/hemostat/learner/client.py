"""The control process's end of the learner: queues records for it, and passes its proposals on.

Calls go one way: the control process hands over records and what to learn about; the learner calls its
`ProposalReceiver`, and then `on_change`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hemostat.config.schema import Calibration
from hemostat.ipc.child_process import ChildExited, FramedChild
from hemostat.ipc.supervisor import ChildRefused, Supervisor
from hemostat.ipc.turns import Turns
from hemostat.learner import learner_messages
from hemostat.learner.record_queue import DropReason, RecordQueue
from hemostat.metrics import names
from hemostat.metrics.samples import Sample
from hemostat_calibration.arrays import Ids
from hemostat_calibration.errors import HemostatError
from hemostat_calibration.messages import with_detail
from hemostat_calibration.profiles.contextual import CONTEXTUAL, probe_profile
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_calibration.profiles.transform import anchors_digest
from hemostat_calibration.records import TokenRecord

log = logging.getLogger("hemostat.learner")

BACKOFF = (0.5, 2.0, 10.0, 60.0)
"""The seconds before a learner that ended is started again, by how often in a row it failed before it was ready."""
RETRY_TOKEN_GROWTH = 1.25
"""The factor by which more tokens are needed for the next proposal after a rejected or empty one."""
EXPORT_SECONDS = 300.0
"""The time between two exports of what was learned, while records come."""


@dataclass(frozen=True, slots=True)
class LearningTarget:
    """The models that are learned about."""

    model: str
    """The served name of the compressed model."""
    vocab_size: int
    folder: Path
    """The folder of a checkpoint with the output embedding."""
    hidden_size: int
    """The size of the hidden states that the reference returns; 0: it returns none."""
    reference: str = ""
    """The digest of the reference's weights; "" if unknown."""
    generation: int = 0
    """The number of times that the compressed weights have changed meanwhile."""


class LearningStorage(Protocol):
    """The storage of what was learned, which `learner.stored.StoredLearning` implements."""

    def load(self) -> tuple[str, bytes]: ...

    async def save(self, weights: str, parts: list[bytes]) -> None: ...


class ProposalReceiver(Protocol):
    """The receiver of proposals, which `profiles.proposals.Proposals` implements."""

    def accepts(self, family: str, tokens: int) -> bool: ...

    def propose(self, profile: CalibrationProfile, why: str, report: Mapping[str, Any]) -> bool: ...

    def set_probe(self, profile: CalibrationProfile, *, restored: bool) -> None: ...


class LearnerState(StrEnum):
    OFF = "off"
    UNAVAILABLE = "unavailable"
    """It cannot be started."""
    STARTING = "starting"
    LEARNING = "learning"
    TRAINING = "training"
    """A proposal is being made, while it goes on learning."""
    DOWN = "down"
    """The process has ended, and is started again after a pause."""


class Learner:
    """Lives in the control process's event loop; only `run` waits. Implements `hemostat.ipc.supervisor.ChildOwner`.

    What was learned is stored about every `EXPORT_SECONDS` while records come, and at an orderly end; a new process
    goes on from there. What a process learned since then is lost with it, all where nothing is stored.
    """

    def __init__(
        self,
        settings: Calibration,
        receiver: ProposalReceiver,
        on_change: Callable[[], None] = lambda: None,
        *,
        storage: LearningStorage | None = None,
        clock: Callable[[], float] = time.monotonic,
        turns: Turns | None = None,
    ) -> None:
        """`on_change` is called after the receiver got a probe or a proposal. storage: None stores nothing. turns: of
        heavy jobs; None: no other job takes any."""
        self._turns = turns or Turns()
        self._settings = settings
        self._receiver = receiver
        self._on_change = on_change
        self._process: Supervisor[LearningTarget, learner_messages.Ready] = Supervisor(
            "hemostat.learner.learner_process", self, BACKOFF
        )
        self._records = RecordQueue()
        self._learned = self._restored = learner_messages.Learned(0, {}, {})
        """The totals of what was learned from: `_learned` in all, and `_restored` before this process."""
        self._storage = storage
        self._clock = clock
        self._exported_at = clock()
        self._exported_tokens = 0
        """The number of tokens that had been learned from at the last export."""
        self._export_pending = False
        self._parts: list[bytes] = []
        """The parts of an export that is arriving."""
        self._exports: list[list[bytes]] = []
        """The exports that have arrived."""
        self._weights = ""
        """The fingerprint of the compressed weights that are learned about; "" while they are not known."""
        self._generation = 0
        self._forgets = False
        """It is True if what the running process has learned is about other weights, and is not to be stored."""
        self._batch_pending = False
        """It is True if a batch was sent, and is not learned yet."""
        self._requested = False
        """It is True if a proposal was requested, and has not come yet."""
        self._proposals: deque[learner_messages.Proposed] = deque()
        self._last_attempt = 0
        """The number of tokens that the last proposal was learned from, whether anything came of it or not."""
        self._tokens_of_ended: Counter[str] = Counter()
        """The number of tokens by source that processes which have ended had learned from."""
        self._last_proposal: dict[str, Any] | None = None
        self._hidden_size = 0
        self.anchor_sets: dict[str, Ids] = {}
        """The digest of the set of anchors that it reads -> their ids; empty while it reads none."""
        self.state, self.detail = LearnerState.OFF, ""
        self.dropped: Counter[DropReason] = Counter()
        """The number of records that were not sent to the learner, by reason."""

    # --- called by the control process -----------------------------------------------------------------------------

    def set_target(self, target: LearningTarget) -> None:
        """Sets the models to learn about from now on; nothing changes if they are the target already."""
        self._process.set_target(replace(target, generation=self._generation))

    def set_weights(self, weights: str) -> None:
        """Sets the fingerprint of the compressed weights, "" if it is not known. What was learned of others is
        forgotten: a new process begins without it."""
        if weights and self._weights and weights != self._weights:
            log.warning("learning begins anew: the engines have loaded other weights")
            self._generation += 1
            self._forgets = True
            if self._process.target is not None:
                self.set_target(self._process.target)
        self._weights = weights or self._weights

    def stop(self, why: str, *, unavailable: bool = False) -> None:
        """Stops learning: there is nothing to learn about any more. why: shown as the state's detail. unavailable:
        learning is wanted, but impossible.
        """
        self._set_state(LearnerState.UNAVAILABLE if unavailable else LearnerState.OFF, why)
        self._process.set_target(None)

    @property
    def wants_hidden_states(self) -> bool:
        """It is True if hidden states of the reference would be used."""
        return self._learning and self._hidden_size > 0 and self._records.less_than_half_full

    def update(self, record: TokenRecord) -> None:
        """Queues a record of the learning side; where it cannot be used or there is no room, it is counted as dropped.

        The record's arrays must not be changed afterwards.
        """
        if self._process.target is None:
            return
        reason = self._records.offer(record) if self._learning else DropReason.NOT_READY
        if reason is not None:
            self.dropped[reason] += 1
        else:
            self._process.wake()

    def tokens_by_source(self) -> dict[str, int]:
        """Returns the number of tokens that were learned from, by what they brought, over all processes since the
        start; it never decreases.
        """
        return dict(self._tokens_of_ended + self._tokens_of_process())

    def _tokens_of_process(self) -> Counter[str]:
        return Counter(self._learned.sources) - Counter(self._restored.sources)

    def samples(self) -> Iterator[Sample]:
        for source, tokens in self.tokens_by_source().items():
            yield Sample(names.LEARNED_TOKENS, (source,), tokens)

    def status(self) -> dict[str, Any]:
        return {
            "state": str(self.state),
            "detail": self.detail,
            "tokens": self._learned.tokens,
            "sources": self.tokens_by_source(),
            "dropped": {str(reason): count for reason, count in self.dropped.items()},
            "failed": dict(self._learned.failed),
            "anchors": sum(map(len, self.anchor_sets.values())),
            "d": self._hidden_size,
            "last_proposal": self._last_proposal,
        }

    # --- the process -----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keeps a learner process running for the target, until cancelled."""
        await self._process.run()

    def wants_child(self) -> bool:
        return True

    def starting(self, target: LearningTarget) -> None:
        self._set_state(LearnerState.STARTING, f"reading the output embedding of {target.folder}")

    async def begin(self, child: FramedChild, target: LearningTarget) -> None:
        stored = self._load()
        child.send(learner_messages.REQUESTS.encode(self._start_message(target, restores=bool(stored))))
        if stored:
            for part, last in learner_messages.parts(stored):
                child.send(learner_messages.REQUESTS.encode(learner_messages.Restore(part, last)))
                await child.drain()

    def _load(self) -> bytes:
        """Returns what was stored, if it was learned from these weights."""
        if self._storage is None:
            return b""
        weights, stored = self._storage.load()
        if weights and self._weights and weights != self._weights:
            log.warning("learning begins anew: what was learned is of other weights")
            return b""
        if stored:
            self._weights = weights or self._weights
        return stored

    def exited(self, why: ChildExited) -> None:
        return

    async def closed(self) -> None:
        await self._store_exports()

    def failed(self, why: ChildExited | ChildRefused) -> None:
        if isinstance(why, ChildRefused):
            self._set_state(LearnerState.UNAVAILABLE, str(why))
            return
        lost = "; what it had learned since it was stored is lost" if self._has_unsaved else ""
        self._set_state(LearnerState.DOWN, f"the learner ended ({why}){lost}")

    def _start_message(self, target: LearningTarget, *, restores: bool) -> learner_messages.Start:
        settings = self._settings
        return learner_messages.Start(
            model=target.model,
            vocab_size=target.vocab_size,
            folder=str(target.folder),
            hidden_size=target.hidden_size,
            anchors=min(settings.anchors, target.vocab_size // 2),
            rank=settings.rank,
            clamp_nats=settings.clamp_nats,
            kl_limit=settings.clamp_kl_nats,
            half_life_tokens=settings.half_life_tokens,
            recent_tokens=settings.recent_tokens,
            min_tokens=settings.min_tokens,
            reference=target.reference,
            stored_bytes=settings.stored_learner_mib << 20 if self._storage is not None else 0,
            restores=restores,
        )

    def began(self, ready: learner_messages.Ready, target: LearningTarget) -> None:
        self._forgets = False
        anchors = np.frombuffer(ready.anchors, "<i4").astype(np.int32)
        self._hidden_size = target.hidden_size
        self.anchor_sets = {anchors_digest(anchors): anchors}
        self._learned = self._restored = ready.learned
        self._exported_tokens, self._exported_at = ready.learned.tokens, self._clock()
        if ready.detail:
            log.warning("learning begins anew: %s", ready.detail)
        elif self._exported_tokens:
            log.info("learning goes on from %d tokens that were stored", self._exported_tokens)
        probe = probe_profile(target.model, target.vocab_size, anchors, self._settings.clamp_nats)
        self._receiver.set_probe(probe, restored=self._exported_tokens > 0)
        self._set_state(LearnerState.LEARNING, "")
        self._on_change()

    async def exchange(self, child: FramedChild) -> bool:
        """Passes on proposals that have come, sends the next batch, and requests the next export and the next proposal
        if they are due. Returns False: there is nothing more to do at once."""
        while self._proposals:
            await self._pass_on(self._proposals.popleft())
        if not self._batch_pending and self._records:
            self._batch_pending = True
            child.send(await asyncio.to_thread(learner_messages.learn_body, self._records.take_batch()))
        await self._store_exports()
        if self._export_due:
            self._export_pending = True
            child.send(learner_messages.REQUESTS.encode(learner_messages.Export()))
        # Without a turn it is asked for again after the next records.
        if not self._requested and self._proposal_due and self._turns.take(CONTEXTUAL):
            self._requested = True
            child.send(learner_messages.REQUESTS.encode(learner_messages.Propose()))
        return False

    @property
    def _has_unsaved(self) -> bool:
        return self._learned.tokens > self._exported_tokens

    @property
    def _export_due(self) -> bool:
        return (
            self._storage is not None
            and self._has_unsaved
            and not self._export_pending
            and self._clock() - self._exported_at >= EXPORT_SECONDS
        )

    async def _store_exports(self) -> None:
        while self._exports and self._storage is not None:
            parts = self._exports.pop(0)
            if self._forgets:
                continue
            if parts == [b""]:
                limit = self._settings.stored_learner_mib
                log.warning("what was learned is not stored: its sums need more than %d MiB", limit)
            else:
                await self._storage.save(self._weights, parts)

    @property
    def _proposal_due(self) -> bool:
        """It is True if enough was learned, and a proposal would be accepted."""
        tokens = self._learned.tokens
        enough = tokens >= max(self._settings.min_tokens, RETRY_TOKEN_GROWTH * self._last_attempt)
        return enough and self._receiver.accepts(CONTEXTUAL, tokens)

    def receive(self, body: bytes) -> None:
        answer = learner_messages.ANSWERS.decode(body)
        match answer:
            case learner_messages.Ready():
                self._process.ready(answer)
            case learner_messages.Refused():
                self._process.refused(answer.message)
            case learner_messages.Learned():
                self._learned = answer
                self._batch_pending = False
            case learner_messages.Training():
                self._set_state(LearnerState.TRAINING, f"{answer.stage} {answer.done:.0%}")
            case learner_messages.Proposed():
                self._proposals.append(answer)
            case learner_messages.Exported():
                self._parts.append(answer.part)
                if answer.last:
                    self._exports.append(self._parts)
                    self._parts, self._export_pending = [], False
                    self._exported_at, self._exported_tokens = self._clock(), self._learned.tokens
        self._process.wake()

    async def _pass_on(self, proposed: learner_messages.Proposed) -> None:
        tokens = proposed.tokens
        self._requested = False
        self._turns.give_back(CONTEXTUAL)
        self._last_attempt = tokens
        self._set_state(LearnerState.LEARNING, "")
        shown = {"tokens": tokens, "report": proposed.report, "version": None, "accepted": False}
        self._last_proposal = shown
        if not proposed.profile:
            log.log(
                logging.WARNING if proposed.report else logging.INFO,
                "no profile proposed from %d tokens%s",
                tokens,
                f": {proposed.report['problem']}" if "problem" in proposed.report else "",
            )
            return
        report = {**proposed.report, "tokens": tokens}
        why = f"learned from {tokens} tokens: {report.get('variant')}, rank {report.get('rank')}"
        try:
            profile = await asyncio.to_thread(CalibrationProfile.from_bytes, proposed.profile)
            shown["version"] = profile.version
            shown["accepted"] = self._receiver.propose(profile, why, report)
        except HemostatError as error:
            log.error("a proposal was refused: %s", error)
        self._on_change()

    # --- bookkeeping -----------------------------------------------------------------------------------------------

    @property
    def _learning(self) -> bool:
        return self.state in {LearnerState.LEARNING, LearnerState.TRAINING}

    def _set_state(self, state: LearnerState, detail: str) -> None:
        # The progress of training is not logged.
        if state != self.state and LearnerState.TRAINING not in {state, self.state}:
            failed = state in {LearnerState.DOWN, LearnerState.UNAVAILABLE}
            log.log(logging.ERROR if failed else logging.INFO, "learner %s", with_detail(state, detail))
        self.state, self.detail = state, detail

    def reset(self) -> None:
        """Is told that the process has ended."""
        self._tokens_of_ended += self._tokens_of_process()
        self._learned = self._restored = learner_messages.Learned(0, {}, {})
        self._exported_tokens, self._export_pending = 0, False
        self._parts.clear()
        self._exports.clear()
        self._batch_pending = self._requested = False
        self._turns.give_back(CONTEXTUAL)
        self._proposals.clear()
        self._last_attempt = 0
        self._records.clear()
        self._forgets = False
        self._hidden_size = 0
        self.anchor_sets = {}
