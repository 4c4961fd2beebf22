"""The times at which an engine is asked: every hour, at once when it comes back, and not while it cannot tell."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import numpy as np

from hemostat.canaries.engine import EngineCanaries, served
from hemostat.canaries.judge import Judge
from hemostat.canaries.pace import HOUR_SECONDS, Pace
from hemostat.canaries.replay import Replays
from hemostat.canaries.short import ShortCanaries
from hemostat.canaries.states import CanaryStates
from hemostat.canaries.weights import Weights
from hemostat.engines.engine import Engine
from hemostat.engines.registry import EngineRegistry
from hemostat.reference.protocol import ReferenceFailure
from hemostat_calibration.canaries import Origin
from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.messages import in_words

log = logging.getLogger("hemostat.canaries")

RETRY_SECONDS = 300.0
"""The time from an attempt that could not tell until the next one."""


class Schedule:
    """Decides whose turn it is. It asks `Replays` to do what is due.

    model: the served name of the base model; None: the first. short: makes an engine's short canaries. active:
    this process owns the store. clock: monotonic seconds. wall: Unix time.
    """

    def __init__(
        self,
        engines: EngineRegistry,
        states: CanaryStates,
        replays: Replays,
        judge: Judge,
        weights: Weights,
        model: str | None,
        short: Callable[[EngineCanaries], ShortCanaries],
        *,
        active: Callable[[], bool],
        clock: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        self._engines = engines
        self._states = states
        self._replays = replays
        self._judge = judge
        self._weights = weights
        self._model = model
        self._short = short
        self._active = active
        self._clock, self._wall = clock, wall

    async def close(self) -> None:
        """Ends what is under way."""
        await self._engines.end_parts(ShortCanaries)
        await self._engines.end_parts(EngineCanaries)

    def begin_anew(self, why: str) -> None:
        """Forgets the sets, and the checksums of weights: new ones are taken at once."""
        self._replays.begin_anew(why)
        self._weights.forget()

    def step(self) -> None:
        """Looks at the engines, and begins what is due there."""
        for name, engine in self._engines.current().items():
            canaries = engine.part(EngineCanaries) or self._begin(engine)
            canaries.look()
            serves = canaries.up and name not in self._engines.drained
            if serves and canaries.idle and self._active() and self._clock() >= canaries.not_before:
                canaries.task = asyncio.create_task(self._work(canaries), name=f"canaries of {name}")
            if serves and self._active() and (short := engine.part(ShortCanaries)) is not None:
                short.step()

    def _begin(self, engine: Engine) -> EngineCanaries:
        state = self._states.stored_state(engine.name)
        canaries = EngineCanaries(
            engine,
            Pace(self._clock, self._wall, state.pace),
            state,
            sign=self._engines.signed,
            clock=self._clock,
            on_end=self._states.keep,
        )
        engine.add(canaries)
        engine.add(self._short(canaries))
        return canaries

    async def _work(self, canaries: EngineCanaries) -> None:
        """Does what is due at this engine now. A failure is counted and shown, not raised."""
        now = self._clock()
        try:
            if now - canaries.listed_at >= HOUR_SECONDS:
                await canaries.list_models(self._model)
                canaries.listed_at = now
            if why := self._replays.announced(self._served_now()):
                self.begin_anew(why)
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
                    return
            await self._replays.read_texts(canaries, base)
            await self._replays.read_prefix(canaries, base)
            await self._weights.read(canaries)
        except (ReferenceFailure, InvalidArgumentError) as failure:
            self._fail(canaries, str(failure))
        except Exception as error:
            log.exception("canaries: %s could not be asked", canaries.name)
            self._fail(canaries, in_words(error))
        else:
            canaries.failure = ""

    def _served_now(self) -> set[tuple[str, str]]:
        """Returns what the engines that are in use serve."""
        drained = self._engines.drained
        return {served(its.now) for name, its in self._states.current.items() if its.up and name not in drained}

    def _fail(self, canaries: EngineCanaries, why: str) -> None:
        self._judge.failed()
        if why != canaries.failure:
            log.warning("canaries: %s could not be asked: %s", canaries.name, why)
        canaries.failure, canaries.not_before = why, self._clock() + RETRY_SECONDS
        canaries.listed_at = -np.inf

    def _wait_for_others(self, canaries: EngineCanaries, then: Origin) -> None:
        """Leaves an engine out of the comparison until all engines serve the same path: this may be a rolling
        update."""
        why = "serves {} from {}, the set is of {} from {}".format(*served(canaries.now), *served(then))
        if why != canaries.differs:
            log.warning("canaries: %s %s: it is not compared until all engines serve the same", canaries.name, why)
        canaries.differs = why
