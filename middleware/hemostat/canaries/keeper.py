"""The canaries of the engines behind the relays: takes the sets, replays them, and says which engine has changed.

A set is taken once, at an engine that is up, and kept in the store. Each engine replays it every hour, and at once when
it comes back or was started again, within its budget of tokens. A replay that is too far away is repeated at once, and
only two in a row are a statement. In addition to the base model, each LoRA adapter that an engine lists is asked the
shortest sequences, against a baseline of its own.

A set is taken anew only where an operator accepts what is served, or announces it: another served name, another path of
the model, or another file of prompts. Other weights under the same path are a change.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from hemostat.canaries.engine import STATES_KEY
from hemostat.canaries.judge import Judge
from hemostat.canaries.prompts import load
from hemostat.canaries.replay import FIRST_SECONDS, Replays
from hemostat.canaries.report import CanaryReport
from hemostat.canaries.schedule import Schedule
from hemostat.canaries.short import ShortCanaries
from hemostat.canaries.states import BLOB_KEY, CanaryStates, Sets
from hemostat.canaries.weights import BLOB_KEY as WEIGHTS_KEY
from hemostat.canaries.weights import Weights
from hemostat.config.prompt_lines import PromptFileError
from hemostat.config.schema import Settings
from hemostat.engines.registry import EngineRegistry
from hemostat.metrics.samples import Sample
from hemostat.reference.monitor import ReferenceMonitor
from hemostat.scored_record import ScoredRecord
from hemostat.store.protocol import BlobKey, StoreWrites
from hemostat_calibration.canary_prefix import PromptLengths
from hemostat_calibration.elapsed import TimeBreak
from hemostat_calibration.errors import HemostatError, InvalidArgumentError

log = logging.getLogger("hemostat.canaries")

TICK_SECONDS = 1.0


class Canaries:
    """Lives in the control process's event loop, and touches no client's request. `Schedule` decides when an engine is
    asked, `Replays` asks it, `Judge` compares, and `CanaryReport` shows what was found.

    active: this process owns the store. clock: monotonic seconds. wall: Unix time.
    """

    def __init__(
        self,
        settings: Settings,
        engines: EngineRegistry,
        monitor: ReferenceMonitor,
        writes: StoreWrites,
        *,
        active: Callable[[], bool],
        clock: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        self._settings = settings.canaries
        self._engines = engines
        self.sets = Sets(writes)
        self.states = CanaryStates(engines, writes, wall)
        self._judge = Judge(self.states, writes, settings.canaries.tolerance_nats, clock, wall)
        self._lengths = PromptLengths()
        self.weights = Weights(
            engines.reports, writes, engines.signed, enabled=settings.canaries.weights, clock=clock, wall=wall
        )
        self.replays = Replays(
            self.sets, self.states, self._judge, monitor, self._lengths, writes, clock=clock, wall=wall
        )
        short = partial(
            ShortCanaries,
            sets=self.sets,
            states=self.states,
            judge=self._judge,
            writes=writes,
            tolerance=settings.canaries.tolerance_nats,
            clock=clock,
            wall=wall,
        )
        self.schedule = Schedule(
            engines,
            self.states,
            self.replays,
            self._judge,
            self.weights,
            settings.calibration.model,
            short,
            active=active,
            clock=clock,
            wall=wall,
        )
        self._report = CanaryReport(self.states, self.sets, self._judge, self.weights)
        self.problem = "" if settings.canaries.enabled else "canaries.enabled is false"
        """The reason why nothing is replayed; "" if something is."""

    def restore(self, blobs: Mapping[BlobKey, bytes]) -> None:
        """Takes what an earlier run stored."""
        if not self._settings.enabled:
            return
        if BLOB_KEY not in blobs:
            log.info("canaries: the store has no set; one is taken in %.0f minutes", FIRST_SECONDS / 60.0)
        stored = ((BLOB_KEY, self.sets.restore), (STATES_KEY, self.states.restore), (WEIGHTS_KEY, self.weights.restore))
        for key, read in stored:
            try:
                if key in blobs:
                    read(blobs[key])
            except InvalidArgumentError as error:
                self._judge.failed()
                log.error("canaries: what is stored as %s cannot be used, and is taken anew: %s", key, error)

    def after_break(self, time_break: TimeBreak) -> None:
        """Notes that the clock was set."""
        self.states.after_break(time_break)

    def update(self, scored: ScoredRecord) -> None:
        """Notes how long prompts of the traffic are. Implements `scored_record.RecordConsumer`."""
        self._lengths.update(len(scored.capture.prompt_token_ids))

    def accept(self) -> None:
        """Accepts what the engines compute now as right: a new set is taken at once. Raises HemostatError if none can
        be taken.
        """
        if self.problem:
            raise HemostatError(f"there are no canaries: {self.problem}")
        self.schedule.begin_anew("accepted by the operator")

    async def run(self) -> None:
        """Replays the canaries until it is cancelled."""
        if not self._settings.enabled:
            return
        try:
            self.replays.prompts = await asyncio.to_thread(load, self._settings.file)
        except PromptFileError as error:
            self.problem = f"canaries.file: {error}"
            self._judge.failed()
            log.error("no canaries: %s", self.problem)
            return
        try:
            while True:
                self.step()
                await asyncio.sleep(TICK_SECONDS)
        finally:
            await self.schedule.close()

    def step(self) -> None:
        """Looks at the engines, and begins what is due there."""
        self.schedule.step()
        self._engines.outliers = frozenset(name for name, its in self.states.current.items() if its.is_outlier)

    def statements(self) -> Iterator[tuple[str, float]]:
        """Yields what is wrong now, one line each, and since when (Unix time)."""
        return self._report.statements()

    def report(self) -> dict[str, Any]:
        """Returns the state of the canaries, JSON-ready. See `CanaryReport.report`."""
        return self._report.report(self.problem)

    def samples(self) -> Iterator[Sample]:
        return self._report.samples()
