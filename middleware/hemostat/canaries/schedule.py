"""The times at which an engine is asked: every hour, at once when it comes back, and not while it cannot tell."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from hemostat.canaries.engine import (
    EngineCanaries,
    Reading,
    served,
)
from hemostat.canaries.judge import Judge
from hemostat.canaries.known import KnownEngines
from hemostat.canaries.pace import HOUR_SECONDS, Pace
from hemostat.canaries.replay import Replays
from hemostat.engines.addresses import EngineAddresses
from hemostat.engines.messages import EngineReport
from hemostat.engines.registry import EngineRegistry
from hemostat.engines.upstreams import UpstreamEngine, UpstreamEngines
from hemostat.reference.protocol import ReferenceFailure
from hemostat_calibration.canaries import Origin
from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.messages import in_words

log = logging.getLogger("hemostat.canaries")

RETRY_SECONDS = 300.0
"""The time from an attempt that could not tell until the next one."""
REQUEST_SECONDS = 60.0


class ServedEngines:
    """The engines behind the relays, as canaries need them: which there are, what each reports, and requests to them.

    clock: monotonic seconds.
    """

    def __init__(
        self,
        addresses: EngineAddresses,
        registry: EngineRegistry,
        upstreams: UpstreamEngines,
        clock: Callable[[], float],
    ) -> None:
        self._addresses = addresses
        self._registry = registry
        self._upstreams = upstreams
        self._clock = clock

    def current(self) -> Mapping[str, UpstreamEngine]:
        """Returns what relays report of each engine, by name."""
        return self._upstreams.current()

    @property
    def drained(self) -> Collection[str]:
        """The engines that get no new requests."""
        return self._upstreams.drained

    def report(self, name: str) -> EngineReport | None:
        """Returns what the plugin of an engine reports; None if it is not known which engine that is."""
        engines = self._addresses.at(name) if self._addresses.several else self._registry
        live = engines.live(self._clock())
        return live[0] if len({report.boot_id for report in live}) == 1 else None

    def canaries(self, name: str, pace: Pace, readings: Mapping[str, Reading]) -> EngineCanaries:
        """Returns the canaries of an engine, with a connection to it. readings: of an earlier process."""
        server = self._addresses.server(name, REQUEST_SECONDS)
        return EngineCanaries(name, server, pace, lambda: self._weights(name), readings, self._sign)

    def _sign(self, xargs: dict[str, Any]) -> dict[str, Any]:
        return self._registry.secrets.signed(xargs, self._clock())

    def _weights(self, name: str) -> str:
        report = self.report(name)
        return "" if report is None else report.weights


class ScheduledEngine:
    """Owns when one engine is asked."""

    def __init__(self, canaries: EngineCanaries) -> None:
        self.canaries = canaries
        self.up = False
        self._boot = ""
        self.listed_at = -np.inf
        """The time when its models were listed, monotonic seconds."""
        self.not_before = 0.0
        self.task: asyncio.Task[None] | None = None

    @property
    def idle(self) -> bool:
        return self.task is None or self.task.done()

    def look(self, up: bool, boot: str) -> None:
        """Looks at the engine: one that comes back, or whose plugin reports another boot id, is asked at once."""
        if (up and not self.up) or (boot and self._boot and boot != self._boot):
            self.listed_at, self.not_before = -np.inf, 0.0
            for reading in self.canaries.readings.values():
                reading.due = 0.0
        self.up, self._boot = up, boot or self._boot


class Schedule:
    """Owns the turns of the engines. It asks `Replays` to do what is due.

    model: the served name of the base model; None: the first. active: this process owns the store. clock: monotonic
    seconds. wall: Unix time.
    """

    def __init__(
        self,
        engines: ServedEngines,
        known: KnownEngines,
        replays: Replays,
        judge: Judge,
        model: str | None,
        *,
        active: Callable[[], bool],
        clock: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        self._engines = engines
        self._known = known
        self._replays = replays
        self._judge = judge
        self._model = model
        self._active = active
        self._clock, self._wall = clock, wall
        self.turns: dict[str, ScheduledEngine] = {}
        """The turns of the engines that are reported now, by name."""

    async def close(self) -> None:
        """Ends what is under way."""
        for name in list(self.turns):
            await self._drop(name)

    async def step(self) -> None:
        """Looks at the engines, and begins what is due there."""
        current = self._engines.current()
        for gone in self.turns.keys() - current.keys():
            await self._drop(gone)
        for name, seen in current.items():
            if name not in self.turns:
                self.turns[name] = self._begin(name)
            engine = self.turns[name]
            engine.canaries.pace.look(seen.outstanding)
            report = self._engines.report(name)
            engine.look(seen.up > 0, "" if report is None else report.boot_id)
            serves = engine.up and name not in self._engines.drained
            if serves and engine.idle and self._active() and self._clock() >= engine.not_before:
                engine.task = asyncio.create_task(self._work(engine), name=f"canaries of {name}")

    def _begin(self, name: str) -> ScheduledEngine:
        state = self._known.stored_state(name)
        pace = Pace(self._clock, self._wall, state.pace)
        canaries = self._engines.canaries(name, pace, state.readings)
        self._known.add(canaries)
        return ScheduledEngine(canaries)

    async def _drop(self, name: str) -> None:
        task, canaries = self.turns.pop(name).task, self._known.drop(name)
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await canaries.close()

    async def _work(self, engine: ScheduledEngine) -> None:
        """Does what is due at this engine now. A failure is counted and shown, not raised."""
        canaries, now = engine.canaries, self._clock()
        try:
            if now - engine.listed_at >= HOUR_SECONDS:
                await canaries.list_models(self._model)
                engine.listed_at = now
            if why := self._replays.announced(self._served_now()):
                self._replays.begin_anew(why)
            if (base := self._replays.base) is None:
                await self._replays.take(canaries)
                return
            if served(canaries.now) != served(base.origin):
                self._wait_for_others(canaries, base.origin)
                return
            canaries.differs = ""
            await self._replays.score_reference(base)
            if not await self._replays.explain(canaries, base):
                return
            first, *adapters = canaries.readings
            # The one that has been due for longest comes first, and none is replayed while it waits for the budget.
            for model in (first, *sorted(adapters, key=lambda name: canaries.readings[name].due)):
                if now >= canaries.readings[model].due and not await self._replays.replay(canaries, model):
                    break
        except (ReferenceFailure, InvalidArgumentError) as failure:
            self._fail(engine, str(failure))
        except Exception as error:
            log.exception("canaries: %s could not be asked", canaries.name)
            self._fail(engine, in_words(error))
        else:
            canaries.failure = ""

    def _served_now(self) -> set[tuple[str, str]]:
        """Returns what the engines that are in use serve."""
        drained = self._engines.drained
        return {served(engine.canaries.now) for name, engine in self.turns.items() if engine.up and name not in drained}

    def _fail(self, engine: ScheduledEngine, why: str) -> None:
        self._judge.failed()
        if why != engine.canaries.failure:
            log.warning("canaries: %s could not be asked: %s", engine.canaries.name, why)
        engine.canaries.failure, engine.not_before = why, self._clock() + RETRY_SECONDS
        engine.listed_at = -np.inf

    def _wait_for_others(self, canaries: EngineCanaries, then: Origin) -> None:
        """Leaves an engine out of the comparison until all engines serve the same path: this may be a rolling
        update."""
        why = "serves {} from {}, the set is of {} from {}".format(*served(canaries.now), *served(then))
        if why != canaries.differs:
            log.warning("canaries: %s %s: it is not compared until all engines serve the same", canaries.name, why)
        canaries.differs = why
