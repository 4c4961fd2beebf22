"""The control process's end of the judge: records get exact distances, computed on copies of the models.

The judge is started when it is first asked, and kept. Whatever it does wrong costs the distances of records, which are
counted by reason; the records themselves go on.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from hemostat.adapters.live import judge_messages
from hemostat.adapters.live.folders import CheckpointFolders
from hemostat.adapters.live.judge_requests import AnswerLimit, JudgeRequest, JudgeRequests
from hemostat.adapters.serving.probing import CopyUnavailable
from hemostat.ipc.child_process import ChildExited, FramedChild
from hemostat.ipc.supervisor import ChildRefused, Supervisor
from hemostat.metrics import names
from hemostat.metrics.samples import Sample
from hemostat_calibration.arrays import Ids
from hemostat_calibration.messages import with_detail
from hemostat_calibration.profiles.profile import IDENTITY, CalibrationProfile
from hemostat_calibration.records import ExactDistances, TokenRecord

log = logging.getLogger("hemostat.adapters")

MODULE = "hemostat_lab.adapters.judge_process"
BACKOFF = (0.5, 2.0, 10.0, 60.0)
"""Seconds before a judge that ended is started again, by how often in a row it failed before it was ready."""
MAX_REFERENCE_NATS = 0.25
"""Mean difference of the log-probabilities of a record's tokens between the reference that scored it and the judge's,
up to which they are one model: repeated computations in bfloat16 differ by about 0.01, two sizes of one family by more
than 0.5. Both are of the reference alone, so that which records are left out does not depend on any profile's gain."""
JUDGED = "judged"
"""The outcome of a record that got its distances."""

Done = Callable[[Mapping[str, ExactDistances]], None]


class JudgeState(StrEnum):
    OFF = "off"
    UNAVAILABLE = "unavailable"
    """It cannot start."""
    IDLE = "idle"
    """Nothing was asked yet: no copy is loaded."""
    STARTING = "starting"
    READY = "ready"
    DOWN = "down"
    """The process has ended, and is started again after a pause."""


ANSWERS_SOON = (JudgeState.IDLE, JudgeState.STARTING, JudgeState.READY)
"""The states in which records wait for the judge. To load its copies takes half a minute or more, in which a test would
lose as many conversations as often suffice for a proof."""


class JudgeDropReason(StrEnum):
    """The reason why a record got no distances: a value of the label `outcome` of `hemostat_adapter_judged_total`."""

    NOT_READY = "not_ready"
    """It cannot start, or has ended."""
    BUSY = "busy"
    """The queue is full."""
    ENDED = "ended"
    """It ended while the record waited."""
    NO_HIDDEN_STATES = "no_hidden_states"
    """The reference's hidden states are missing."""
    FAILED = "failed"
    """It could not compute them."""
    OTHER_REFERENCE = "other_reference"
    """Its reference gives the record's tokens other log-probabilities than the reference that scored it."""
    TOO_LONG = "too_long"
    """The answer would take too long at its speed so far (`judge_requests.AnswerLimit`)."""


@dataclass(frozen=True, slots=True)
class JudgeTarget:
    """The subject of the judge: both checkpoints, and the vocabulary that they share.

    hidden_size: the size of the hidden states that come with the records; 0: none come, and the reference is loaded,
    too. reference_digest: the digest of the weights that the reference serves; "" if it is not known.
    """

    folders: CheckpointFolders
    vocab_size: int
    hidden_size: int
    reference_digest: str = ""
    device: str = "cpu"


