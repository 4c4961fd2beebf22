"""The control process's end of the learner: hands it records, never waits for it, takes its proposals to steering."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hemostat.config.schema import Calibration
from hemostat.ipc.child_process import Child, ChildGone
from hemostat.learner import wire
from hemostat_calibration.errors import HemostatError
from hemostat_calibration.profiles.contextual import probe_profile
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_calibration.profiles.transform import anchors_digest
from hemostat_calibration.records import TokenRecord

log = logging.getLogger("hemostat.learner")

BACKOFF = (0.5, 2.0, 10.0, 60.0)
"""Seconds before a learner that ended is started again, by how often in a row it has not even begun."""
WAITING_BYTES = 64 * 1024 * 1024
"""Records that wait for it; more are dropped."""
BATCH_BYTES = 8 * 1024 * 1024
TRY_AGAIN = 1.25
"""When nothing came of it, a proposal is asked for again from this many times more tokens."""
ALL = ""
ENVIRONMENT = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
"""One core, whatever there is: serving comes first."""


@dataclass(frozen=True, slots=True)
class Source:
    """What is learned about. model: the compressed one's served name; folder: checkpoint with the output embedding;
    hidden_size: of the hidden states that the reference hands out, 0 for none."""

    model: str
    vocab_size: int
    folder: Path
    hidden_size: int


class Judge(Protocol):
    """What the learner asks of `steering.Steering`."""

    def awaits(self, tokens: int, scope: str = ALL) -> bool: ...

    def propose(self, profile: CalibrationProfile, why: str, report: Mapping[str, Any], scope: str = ALL) -> bool: ...

    def probe(self, profile: CalibrationProfile) -> None: ...


class RefusedError(Exception):
    """The learner cannot begin; the text says what to put right."""


class Learner:
    """`want` says what to learn about; `offer` hands over a record of the learning side. Neither waits.

    The learner's memory ends with its process: after one that was killed, learning begins anew.
    state: off, unavailable (it cannot begin), starting, learning, training (and learning on), down.
    """

    def __init__(self, settings: Calibration, judge: Judge, changed: Callable[[], None]) -> None:
        """`changed` is called when steering was told something."""
        self._settings = settings
        self._judge = judge
        self._changed = changed
        self._wanted: Source | None = None
        self._wake = asyncio.Event()
        self._waiting: deque[wire.Row] = deque()
        self._waiting_bytes = 0
        self._first: asyncio.Future[wire.Ready] | None = None
        self._learned = wire.Learned({}, {}, {})
        self._answered = True
        self._asked: str | None = None
        self._proposed: deque[wire.Proposed] = deque()
        self._tried: dict[str, int] = {}
        self._gone: Counter[str] = Counter()
        self._last: dict[str, Any] | None = None
        self._failures = 0
        self._hidden_size = 0
        self.reads: dict[str, int] = {}
        """The set of anchors that it reads, by digest: how many; empty while it reads none."""
        self.state, self.detail = "off", ""
        self.dropped: Counter[str] = Counter()
        """Records that it was not given, by reason."""

    # --- what control calls ----------------------------------------------------------------------------------------

    def want(self, source: Source | None, why: str = "", *, unavailable: bool = False) -> None:
        """Learn about this from now on; None: about nothing, and `why`, for people."""
        if source is None:
            self._is("unavailable" if unavailable else "off", why)
        if source != self._wanted:
            self._wanted = source
            self._failures = 0
            self._wake.set()

    @property
    def hungry(self) -> bool:
        """Hidden states would be made use of."""
        return self._learning and self._hidden_size > 0 and self._waiting_bytes < WAITING_BYTES // 2

    def offer(self, record: TokenRecord, scope: str = ALL) -> None:
        """A record of the learning side, whose hidden states it can have for itself."""
        if self._wanted is None:
            return
        if not self._learning:
            self.dropped["not_ready"] += 1
        elif record.features is None and record.reference_hidden is None:
            self.dropped["nothing_to_learn"] += 1
        elif self._waiting_bytes > WAITING_BYTES:
            self.dropped["busy"] += 1
        else:
            row = wire.row(record, scope)
            self._waiting.append(row)
            self._waiting_bytes += wire.size([row])
            self._wake.set()

    def sources(self) -> dict[str, int]:
        """Tokens learned from, by what they brought; never goes down."""
        return dict(self._gone + Counter(self._learned.sources))

    def failed(self) -> int:
        """Records that this process could not learn from."""
        return sum(self._learned.failed.values())

    def status(self) -> dict[str, Any]:
        return {
            "state": self.state,
            "detail": self.detail,
            "tokens": self._learned.tokens.get(ALL, 0),
            "scopes": {scope: tokens for scope, tokens in self._learned.tokens.items() if scope != ALL},
            "sources": self.sources(),
            "dropped": dict(self.dropped),
            "failed": dict(self._learned.failed),
            "anchors": sum(self.reads.values()),
            "d": self._hidden_size,
            "last_proposal": self._last,
        }

    # --- the process -----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            source = self._wanted
            self._wake.clear()
            if source is None:
                await self._wake.wait()
                continue
            try:
                await self._session(source)
                continue
            except ChildGone as gone:
                lost = "; what it had learned is lost" if self._learned.tokens.get(ALL) else ""
                self._is("down", f"the learner ended ({gone}){lost}")
            except RefusedError as refused:
                self._is("unavailable", str(refused))
            finally:
                self._forget()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wants_other(source), BACKOFF[min(self._failures, len(BACKOFF) - 1)])
            self._failures += 1

    async def _wants_other(self, source: Source) -> None:
        while self._wanted == source:
            await self._wake.wait()
            self._wake.clear()

    async def _session(self, source: Source) -> None:
        """Returns when something else is wanted; raises ChildGone, RefusedError."""
        self._is("starting", f"reading the output embedding of {source.folder}")
        self._first = asyncio.get_running_loop().create_future()
        child = await Child.start("hemostat.learner.process", self._receive, ENVIRONMENT)
        watching = asyncio.create_task(self._watch(child), name="learner's end")
        try:
            child.send(wire.encode(self._start(source)))
            ready = await self._first
            self._failures = 0
            self._begin(ready, source)
            while self._wanted == source:
                self._wake.clear()
                if child.dead.is_set():
                    raise ChildGone(child.epitaph())
                await self._go_on(child)
                await self._wake.wait()
        finally:
            watching.cancel()
            await child.close()
            await asyncio.gather(watching, return_exceptions=True)

    def _start(self, source: Source) -> wire.Start:
        settings = self._settings
        return wire.Start(
            model=source.model,
            vocab_size=source.vocab_size,
            folder=str(source.folder),
            hidden_size=source.hidden_size,
            anchors=min(settings.anchors, source.vocab_size // 2),
            rank=settings.rank,
            clamp_nats=settings.clamp_nats,
            kl_limit=settings.clamp_kl_nats,
            half_life_tokens=settings.half_life_tokens,
            recent_tokens=settings.recent_tokens,
            min_tokens=settings.min_tokens,
        )

    def _begin(self, ready: wire.Ready, source: Source) -> None:
        anchors = np.frombuffer(ready.anchors, "<i4").astype(np.int32)
        self._hidden_size = source.hidden_size
        self.reads = {anchors_digest(anchors): len(anchors)}
        self._judge.probe(probe_profile(source.model, source.vocab_size, anchors, self._settings.clamp_nats))
        self._is("learning", "")
        self._changed()

    async def _watch(self, child: Child) -> None:
        await child.dead.wait()
        if self._first is not None and not self._first.done():
            self._first.set_exception(ChildGone(child.epitaph()))
        self._wake.set()

    async def _go_on(self, child: Child) -> None:
        """Send what may be sent, take what has come."""
        while self._proposed:
            await self._take(self._proposed.popleft())
        if self._answered and self._waiting:
            rows: list[wire.Row] = []
            while self._waiting and wire.size(rows) < BATCH_BYTES:
                rows.append(self._waiting.popleft())
            self._waiting_bytes -= wire.size(rows)
            self._answered = False
            child.send(wire.encode(wire.Learn(rows)))
        if self._asked is None and (scope := self._due()) is not None:
            self._asked = scope
            child.send(wire.encode(wire.Propose(scope)))

    def _due(self) -> str | None:
        """The first scope that has learned enough for a proposal that is awaited."""
        for scope, tokens in self._learned.tokens.items():
            enough = tokens >= max(self._settings.min_tokens, TRY_AGAIN * self._tried.get(scope, 0))
            if enough and self._judge.awaits(tokens, scope):
                return scope
        return None

    def _receive(self, body: bytes) -> None:
        answer = wire.decode_answer(body)
        match answer:
            case wire.Ready():
                if self._first is not None and not self._first.done():
                    self._first.set_result(answer)
            case wire.Refused():
                if self._first is not None and not self._first.done():
                    self._first.set_exception(RefusedError(answer.message))
            case wire.Learned():
                self._learned = answer
                self._answered = True
            case wire.Training():
                self._is("training", f"{answer.stage} {answer.done:.0%}")
            case wire.Proposed():
                self._proposed.append(answer)
        self._wake.set()

    async def _take(self, proposed: wire.Proposed) -> None:
        """A proposal, for steering to accept."""
        scope, tokens = proposed.scope, proposed.tokens
        self._asked = None
        self._tried[scope] = tokens
        self._is("learning", "")
        self._last = {"scope": scope, "tokens": tokens, "report": proposed.report, "version": None, "accepted": False}
        if not proposed.profile:
            log.log(
                logging.WARNING if proposed.report else logging.INFO,
                "nothing to propose%s from %d tokens%s",
                f" for {scope}" if scope else "",
                tokens,
                f": {proposed.report['problem']}" if "problem" in proposed.report else "",
            )
            return
        report = {**proposed.report, "tokens": tokens}
        why = f"learned from {tokens} tokens: {report.get('variant')}, rank {report.get('rank')}"
        try:
            profile = await asyncio.to_thread(CalibrationProfile.from_bytes, proposed.profile)
            self._last["version"] = profile.version
            self._last["accepted"] = self._judge.propose(profile, why, report, scope)
        except HemostatError as error:
            log.error("a proposal was of no use: %s", error)
        self._changed()

    # --- bookkeeping -----------------------------------------------------------------------------------------------

    @property
    def _learning(self) -> bool:
        return self.state in {"learning", "training"}

    def _is(self, state: str, detail: str) -> None:
        # How far training is, is no news for the log.
        if state != self.state and "training" not in {state, self.state}:
            log.log(logging.ERROR if state in {"down", "unavailable"} else logging.INFO, "learner %s %s", state, detail)
        self.state, self.detail = state, detail

    def _forget(self) -> None:
        """A process is gone, and all that it knew."""
        self._gone += Counter(self._learned.sources)
        self._learned = wire.Learned({}, {}, {})
        self._answered, self._asked = True, None
        self._proposed.clear()
        self._tried.clear()
        self._waiting.clear()
        self._waiting_bytes = 0
        self._hidden_size = 0
        self.reads = {}
