"""Collects texts of the learning side, has an adapter made of them in a process of its own, and proposes it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from hemostat.adapters.live.builder import COMMAND, Build, BuildFailed, BuildFailure
from hemostat.adapters.live.collected_texts import Texts
from hemostat.adapters.live.folders import CheckpointFolders
from hemostat.adapters.live.job import Job, Result, delete_left_behind
from hemostat.checkpoints.checkpoint_digest import checkpoint_digest
from hemostat.config.schema import Adapter
from hemostat.ipc.turns import Turns
from hemostat.metrics import names
from hemostat.metrics.samples import Sample
from hemostat_calibration.arrays import Ids
from hemostat_calibration.backoff import Backoff
from hemostat_calibration.errors import HemostatError
from hemostat_calibration.messages import with_detail
from hemostat_calibration.profiles.adapter import ADAPTER
from hemostat_calibration.profiles.profile import CalibrationProfile

log = logging.getLogger("hemostat.adapters")

BACKOFF = (0.5, 2.0, 10.0, 60.0)
"""Seconds before a build that ended is started again, by how often in a row it failed."""
MAX_ATTEMPTS = 6
"""The number of attempts at a build; after them, more texts are waited for."""
RETRY_TOKEN_GROWTH = 1.25
"""After a build of which nothing came, the next one is made when this many times more tokens are known."""
RETRY_SECONDS = 900.0
"""After a build whose failure may pass (a killed process, a full disk), the next one is tried so much later."""
TOKEN_GROWTH_AFTER_TEST = 2.0
MAX_TOKENS_AFTER_TEST = 500_000
"""After the test of an adapter has ended, the next one is made when this many times more tokens are known, or so many
more of them."""
PAUSE_AFTER_TEST_SECONDS = 300.0
"""No build begins so soon after a test. After a promotion the engine and the learner take up what was promoted, and its
first figures in the treated arm are gathered: a build would take the cores from both."""
TESTING = "the next adapter is made after the test of the last one"
"""The detail of the state while a test goes on."""
OTHER_WORK = "enough texts are known; waits until other background work has ended"
"""The detail of the state while no core is free for a build."""
RECHECK_SECONDS = 5.0
"""The longest time in seconds until the learner looks again if an adapter of as many tokens would be accepted, while
enough texts are known for a build."""


@dataclass(frozen=True, slots=True)
class AdapterTarget:
    """The models that adapters are made for.

    model: the served name of the compressed model. reference_digest: the digest of the weights that the reference
    serves, if they are in a folder; "" if it is not known.
    """

    model: str
    vocab_size: int
    folders: CheckpointFolders
    reference_digest: str = ""


class AdapterReceiver(Protocol):
    """Implemented by `profiles.proposals.Proposals`."""

    def accepts(self, family: str, tokens: int) -> bool: ...

    def is_testing(self, family: str) -> bool: ...

    def propose(self, profile: CalibrationProfile, why: str, report: Mapping[str, Any]) -> bool: ...


class AdapterState(StrEnum):
    OFF = "off"
    UNAVAILABLE = "unavailable"
    """Adapters are wanted, but cannot be made."""
    COLLECTING = "collecting"
    BUILDING = "building"
    """An adapter is being made, while texts are collected."""
    DOWN = "down"
    """The process that makes it has ended, and is started again after a pause."""


class BuildOutcome(StrEnum):
    """The outcome of a build that is not a `BuildFailure`."""

    PROPOSED = "proposed"
    NOT_ACCEPTED = "not_accepted"
    """It is not tested now."""


class AdapterLearner:
    """Lives in the control process's event loop; only `run` waits. Texts are kept in memory only, and lost with it.

    on_change: called after a proposal.
    """

    def __init__(
        self,
        settings: Adapter,
        receiver: AdapterReceiver,
        on_change: Callable[[], None] = lambda: None,
        *,
        clock: Callable[[], float] = time.monotonic,
        command: Sequence[str] = COMMAND,
        turns: Turns | None = None,
    ) -> None:
        """command: of the process that makes adapters. turns: of heavy jobs; None: no other job takes any."""
        self._settings = settings
        self._receiver = receiver
        self._on_change = on_change
        self._clock = clock
        self._command = command
        self._turns = turns or Turns()
        self._target: AdapterTarget | None = None
        self._texts = Texts(settings.max_tokens)
        self._wake = asyncio.Event()
        self._next = 0
        """Fewest tokens that are known for the next one."""
        self._not_before = -float("inf")
        """The time, by the clock, before which no further build begins."""
        self.outcomes: Counter[str] = Counter()
        """Builds by outcome: `BuildOutcome`, `BuildFailure`."""
        self.restarts = 0
        """The number of times that the process which makes an adapter was started again after it had ended."""
        self.last_build: dict[str, Any] | None = None
        self._last_made: dict[str, Any] = {}
        """The content of `last_build` after the last build that made an adapter; empty before."""
        self.state, self.detail = AdapterState.OFF, ""
        self.failing = ""
        """The reason why no adapter can be made, or why the last build made none; "" otherwise."""

    # --- called by the control process -----------------------------------------------------------------------------

    def set_target(self, target: AdapterTarget) -> None:
        """Sets the target from now on; nothing changes if it is the target already."""
        if target == self._target:
            return
        before = self._target
        self._target = target
        self._next, self._not_before = 0, -float("inf")
        if before is None or (before.model, before.vocab_size) != (target.model, target.vocab_size):
            self._texts.clear()
        self.failing = ""
        self._set_state(AdapterState.COLLECTING, "")
        self._wake.set()

    def stop(self, why: str, *, unavailable: bool = False) -> None:
        """Make nothing, and forget the texts. why: shown as the state's detail."""
        self._texts.clear()
        if self._target is not None:
            self._target = None
            self._wake.set()
        if unavailable and why != self.failing:
            self.outcomes[BuildFailure.REFUSED] += 1
        self.failing = why if unavailable else ""
        self._set_state(AdapterState.UNAVAILABLE if unavailable else AdapterState.OFF, why)

    def update(self, unit: bytes, prompt: Ids, output: Ids) -> None:
        """A text of the learning side: whoever wrote the output, its ids are all that is used."""
        if self._target is None:
            return
        self._texts.update(unit, prompt, output)
        self._wake.set()

    @property
    def tokens(self) -> int:
        """The number of tokens that are kept."""
        return self._texts.tokens

    @property
    def known(self) -> int:
        """Tokens of all texts so far, also of those that are not kept any more: what is known grows by newer texts."""
        return self._texts.known

    def samples(self) -> Iterator[Sample]:
        # Those of which there was none, too: the alert would not see the first one.
        for outcome in (*BuildOutcome, *BuildFailure):
            yield Sample(names.ADAPTER_BUILDS, (outcome.value,), self.outcomes[outcome.value])
        yield from self._samples_of_adapter()

    def _samples_of_adapter(self) -> Iterator[Sample]:
        """Yields the metrics of the last adapter that was made, without the ones that its report does not state."""
        made = self._last_made
        rank = made.get("rank") if made.get("max_rank") is None else made["max_rank"]
        result = [
            (names.ADAPTER_RANK, (), rank),
            (names.ADAPTER_HELD_OUT_RECOVERED_RATIO, (), (made.get("held_out") or {}).get("share")),
            *((names.ADAPTER_BYTES, (form,), made.get(member)) for form, member in ADAPTER_FORMS.items()),
        ]
        for name, labels, value in result:
            if isinstance(value, int | float):
                yield Sample(name, labels, value)

    def status(self) -> dict[str, Any]:
        return {
            "state": str(self.state),
            "detail": self.detail,
            "tokens": self.tokens,
            "known_tokens": self.known,
            "texts": len(self._texts),
            "next_tokens": self._needed(),
            "builds": dict(self.outcomes),
            "restarts": self.restarts,
            "last_build": self.last_build,
        }

    # --- builds ----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Make an adapter whenever enough is known, until cancelled."""
        result = await asyncio.to_thread(delete_left_behind)
        if result:
            log.info("deleted %d folders of builds that were killed", result)
        while True:
            target = self._target
            self._wake.clear()
            if target is not None and self._receiver.is_testing(ADAPTER):
                self._wait_for_test()
                await self._sleep()
                continue
            if self.detail in {TESTING, OTHER_WORK}:
                self._show(AdapterState.COLLECTING, "")
            if target is None or self.known < self._needed():
                await self._wake.wait()
            elif self._clock() < self._not_before or not self._receiver.accepts(ADAPTER, self.known):
                await self._sleep()
            elif not self._turns.take(ADAPTER, self._settings.device):
                self._show(AdapterState.COLLECTING, OTHER_WORK)
                await self._sleep()
            else:
                try:
                    await self._make(target)
                finally:
                    self._turns.give_back(ADAPTER)

    async def _sleep(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RECHECK_SECONDS):
                await self._wake.wait()

    def _wait_for_test(self) -> None:
        """Waits with the next build: its adapter would only wait until the test has ended, and its process would take
        the cores from the copies that judge the test. Some time after the test, the next adapter is made of more
        texts."""
        self._not_before = self._clock() + PAUSE_AFTER_TEST_SECONDS
        self._next = min(int(self.known * TOKEN_GROWTH_AFTER_TEST), self.known + MAX_TOKENS_AFTER_TEST)
        if self.state is AdapterState.COLLECTING:
            self._show(AdapterState.COLLECTING, TESTING)

    def _needed(self) -> int:
        return max(min(self._settings.min_tokens, self._settings.max_tokens), self._next)

    async def _make(self, target: AdapterTarget) -> None:
        """One build, with all its attempts; it ends early where the target changes."""
        making = asyncio.create_task(self._make_for(target), name="adapter build")
        changed = asyncio.create_task(self._target_changes(target), name="adapter's target")
        try:
            await asyncio.wait({making, changed}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (making, changed):
                task.cancel()
            await asyncio.gather(making, changed, return_exceptions=True)
        if making.done() and not making.cancelled():
            making.result()

    async def _target_changes(self, target: AdapterTarget) -> None:
        while self._target == target:
            self._wake.clear()
            await self._wake.wait()

    async def _make_for(self, target: AdapterTarget) -> None:
        self._show(AdapterState.BUILDING, "reading the checkpoints")
        tokens, known, began = self.tokens, self.known, self._clock()
        try:
            job = await self._job(target)
        except (OSError, HemostatError) as error:
            self._failed(BuildFailure.REFUSED, " ".join(str(error).split()), tokens, known)
            return
        build = Build(job, self._settings.memory_mib, self._progressed, self._command)
        try:
            result = await self._attempts(build)
        except BuildFailed as failure:
            self._failed(failure.reason, str(failure), tokens, known)
        else:
            self._propose(result, tokens, known, self._clock() - began)
        finally:
            await build.close()

    async def _job(self, target: AdapterTarget) -> Job:
        """HemostatError where the reference's folder is not what serves."""
        texts, folders, settings = self._texts.all(), target.folders, self._settings
        reference = await asyncio.to_thread(checkpoint_digest, str(folders.reference), None)
        compressed = await asyncio.to_thread(checkpoint_digest, str(folders.compressed), None)
        if target.reference_digest and reference != target.reference_digest:
            raise HemostatError(
                f"reference.folder: {folders.reference} is not the checkpoint that the reference serves"
            )
        options = {
            "rank": settings.rank,
            "shared_out": settings.shared_out,
            "memory_mib": settings.memory_mib,
            "device": settings.device,
            "distil": settings.distil,
        }
        return Job(folders, (reference, compressed), target.model, target.vocab_size, texts, options)

    async def _attempts(self, build: Build) -> Result:
        """The first result; BuildFailed after the last attempt."""
        backoff = Backoff(BACKOFF, random.random)
        while True:
            try:
                return await build.attempt()
            except BuildFailed as failure:
                if not failure.reason.may_pass or backoff.failures + 1 >= MAX_ATTEMPTS:
                    raise
                self._show(AdapterState.DOWN, f"the process that makes an adapter failed: {failure}")
                await asyncio.sleep(backoff.pause())
                self.restarts += 1
                self._show(AdapterState.BUILDING, "started again")

    def _progressed(self, line: str) -> None:
        self._show(AdapterState.BUILDING, line)

    def _failed(self, reason: BuildFailure, why: str, tokens: int, known: int) -> None:
        if reason.may_pass:
            self._ended(reason, known)
            self._not_before = self._clock() + RETRY_SECONDS
        else:
            self._ended(reason, int(known * RETRY_TOKEN_GROWTH) + 1)
        log.error("no adapter was made from %d tokens (%s): %s", tokens, reason, why)
        self.last_build = {"outcome": str(reason), "detail": why, "tokens": tokens}
        self.failing = why
        unavailable = reason in {BuildFailure.REFUSED, BuildFailure.MEMORY}
        self._show(AdapterState.UNAVAILABLE if unavailable else AdapterState.COLLECTING, why)

    def _propose(self, result: Result, tokens: int, known: int, seconds: float) -> None:
        """tokens: that it was made from. known: that were known then."""
        profile, report = result.profile, result.report
        rank = report.get("rank")
        shared = f", shared out up to {report.get('max_rank')}" if report.get("shared_out") else ""
        shown = {name: report.get(name) for name in SHOWN} | {"wall_seconds": round(seconds, 1)}
        outcome, detail = BuildOutcome.NOT_ACCEPTED, ""
        try:
            why = f"made from {tokens} tokens: rank {rank}{shared}"
            if self._receiver.propose(profile, why, shown | {"tokens": known, "made_from_tokens": tokens}):
                outcome = BuildOutcome.PROPOSED
        except HemostatError as error:
            detail = str(error)
            log.error("an adapter was refused: %s", error)
        growth = 2.0 if outcome is BuildOutcome.PROPOSED else RETRY_TOKEN_GROWTH
        self._ended(outcome, int(known * growth))
        more = {"tokens": tokens, "layers": report.get("layers")}
        self.last_build = {"outcome": str(outcome), "detail": detail, "version": profile.version, **shown, **more}
        self._last_made = self.last_build
        self.failing = ""
        self._show(AdapterState.COLLECTING, "")
        self._on_change()

    def _ended(self, outcome: BuildOutcome | BuildFailure, next_tokens: int) -> None:
        self.outcomes[str(outcome)] += 1
        self._next = next_tokens

    # --- bookkeeping -----------------------------------------------------------------------------------------------

    def _show(self, state: AdapterState, detail: str) -> None:
        """Shows the state of a build, unless it was stopped in the meantime."""
        if self._target is not None:
            self._set_state(state, detail)

    def _set_state(self, state: AdapterState, detail: str) -> None:
        # The progress of a build is not logged.
        if state != self.state:
            failed = state in {AdapterState.DOWN, AdapterState.UNAVAILABLE}
            log.log(logging.ERROR if failed else logging.INFO, "adapters %s", with_detail(state, detail))
        self.state, self.detail = state, detail


ADAPTER_FORMS = {"stored": "bytes", "engine": "engine_bytes", "quantized_layers": "quantized_bytes"}
"""Value of the label `form` of `hemostat_adapter_bytes` -> member of the build's report."""
SHOWN = (
    "rank",
    "max_rank",
    "shared_out",
    "metric",
    "method",
    "bytes",
    "bytes_share",
    "engine_bytes",
    "engine_bytes_share",
    "quantized_bytes",
    "kinds",
    "seconds",
    "cpu_seconds",
    "peak_mib",
    "notes",
    "held_out",
)
"""The members of the build's report that the status and the proposal's event show."""
