"""The short canaries of one engine: a sequence every few seconds, whatever the load, so that a fault is stated at once.

What is suspicious, and what is stated, is decided by `hemostat_calibration.canary_short`.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from hemostat.canaries.engine import EngineCanaries, served, short_statement
from hemostat.canaries.judge import Judge
from hemostat.canaries.states import CanaryStates, Sets
from hemostat.reference.protocol import ReferenceFailure
from hemostat.store.protocol import StoreWrites
from hemostat.store.spent_alpha import until_written
from hemostat_calibration.arrays import Floats
from hemostat_calibration.canaries import DAY_REPLAYS, REPLAYS, CanarySet, Condition
from hemostat_calibration.canary_short import HOUR_SECONDS, SHORT_ROUNDS, ShortWatch, short_sequences
from hemostat_calibration.errors import HemostatError
from hemostat_calibration.messages import in_words

log = logging.getLogger("hemostat.canaries")

SHORT_SECONDS = 10.0
"""The time from one sequence to the next: 7,200 tokens an hour with all of 20 tokens."""
FAILED_SECONDS = 300.0
"""The time after a failure until the engine is asked again."""


class ShortCanaries:
    """Owns when one engine is asked for a short sequence, and the sequences of the present pass over all of them.
    Implements `engines.engine.EnginePart`.

    clock: monotonic seconds. wall: Unix time.
    """

    def __init__(
        self,
        canaries: EngineCanaries,
        sets: Sets,
        states: CanaryStates,
        judge: Judge,
        writes: StoreWrites,
        tolerance: float,
        *,
        clock: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        self._canaries = canaries
        self._sets = sets
        self._states = states
        self._judge = judge
        self._writes = writes
        self._tolerance = tolerance
        self._clock, self._wall = clock, wall
        self._due = clock() + SHORT_SECONDS
        self._task: asyncio.Task[None] | None = None
        self._order: list[int] = []
        """The sequences that are left of this pass."""
        self._passed: dict[int, Floats] = {}
        self._quiet = True
        """No sequence of this pass was suspicious."""

    @property
    def idle(self) -> bool:
        return self._task is None or self._task.done()

    async def close(self) -> None:
        """Ends what is under way."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def step(self) -> None:
        """Begins what is due. The engine is up."""
        its, base = self._canaries, self._sets.base
        if self._clock() < self._due or not self.idle or base is None or served(its.now) != served(base.origin):
            return
        reading = its.base
        if self._sets.short is None and (reading is None or not reading.found or reading.suspected or reading.since):
            return  # the engine may have changed since the set was taken
        self._due = self._clock() + SHORT_SECONDS
        self._task = asyncio.create_task(self._work(base), name=f"short canaries of {its.name}")

    async def _work(self, base: CanarySet) -> None:
        try:
            if (taken := self._sets.short) is None:
                await self._take(base)
            else:
                await self._ask(taken)
        except (ReferenceFailure, HemostatError) as failure:
            # The hourly replay counts and shows why an engine cannot be asked.
            log.info("short canaries: %s could not be asked: %s", self._canaries.name, failure)
            self._begin_pass()
            self._due = self._clock() + FAILED_SECONDS
        except Exception as error:
            log.exception("short canaries: %s could not be asked: %s", self._canaries.name, in_words(error))
            self._begin_pass()
            self._due = self._clock() + FAILED_SECONDS

    async def _take(self, base: CanarySet) -> None:
        """Takes the baseline, in moments of low load."""
        its = self._canaries
        async with self._sets.taking_short:
            if self._sets.short is None:
                client = its.client(base.origin.model)
                origin, sequences = replace(its.now, at=self._wall()), short_sequences(base.canaries)
                taken = await client.baseline(sequences, origin, decoded=base.decoded, rounds=SHORT_ROUNDS)
                if self._sets.base is not None and self._sets.base.canaries is base.canaries:
                    self._sets.put_short(taken)

    async def _ask(self, taken: CanarySet) -> None:
        """Asks for one sequence; and again, and for all, if it is suspicious."""
        its = self._canaries
        if not self._order:
            self._begin_pass(taken)
        watch, sequence = ShortWatch(self._tolerance, its.short), self._order.pop()
        client, canary = its.client(taken.origin.model, at_any_load=True), taken.canaries[sequence]
        values = await client.score(canary, decoded=taken.decoded)
        if watch.suspects(taken, sequence, values):
            self._quiet = False
            again = await client.score(canary, decoded=taken.decoded)
            if watch.confirmed(taken, sequence, values, again, self._wall()):
                its.short = watch.state
                self._states.save()
                await until_written(self._writes)  # a whole replay that is not counted would be one too many
                whole = await client.replay(taken)
                if self._sets.short is None or self._sets.short.canaries is not taken.canaries:
                    return
                stated = watch.whole(taken, whole, self._wall())
                self._note(watch, stated)
        self._passed[sequence] = values
        if not self._order and len(self._passed) == len(taken.canaries):
            self._end_pass(watch, taken, np.concatenate([self._passed[n] for n in range(len(taken.canaries))]))

    def _begin_pass(self, taken: CanarySet | None = None) -> None:
        self._order = [] if taken is None else random.sample(range(len(taken.canaries)), len(taken.canaries))
        self._passed, self._quiet = {}, True

    def _end_pass(self, watch: ShortWatch, taken: CanarySet, values: Floats) -> None:
        """Takes what a pass has scored: an end of a statement, or one more replay of the baseline's day."""
        if watch.passed(taken, values):
            self._note(watch, stated=True)
            return
        reading, current = self._canaries.base, self._sets.short
        healthy = self._quiet and watch.state.since is None and reading is not None and not reading.since
        here = taken.origin.engine == self._canaries.name or taken.origin.engine not in self._states.current
        if not healthy or not here or current is None or current.canaries is not taken.canaries:
            return
        now, full = self._wall(), SHORT_ROUNDS * REPLAYS + DAY_REPLAYS
        if len(current.baseline) < full and now - current.conditions[-1].at >= HOUR_SECONDS:
            self._sets.put_short(current.with_replay(values, Condition(now, load=self._canaries.load)))

    def _note(self, watch: ShortWatch, stated: bool) -> None:
        """Notes what a whole replay has found. If something is stated or is over, it is an event, and the whole set is
        replayed as soon as the budget allows it."""
        its = self._canaries
        its.short = watch.state
        if stated:
            text = short_statement(its.name, its.now.model, its.short)
            self._judge.record_event(
                text or f"Canaries: {its.name} ({its.now.model}) is as it was, in short sequences", {}
            )
            if its.base is not None:
                its.base.due, its.not_before = 0.0, 0.0
        self._states.save()
