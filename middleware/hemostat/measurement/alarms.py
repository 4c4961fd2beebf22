"""The hemorrhage alarm while serving: feeds its tests, reports them, and logs and stores every change.

Two tests (see `hemostat_calibration.alarm`): *budget*, in each kind of traffic, the divergence beyond the noise floor
exceeds `alarm.budget_nats`; *change*, over all kinds, requests differ from the first `alarm.baseline_requests` of their
kinds. `alarm.alpha` is the false-alarm probability of all of them together in a week. In addition, the mix of kinds is
compared with what it was: information about the traffic, and no alarm.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hemostat.config import schema as config
from hemostat.ipc.messages import REST_KIND
from hemostat.measurement.dependence import Cycle, Dependence, DependenceState, inflation_samples, told
from hemostat.measurement.figures import finite
from hemostat.metrics import names
from hemostat.metrics.samples import Sample
from hemostat.store.protocol import StateKey, StoreWrites, alarm_event
from hemostat.store.spent_alpha import OTHERS, SpentAlpha
from hemostat_calibration import alarm
from hemostat_calibration.arrays import Floats
from hemostat_calibration.divergence.per_token import TokenDivergence
from hemostat_calibration.elapsed import TimeBreak
from hemostat_calibration.errors import HemostatError, InvalidArgumentError
from hemostat_calibration.records import TokenRecord
from hemostat_calibration.state_codec import decode, encode
from hemostat_calibration.statistics.confidence import ClippedMean

log = logging.getLogger("hemostat.alarm")

MAX_EVENTS = 100
ALL_KINDS = "all"
"""The name of the change test, which is of all kinds together."""
STATE_KEY = StateKey("alarm")
"""The key of the alarm's state in the store."""
SPENT_KEY = StateKey("alarm.tests")
"""The store's key of the largest number of tests of any sort that have begun (`SpentAlpha`)."""
SAVE_SECONDS = 60.0
"""The longest pause between writes of the state. After a restart, evidence since the last one is lost. A test that
begins is written at once: no alpha is spent twice."""


FLOORS_KEY = StateKey("noise_floors")
"""The key of the noise floors in the store: a budget test waits for them, and they take a cycle of the traffic."""
FLOORS_SCHEMA = 1


@dataclass(frozen=True, slots=True)
class FloorState:
    """The state of one model's noise floor."""

    mean: ClippedMean
    dependence: DependenceState


@dataclass(frozen=True, slots=True)
class FloorsState:
    """The noise floors, by model."""

    floors: Mapping[str, FloorState]


class FloorLimit:
    """The limit of one model's divergence from itself, with how much the requests that it was measured on depend on
    each other. cap: nats, where divergences are clipped.
    """

    def __init__(self, cap: float, cycle: Cycle) -> None:
        self._mean = ClippedMean(0.0, cap)
        self._dependence = Dependence(1, cycle)
        self._inflation = math.inf
        """The v̂ after the last request: its computation takes too long for every scored record that needs a limit."""

    def update(self, divergences: Floats, client: bytes) -> None:
        """Adds one request's KL by token, in nats. client: the digest of whom it is from."""
        values = np.clip(divergences[~np.isnan(divergences)], 0.0, self._mean.cap)
        self._mean = self._mean.update(values)
        self._dependence.update(np.array([values.sum()]), np.array([float(len(values))]), client)
        self._inflation = self._dependence.inflation()

    @property
    def state(self) -> FloorState:
        """Returns what is known, to be stored."""
        return FloorState(self._mean, self._dependence.state)

    def restore(self, state: FloorState) -> None:
        """Goes on from there. Raises InvalidArgumentError if it does not fit."""
        if (state.mean.lo, state.mean.cap) != (self._mean.lo, self._mean.cap):
            raise InvalidArgumentError("the stored noise floor has another range")
        self._dependence.restore(state.dependence)
        self._mean, self._inflation = state.mean, self._dependence.inflation()

    def limit(self, alpha: float) -> float:
        """Returns the upper end of its interval, asymptotic; infinite while it is not known, or v̂ is not."""
        high = self._mean.get(alpha, self._inflation).high
        return high if high < self._mean.cap else math.inf