class AdapterJudge:
    """Implements `hemostat.scoring.distances.DistanceSource`, `hemostat.adapters.serving.probing.ModelCopy` and
    `hemostat.ipc.supervisor.ChildOwner`. Lives in the control process's event loop.

    profile: a version's profile; None where it is not known any more. on_change: called when it gets ready.
    """

    def __init__(
        self,
        profile: Callable[[str], CalibrationProfile | None],
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._profile = profile
        self._on_change = on_change
        self._requests = JudgeRequests(profile)
        self._process: Supervisor[JudgeTarget, judge_messages.Ready] = Supervisor(MODULE, self, BACKOFF)
        self._needed = False
        self.loaded: judge_messages.Ready | None = None
        """The running process's message that its copies are loaded; None before it."""
        self.state, self.detail = JudgeState.OFF, ""
        self.judged = 0
        """Records that got distances."""
        self.dropped: Counter[JudgeDropReason] = Counter()

    # --- called by the control process -----------------------------------------------------------------------------

    def judge_about(self, target: JudgeTarget) -> None:
        """Sets the target from now on; nothing changes if it is the target already."""
        if target != self._process.target:
            self._needed = False
            self._requests.limit = AnswerLimit()  # another model has another speed
            self._set_state(JudgeState.IDLE, "")
            self._process.set_target(target)

    def stop(self, why: str, *, unavailable: bool = False) -> None:
        """Judge nothing. why: shown as the state's detail."""
        self._set_state(JudgeState.UNAVAILABLE if unavailable else JudgeState.OFF, why)
        self._process.set_target(None)

    @property
    def wants_hidden_states(self) -> bool:
        """They are what the reference's distribution is computed from."""
        target = self._process.target
        return target is not None and target.hidden_size > 0

    def offer(self, record: TokenRecord, prompt_ids: Ids, versions: tuple[str, ...], done: Done) -> bool:
        """See `DistanceSource.offer`."""
        known = tuple(v for v in versions if v == IDENTITY or self._profile(v) is not None)
        passes = len(known) + (0 if self.wants_hidden_states else 1)
        tokens = passes * (len(prompt_ids) + record.tokens)
        reason = self._refusal(record, tokens)
        if reason is not None:
            self.dropped[reason] += 1
            return False
        hidden = record.reference_hidden if self.wants_hidden_states else None
        data = b"" if hidden is None else hidden.astype("<f4").tobytes()

        def request(number: int) -> judge_messages.Judge:
            prompt, output = prompt_ids.astype("<i4").tobytes(), record.output_ids.astype("<i4").tobytes()
            return judge_messages.Judge(number, prompt, output, list(known), data)

        def answered(answer: judge_messages.Answer | None) -> None:
            done(self._distances(answer, record))

        self._add(JudgeRequest(known, request, answered, len(data), tokens))
        return True

    def _refusal(self, record: TokenRecord, tokens: int) -> JudgeDropReason | None:
        self.need()
        if self.state not in ANSWERS_SOON:
            return JudgeDropReason.NOT_READY
        if self.wants_hidden_states and record.reference_hidden is None:
            return JudgeDropReason.NO_HIDDEN_STATES
        if self._requests.full:
            return JudgeDropReason.BUSY
        return None if self._requests.limit.allows(tokens) else JudgeDropReason.TOO_LONG

    def _distances(self, answer: judge_messages.Answer | None, record: TokenRecord) -> dict[str, ExactDistances]:
        if answer is None:
            self.dropped[JudgeDropReason.ENDED] += 1
            return {}
        result = decode_distances(answer, record.tokens) if isinstance(answer, judge_messages.Judged) else {}
        if not result or not isinstance(answer, judge_messages.Judged):
            self.dropped[JudgeDropReason.FAILED] += 1
            log.warning("no distances of a record: %s", getattr(answer, "message", "its answer does not fit"))
            return {}
        emitted = np.frombuffer(answer.emitted, "<f4")
        apart = float(np.abs(emitted - record.reference_emitted).mean()) if len(emitted) == record.tokens else np.inf
        if not apart <= MAX_REFERENCE_NATS:
            self.dropped[JudgeDropReason.OTHER_REFERENCE] += 1
            if self.state is JudgeState.READY:
                why = f"reference.folder is not the model that the reference serves: {apart:.2f} nats apart"
                self._set_state(JudgeState.READY, why)
            return {}
        self.judged += 1
        if self.state is JudgeState.READY:
            self._set_state(JudgeState.READY, "")
        return result

    async def logprobs(self, ids: Ids, version: str | None) -> npt.NDArray[np.float32]:
        """Returns the log-probability in nats of each token of `ids` [n] after the first, float32 [n - 1]. version:
        the adapter it is computed with; None: the compressed model alone.

        Raises CopyUnavailable if the copies cannot answer, or do not know the version.
        """
        self.need()
        if self.state is not JudgeState.READY:
            raise CopyUnavailable(f"the copies are {self.state}: {self.detail}" if self.detail else f"{self.state}")
        if version is not None and self._profile(version) is None:
            raise CopyUnavailable(f"profile {version} is not known")
        answer: asyncio.Future[judge_messages.Answer | None] = asyncio.get_running_loop().create_future()
        name = version or IDENTITY
        data = ids.astype("<i4").tobytes()

        def answered(reply: judge_messages.Answer | None) -> None:
            if not answer.done():
                answer.set_result(reply)

        def request(number: int) -> judge_messages.Logprobs:
            return judge_messages.Logprobs(number, data, name)

        self._add(JudgeRequest((name,), request, answered, tokens=len(ids)))
        result = await answer
        if not isinstance(result, judge_messages.Scored):
            raise CopyUnavailable(getattr(result, "message", "") or "the copies' process ended")
        return np.frombuffer(result.logprobs, "<f4").astype(np.float32)

    def need(self) -> None:
        """It will be asked soon: load the copies."""
        if self._process.target is not None and not self._needed:
            self._needed = True
            self._process.wake()

    def _add(self, request: JudgeRequest) -> None:
        self._requests.put(request)
        self._process.wake()

    def samples(self) -> Iterator[Sample]:
        yield Sample(names.ADAPTER_JUDGED, (JUDGED,), self.judged)
        for reason, records in self.dropped.items():
            yield Sample(names.ADAPTER_JUDGED, (reason,), records)

    def status(self) -> dict[str, Any]:
        return {
            "state": str(self.state),
            "detail": self.detail,
            "judged": self.judged,
            "dropped": {str(reason): count for reason, count in self.dropped.items()},
            "waiting": len(self._requests),
            "max_tokens": self._requests.limit.max_tokens,
            "bytes": self.loaded.bytes if self.loaded is not None else 0,
        }

    # --- the process -----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep a judge running for the target once it is needed, until cancelled."""
        await self._process.run()

    def wants_child(self) -> bool:
        return self._needed

    def starting(self, target: JudgeTarget) -> None:
        self._set_state(JudgeState.STARTING, f"loading {target.folders.compressed}")

    async def begin(self, child: FramedChild, target: JudgeTarget) -> None:
        start = judge_messages.Start(
            compressed=str(target.folders.compressed),
            reference=str(target.folders.reference),
            vocab_size=target.vocab_size,
            hidden_size=target.hidden_size,
            device=target.device,
        )
        child.send(judge_messages.REQUESTS.encode(start))

    def began(self, ready: judge_messages.Ready, target: JudgeTarget) -> None:
        self.loaded = ready
        if target.reference_digest not in {"", ready.reference_digest}:
            raise ChildRefused(f"reference.folder: {target.folders.reference} is not what the reference serves")
        if self._process.target == target:
            self._set_state(JudgeState.READY, "")
            self._on_change()

    async def exchange(self, child: FramedChild) -> bool:
        return await self._requests.ask(child)

    def exited(self, why: ChildExited) -> None:
        self._requests.exited(why)

    async def closed(self) -> None:
        return

    def failed(self, why: ChildExited | ChildRefused) -> None:
        if isinstance(why, ChildRefused):
            self._set_state(JudgeState.UNAVAILABLE, str(why))
        else:
            self._set_state(JudgeState.DOWN, f"the process of the copies ended ({why})")

    def receive(self, body: bytes) -> None:
        answer = judge_messages.ANSWERS.decode(body)
        match answer:
            case judge_messages.Ready():
                self._process.ready(answer)
            case judge_messages.Refused():
                self._process.refused(answer.message)
            case judge_messages.Judged() | judge_messages.Scored() | judge_messages.Failed():
                self._requests.answer(answer)

    # --- bookkeeping -----------------------------------------------------------------------------------------------

    def _set_state(self, state: JudgeState, detail: str) -> None:
        if (state, detail) != (self.state, self.detail):
            failed = state in {JudgeState.DOWN, JudgeState.UNAVAILABLE}
            log.log(
                logging.ERROR if failed else logging.INFO, "copies that judge adapters: %s", with_detail(state, detail)
            )
        self.state, self.detail = state, detail

    def reset(self) -> None:
        """Ends what waits: the process has ended."""
        self.loaded = None
        self._requests.reset()


def decode_distances(answer: judge_messages.Judged, tokens: int) -> dict[str, ExactDistances]:
    """{} where an array does not have a value for each of the tokens."""
    result = {}
    for version, arrays in answer.distances.items():
        kl, tv = (np.frombuffer(data, "<f8").astype(np.float64) for data in (arrays.kl, arrays.tv))
        top1 = np.frombuffer(arrays.top1, np.uint8).astype(bool)
        if not len(kl) == len(tv) == len(top1) == tokens:
            return {}
        result[version] = ExactDistances(kl, tv, top1)
    return result
