"""The hemorrhage alarm while serving: feeds its tests, reports them, and logs and stores every change.

Two tests on every route (see `hemostat_calibration.alarm`): *budget*, the divergence beyond the noise floor exceeds
`alarm.budget_nats`; *change*, the stream differs from its first `alarm.baseline_tokens`. `alarm.alpha` is the
false-alarm probability of all of them together, over the whole run.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from hemostat.config import schema as config
from hemostat.measurement.figures import finite
from hemostat.metrics import names
from hemostat.metrics.samples import Sample
from hemostat.store.protocol import StoreWrites
from hemostat_calibration import alarm
from hemostat_calibration.divergence.per_token import TokenDivergence
from hemostat_calibration.errors import HemostatError, InvalidArgumentError
from hemostat_calibration.records import TokenRecord
from hemostat_calibration.statistics.confidence import ClippedMean

log = logging.getLogger("hemostat.alarm")

MAX_EVENTS = 100
STATE_KEY = "alarm"
"""Of the state in the store."""
SAVE_SECONDS = 60.0
"""Pause between writes of the state. After a restart, evidence since the last one is lost; no alpha is spent twice."""


class Alarms:
    """Lives in the control process's event loop.

    noise_floors: names of the models whose noise floors add up to the total; none: the floor is not measured, and the
        budget applies to the divergence itself.
    state_writes: for the state of the tests. event_writes: for each alarm that is raised or cleared. wall: Unix time.
    """

    def __init__(
        self,
        settings: config.Alarm,
        noise_floors: tuple[str, ...],
        state_writes: StoreWrites,
        event_writes: StoreWrites,
        wall: Callable[[], float],
    ) -> None:
        self._settings = alarm.Settings(
            alpha=settings.alpha,
            budget=settings.budget_nats,
            baseline_tokens=settings.baseline_tokens,
            clear_after=settings.clear_after,
        )
        self._state = alarm.init(self._settings)
        self._noise_floors = {model: ClippedMean(0.0, self._settings.cap) for model in noise_floors}
        self._state_writes = state_writes
        self._event_writes = event_writes
        self._wall = wall
        self._saved_at = wall()
        self._raised: dict[tuple[str, str], bool] = {}
        self.events: deque[dict[str, Any]] = deque(maxlen=MAX_EVENTS)

    def observe(self, record: TokenRecord, figures: TokenDivergence) -> None:
        """One scored request, its raw figures."""
        now = self._wall()
        observation = alarm.Observation(now, figures.kl_rc, alarm.spread(record))
        self._state = alarm.update(self._state, record.route, observation, self._noise_floor())
        for reading in alarm.readings(self._state):
            self._note(reading)
        if now - self._saved_at >= SAVE_SECONDS:
            self.save()

    def observe_noise_floor(self, model: str, figures: TokenDivergence) -> None:
        """The figures of a record with `model` on both sides."""
        if model in self._noise_floors:
            self._noise_floors[model] = self._noise_floors[model].update(figures.kl_rc)

    def _noise_floor(self) -> float:
        """Upper end of what noise adds to the divergence, half of the sum of the noise floors (two noisy computations
        are compared in each), nats; infinite while one is unknown: the budget test then waits."""
        # Each has its part of what the budget test spends on limits; see `alarm`.
        part = self._settings.alpha / (4.0 * max(len(self._noise_floors), 1))
        highs = [floor.get(part).high if floor.requests else math.inf for floor in self._noise_floors.values()]
        unknown = any(high >= floor.cap for high, floor in zip(highs, self._noise_floors.values(), strict=False))
        return math.inf if unknown else 0.5 * sum(highs)

    def _note(self, reading: alarm.Reading) -> None:
        key, raised = (reading.route, str(reading.kind)), reading.raised is not None
        if self._raised.get(key, False) != raised:
            why = f"{reading.kind} alarm {'raised' if raised else 'cleared'} on {reading.route}"
            event = {"at": self._wall(), "decision": "alarm", "version": "", "why": why, "evidence": to_json(reading)}
            self.events.append(event)
            log.warning("%s", why)
            self._event_writes.append_event(event)
        self._raised[key] = raised

    # --- what operators do -----------------------------------------------------------------------------------------

    def rebase(self, route: str) -> None:
        """The route learns a new baseline. HemostatError for a route without a scored request."""
        if route not in self._state.routes:
            known = ", ".join(sorted(self._state.routes)) or "none yet"
            raise HemostatError(f"route {route[:100]!r} is not watched; watched: {known}")
        self._state = alarm.rebase(self._state, route)
        for reading in alarm.readings(self._state):
            self._note(reading)
        self.save()

    # --- restarts --------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Queue a write of the state."""
        self._saved_at = self._wall()
        self._state_writes.set_state(STATE_KEY, alarm.save(self._state).decode())

    def restore(self, stored: str | None, events: list[dict[str, Any]], tests: int = 0) -> None:
        """Go on from what an earlier run stored. events: newest first. tests: how many had begun, where `stored` lacks
        them: the alpha that they spent is not spent again."""
        self.events.extend(reversed(events))
        if stored is None:
            self._state = alarm.init(self._settings, tests)
            return
        try:
            self._state = alarm.load(stored.encode(), self._settings)
        except InvalidArgumentError as error:
            log.error("stored alarm: %s", error)
            return
        self._raised = {(r.route, str(r.kind)): r.raised is not None for r in alarm.readings(self._state)}

    def forget(self) -> None:
        """The models are others: every baseline is learned anew. Alpha that was spent stays spent."""
        self._state = alarm.init(self._settings, self._state.tests)
        self._raised.clear()
        self.save()

    # --- what is shown ---------------------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """JSON-ready."""
        floor = self._noise_floor()
        return {
            "raised": any(self._raised.values()),
            "alpha": self._settings.alpha,
            "budget_nats": self._settings.budget,
            "floor_upper_nats": finite(floor),
            "clears_after_requests": self._settings.clear_after,
            "tests": [to_json(reading) for reading in alarm.readings(self._state)],
            "events": list(reversed(self.events)),
        }

    def samples(self) -> Iterator[Sample]:
        for reading in alarm.readings(self._state):
            labels = str(reading.kind), reading.route
            yield Sample(names.HEMORRHAGE_ALARM, labels, float(reading.raised is not None))
            yield Sample(names.HEMORRHAGE_EVIDENCE_RATIO, labels, _part(reading))
            if reading.kind is alarm.Kind.CHANGE:
                yield Sample(names.ALARM_BASELINE_RATIO, (reading.route,), reading.learning)


def _part(reading: alarm.Reading) -> float:
    if not math.isfinite(reading.alpha):
        return 0.0
    return max(reading.log_evidence, 0.0) / math.log(2.0 / reading.alpha)


def to_json(reading: alarm.Reading) -> dict[str, Any]:
    """JSON-ready: `since`, `at` are Unix times of the request with which the evidence began, and completed it."""
    crossing = reading.raised
    return {
        "route": reading.route,
        "test": str(reading.kind),
        "raised": crossing is not None,
        "since": crossing.since if crossing else None,
        "at": crossing.at if crossing else None,
        "on_requests": crossing.requests if crossing else None,
        "on_tokens": crossing.tokens if crossing else None,
        "learning": reading.learning,
        "evidence": _part(reading),
        "alpha": finite(reading.alpha),
        "requests": reading.requests,
        "tokens": reading.tokens,
    }