class Alarms:
    """Lives in the control process's event loop.

    noise_floors: names of the models whose noise floors add up to the total; none: the floor is not measured, and the
        budget applies to the divergence itself.
    wall: Unix time. cycle: of the traffic, seconds.
    """

    def __init__(
        self,
        settings: config.Alarm,
        noise_floors: tuple[str, ...],
        writes: StoreWrites,
        wall: Callable[[], float],
        cycle: float = 0.0,
    ) -> None:
        self._settings = alarm.Settings(
            alpha=settings.alpha,
            budget=settings.budget_nats,
            baseline_requests=settings.baseline_requests or 0,
            cycle=cycle,
            tolerance=settings.tolerance,
            clear_after=settings.clear_after,
        )
        self._state = alarm.init(self._settings)
        self._cycle = Cycle(cycle, wall)
        self._noise_floors = {model: FloorLimit(self._settings.cap, self._cycle) for model in noise_floors}
        self._writes = writes
        self._spent = SpentAlpha(SPENT_KEY, writes)
        self._wall = wall
        self._saved_at = wall()
        self._raised: set[tuple[str, str]] = set()
        """The tests that have raised the alarm: their names, and the kinds."""
        self.events: deque[dict[str, Any]] = deque(maxlen=MAX_EVENTS)

    def update(self, record: TokenRecord, figures: TokenDivergence) -> None:
        """Observes one scored request that is a unit of its own, its raw figures.

        One of an adapter counts in the mix of kinds only: it says nothing of the compressed model.
        """
        now, kind = self._wall(), record.kind or REST_KIND
        if record.adapter is not None:
            self._state = alarm.update_workload(self._state, kind, now)
            return
        observation = alarm.Observation(now, figures.kl_rc, alarm.spread(record), pooled=kind == REST_KIND)
        begun = _begun(self._state)
        self._state = alarm.update(self._state, kind, observation, self._noise_floor())
        self._spent.spend({OTHERS: self._state.begun})
        # What a test shows before its number is stored is said once it is.
        changed = self._spent.is_stored(self._state.begun) and self._note_changes()
        if changed or _begun(self._state) > begun or now - self._saved_at >= SAVE_SECONDS:
            self.save()

    def update_noise_floor(self, model: str, divergences: Floats, client: bytes = b"") -> None:
        """Observes the KL by token, in nats, of a record with `model` on both sides. client: the digest of whom it is
        from.
        """
        if model in self._noise_floors:
            self._noise_floors[model].update(divergences, client)

    def _noise_floor(self) -> float:
        """Returns the upper end of what noise adds to the divergence, half of the sum of the noise floors (two noisy
        computations are compared in each), nats; infinite while one is unknown: the budget test then waits.

        It is asymptotic: a limit that holds for any noise would have to allow for bursts that no request has met yet,
        log(1/alpha)/n of the requests at the cap: with 50 requests 0.7 nats, more than any budget."""
        # Each has its part of what the budget test spends on limits; see `alarm`.
        part = self._settings.half_share / max(len(self._noise_floors), 1)
        return 0.5 * sum(floor.limit(part) for floor in self._noise_floors.values())

    def _note_changes(self) -> bool:
        """Stores an event for each alarm that was raised, cleared, or ended with its test. Returns True if there was
        any: then the state has to be stored, too."""
        now = {_key(reading): reading for reading in alarm.readings(self._state)}
        before, self._raised = self._raised, {key for key, reading in now.items() if reading.raised is not None}
        for test, kind in sorted(before ^ self._raised):
            reading = now.get((test, kind))
            state = "raised" if (test, kind) in self._raised else "cleared" if reading is not None else "ended"
            why = f"{test} alarm {state}" + (f" on {kind}" if kind else "")
            if reading is None:
                why += ": nothing tests it any more (other settings, or no requests of this kind)"
                reading = alarm.Reading(alarm.AlarmTest(test), kind, None, 0.0, math.nan, 0, 0, 0)
            self._record(why, to_json(reading))
        return before != self._raised

    def after_break(self, time_break: TimeBreak) -> None:
        """Notes that the clock was set."""
        self._cycle.after_break(time_break)
        self._state = alarm.after_break(self._state, time_break)
        self._saved_at = time_break.seen(self._saved_at)

    def record_event(self, why: str) -> None:
        """Stores an event that is no alarm, but says why what was measured begins anew."""
        self._record(why, {})

    def _record(self, why: str, evidence: dict[str, Any]) -> None:
        event = alarm_event(self._wall(), why, evidence)
        self.events.append(event)
        log.warning("%s", why)
        self._writes.append_event(event)

    # --- what operators do -----------------------------------------------------------------------------------------

    def rebase(self, kind: str | None = None) -> None:
        """Makes the kind, or each kind, learn a new baseline, and ends its alarms. Raises HemostatError for a kind
        without a scored request."""
        if kind is not None and kind not in self._state.kinds:
            known = ", ".join(sorted(self._state.kinds)) or "none yet"
            raise HemostatError(f"kind {kind[:100]!r} is not watched; watched: {known}")
        self._state = alarm.rebase(self._state, kind)
        self._note_changes()
        self.save()

    def forget(self) -> None:
        """Forgets all, since other models are served or compared: nothing that was learned holds. Spent alpha stays
        spent."""
        self._state = alarm.init(self._settings, self._state.begun)
        self._noise_floors = {model: FloorLimit(self._settings.cap, self._cycle) for model in self._noise_floors}
        self._note_changes()
        self.save()

    # --- restarts --------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Queues a write of the state."""
        self._saved_at = self._wall()
        self._writes.set_state(STATE_KEY, alarm.save(self._state).decode())
        if self._noise_floors:
            floors = FloorsState({model: floor.state for model, floor in self._noise_floors.items()})
            self._writes.set_state(FLOORS_KEY, encode(floors, FLOORS_SCHEMA).decode())

    def restore(
        self,
        stored: str | None,
        events: list[dict[str, Any]],
        spent: str | None = None,
        floors: str | None = None,
    ) -> None:
        """Goes on from what an earlier run stored. events: newest first. spent: under SPENT_KEY, which versions before
        it have not written. floors: under FLOORS_KEY, likewise."""
        self.events.clear()
        self.events.extend(reversed(events))
        self._spent.restore(spent)
        if floors is not None:
            self._restore_floors(floors)
        if stored is None:
            self._state = alarm.init(self._settings, self._spent.get())
            return
        self._spent.spend({OTHERS: alarm.begun_tests(stored.encode())})
        try:
            before = alarm.read(stored.encode())
        except InvalidArgumentError as error:
            self._state = alarm.init(self._settings, self._spent.get())
            self._raised = set()
            self._record(f"the stored alarm cannot be continued: {error}", {})
            self.save()
            return
        self._raised = {_key(reading) for reading in alarm.readings(before) if reading.raised is not None}
        self._state = alarm.with_settings(before, self._settings)
        if self._note_changes() or before.settings != self._settings:
            self.save()

    def _restore_floors(self, stored: str) -> None:
        try:
            states = decode(FloorsState, stored.encode(), FLOORS_SCHEMA).floors
            for model in self._noise_floors.keys() & states.keys():
                self._noise_floors[model].restore(states[model])
        except InvalidArgumentError as error:
            log.warning("the stored noise floors cannot be continued, and are measured anew: %s", error)

    # --- what is shown ---------------------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """Returns the state of the alarm, JSON-ready."""
        return {
            "raised": bool(self._raised),
            "alpha": self._settings.alpha,
            "budget_nats": self._settings.budget,
            "floor_upper_nats": finite(self._noise_floor()),
            "tolerance": self._settings.tolerance,
            "clears_after_requests": self._settings.clear_after,
            "waits_for": self._waits_for(),
            "tests": [to_json(reading) for reading in alarm.readings(self._state)],
            "kinds": [
                {
                    "kind": reading.kind,
                    "baseline_requests": reading.baseline_requests,
                    "watched": reading.watched,
                    **told(reading.baseline_requests, reading.inflation),
                    "spread_ratio": reading.spread_ratio,
                    "baseline_share": reading.baseline_share,
                }
                for reading in alarm.kind_readings(self._state)
            ],
            "workload": self._workload(),
            "events": list(reversed(self.events)),
        }

    def raised(self) -> list[alarm.Reading]:
        """Returns the tests that have raised the alarm."""
        if not self._raised:
            return []
        return [reading for reading in alarm.readings(self._state) if reading.raised is not None]

    def _waits_for(self) -> list[str]:
        """Returns what tests still need before they can raise an alarm, in words."""
        needed = self._settings.baseline_requests
        waits = [
            _waits(reading, needed, self._settings.cycle, self._wall())
            for reading in alarm.kind_readings(self._state)
            if not reading.watched and reading.kind != REST_KIND
        ]
        if self._settings.budget is not None and not math.isfinite(self._noise_floor()):
            waits.append("noise floor, for the budget test")
        return waits

    def _workload(self) -> dict[str, Any]:
        """Returns the mix of kinds against the mix of the baseline: information, no alarm. spread_ratio: over all
        kinds, weighted back to the mix of the baseline.
        """
        mix = self._state.workload
        return {
            "baseline_requests": sum(mix.baseline.values()),
            "baseline_needed": mix.size,
            "changed": mix.changed(self._settings.alpha),
            "distance": mix.distance,
            "spread_ratio": alarm.weighted_spread_ratio(self._state),
        }

    def _learned(self, kind: alarm.KindReading) -> float:
        """Returns the part of the kind's baseline that is learned; 1 only if the kind is watched."""
        if kind.watched:
            return 1.0
        needed = self._settings.baseline_requests
        parts = [kind.baseline_requests / needed]
        if parts[0] >= 1.0:
            parts.append(kind.baseline_requests / kind.inflation / (alarm.EFFECTIVE_SHARE * needed))
        if self._settings.cycle:
            parts.append((self._wall() - kind.since) / self._settings.cycle)
        return min(*parts, 0.99)

    def samples(self) -> Iterator[Sample]:
        for reading in alarm.readings(self._state):
            labels = str(reading.test), reading.kind or ALL_KINDS
            yield Sample(names.HEMORRHAGE_ALARM, labels, float(reading.raised is not None))
            yield Sample(names.HEMORRHAGE_EVIDENCE_RATIO, labels, _part(reading))
        for kind in alarm.kind_readings(self._state):
            if kind.kind != REST_KIND:
                yield Sample(names.ALARM_BASELINE_RATIO, (kind.kind,), self._learned(kind))
                yield from inflation_samples(kind.kind, "spread", kind.baseline_requests, kind.inflation)
            if kind.spread_ratio is not None:
                yield Sample(names.ALARM_SPREAD_RATIO, (kind.kind,), kind.spread_ratio)
        if (ratio := alarm.weighted_spread_ratio(self._state)) is not None:
            yield Sample(names.ALARM_SPREAD_RATIO, (ALL_KINDS,), ratio)
        if (distance := self._state.workload.distance) is not None:
            yield Sample(names.WORKLOAD_CHANGED, (), float(self._state.workload.changed(self._settings.alpha)))
            yield Sample(names.WORKLOAD_DISTANCE_RATIO, (), distance)


