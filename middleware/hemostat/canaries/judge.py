"""Judges replays: how far an engine is from its baseline and from the other engines, and what the cause is."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

from hemostat.canaries.engine import (
    BASELINE,
    ENGINES,
    EngineCanaries,
    Reading,
    prefix_statement,
    statement,
    text_statement,
)
from hemostat.canaries.pace import HOUR_SECONDS
from hemostat.canaries.states import CanaryStates
from hemostat.store.protocol import StoreWrites, alarm_event
from hemostat_calibration.canaries import CanarySet
from hemostat_calibration.canary_cause import UNCHANGED, Measured, Verdict, of_engines
from hemostat_calibration.canary_texts import TextComparison

log = logging.getLogger("hemostat.canaries")

EQUAL, EXCEEDED, FAILED = "equal", "exceeded", "failed"


class Judge:
    """Owns the counts of what replays have found. `Replays` hands it each replay; statements go to the store's events.

    tolerance: nats. clock: monotonic seconds. wall: Unix time.
    """

    def __init__(
        self,
        states: CanaryStates,
        writes: StoreWrites,
        tolerance: float,
        clock: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        self._states = states
        self._writes = writes
        self._tolerance = tolerance
        self._clock, self._wall = clock, wall
        self.outcomes: Counter[str] = Counter({EQUAL: 0, EXCEEDED: 0, FAILED: 0})

    def failed(self) -> None:
        """Counts an attempt that could not tell."""
        self.outcomes[FAILED] += 1

    def update(self, canaries: EngineCanaries, model: str, taken: CanarySet) -> None:
        """Judges a replay of this engine: against the baseline, and all engines that serve the same against each
        other."""
        tolerance, now = self._tolerance, self._wall()
        reading, alike = canaries.readings[model], self._states.alike(canaries, model)
        before = {name: dict(reading.since) for name, reading in alike.items()}
        values = {name: reading.values for name, reading in alike.items() if reading.values is not None}
        reading.judge(BASELINE, taken.compare(values[canaries.name], tolerance), [reading.number], now)
        numbers = [reading.number for reading in alike.values()]
        for name, comparison in taken.compare_engines(values, tolerance).items():
            alike[name].judge(ENGINES, comparison, numbers, now)
        self.outcomes[EXCEEDED if reading.suspected else EQUAL] += 1
        awaited = max((reading.awaited.get(ENGINES, 0) for reading in alike.values()), default=0)
        for name, current in alike.items():
            if current.number <= max(awaited, current.awaited.get(BASELINE, 0)):
                current.due = 0.0
            elif name == canaries.name:
                current.due = self._clock() + HOUR_SECONDS
            if current.since.keys() != before[name].keys():
                text = self.statement(self._states.current[name], model, current, taken)
                self.record_event(text or f"Canaries: {name} ({model}) is as it was", figures(current))
        self._states.save()

    def update_prefix(self, canaries: EngineCanaries, taken: CanarySet) -> None:
        """Judges a replay of this engine's sequences behind a cached prefix."""
        reading, name, model = canaries.prefix, canaries.name, canaries.now.model
        if reading.values is None:
            return
        before = dict(reading.since)
        found = taken.compare(reading.values, self._tolerance)
        reading.judge(BASELINE, found, [reading.number], self._wall())
        if not reading.awaited:
            reading.due = self._clock() + HOUR_SECONDS
        if reading.since.keys() != before.keys():
            text = f"Canaries: {name} ({model}) is as it was behind a prefix that is in its prefix cache"
            self.record_event(prefix_statement(name, model, reading) or text, figures(reading))
        self._states.save()

    def update_texts(self, canaries: EngineCanaries, comparison: TextComparison) -> None:
        """Judges a replay of this engine's texts."""
        texts, name, model = canaries.texts, canaries.name, canaries.now.model
        before = texts.since
        texts.judge(comparison, self._wall())
        if texts.since != before:
            text = text_statement(name, model, texts) or f"Canaries: {name} ({model}) treats clients' texts as it did"
            self.record_event(text, {"texts": comparison.summary})
        self._states.save()

    def explain(self, canaries: EngineCanaries, base: CanarySet, measured: Measured) -> None:
        """Takes what variants of the base model's text have measured, and states the cause of what was found."""
        reading = canaries.base
        if reading is None or base.cause is None:
            return
        reading.cause = base.cause.explain(measured, self._tolerance)
        self.record_event(self.statement(canaries, canaries.now.model, reading, base), figures(reading))
        self._states.save()

    def cause(self, canaries: EngineCanaries, model: str, reading: Reading) -> Verdict | None:
        """Returns the cause of what its replays have found, if it is known: a cause that all engines have, or the cause
        at this engine alone.
        """
        alike = self._states.alike(canaries, model)
        found = {name: other.cause if other.since else UNCHANGED for name, other in alike.items()}
        known = {name: cause for name, cause in found.items() if cause is not None}
        return of_engines(known) if reading.cause is not None and len(known) == len(found) > 1 else reading.cause

    def statement(self, canaries: EngineCanaries, model: str, reading: Reading, taken: CanarySet) -> str:
        """Returns what is wrong at an engine, in one line; "" if nothing is."""
        cause = self.cause(canaries, model, reading)
        return statement(canaries.name, model, reading, taken.origin, canaries.now, cause)

    def record_event(self, why: str, evidence: dict[str, Any]) -> None:
        """Stores an event."""
        log.warning("%s", why)
        self._writes.append_event(alarm_event(self._wall(), why, evidence))


def figures(reading: Reading) -> dict[str, Any]:
    """Returns the figures of a replay, JSON-ready."""
    found = {
        against: {
            "votes": comparison.votes,
            "needed": comparison.needed,
            "sequences": len(comparison.bounds),
            "distance_nats": comparison.nats,
        }
        for against, comparison in reading.found.items()
    }
    return {**found, "reference_nats": reading.reference}