def _key(reading: alarm.Reading) -> tuple[str, str]:
    return str(reading.test), reading.kind


def _begun(state: alarm.Alarm) -> int:
    """Returns the number of all begun tests and baselines that take a part of alpha."""
    return state.budget_tests + state.change_tests + state.baselines


def _waits(reading: alarm.KindReading, needed: int, cycle: float, now: float) -> str:
    if reading.baseline_requests >= needed and now - reading.since < cycle:
        hours = (now - reading.since) / 3600.0
        return f"baseline of {reading.kind!r}: requests of {hours:.1f} of {cycle / 3600.0:.1f} h (evidence.cycle_hours)"
    if reading.baseline_requests < needed:
        return f"baseline of {reading.kind!r}: {reading.baseline_requests} of {needed} requests"
    effective = reading.baseline_requests / reading.inflation
    return (
        f"baseline of {reading.kind!r}: {reading.baseline_requests} requests that depend on each other are about "
        f"{effective:.0f} effective ones, of {alarm.EFFECTIVE_SHARE * needed:.0f}"
    )


def _part(reading: alarm.Reading) -> float:
    if not math.isfinite(reading.alpha):
        return 0.0
    return max(reading.log_evidence, 0.0) / -math.log(reading.alpha)


def to_json(reading: alarm.Reading) -> dict[str, Any]:
    """Returns the reading, JSON-ready: `since`, `at` are Unix times of the request with which the evidence began, and
    completed it."""
    crossing = reading.raised
    return {
        "test": str(reading.test),
        "kind": reading.kind or ALL_KINDS,
        "begun": reading.number > 0,
        "raised": crossing is not None,
        "since": crossing.since if crossing else None,
        "at": crossing.at if crossing else None,
        "on_requests": crossing.requests if crossing else None,
        "on_tokens": crossing.tokens if crossing else None,
        "evidence": _part(reading),
        "alpha": finite(reading.alpha),
        "requests": reading.requests,
        "tokens": reading.tokens,
    }
