"""Outcomes of answers by kind of traffic and arm: what relays report, what it proves, and what follows. In each kind
one trial runs (`hemostat_calibration.outcomes`), for the version that serves there now. A conversation counts once in
each kind, with its first complete answer; if there are more answers than are reported, the answers of a random part of
the conversations count (`outcome_sampling`). Proven harm takes the profile from that kind, whatever the divergence
says, and the kind stays at identity until an operator releases it.
"""

from __future__ import annotations

import json
import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Protocol

from hemostat.ipc.messages import OutcomeReport
from hemostat.measurement.figures import finite
from hemostat.measurement.outcome_sampling import MAX_SEEN, OutcomeSampling
from hemostat.metrics import names
from hemostat.metrics.samples import Sample
from hemostat.store.protocol import StateKey, StoreWrites
from hemostat.store.spent_alpha import SpentAlpha
from hemostat.store.states import read_state, write_state
from hemostat_calibration.elapsed import TimeBreak
from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.outcomes import LENGTH, Outcome, Reading, Settings, Trial, Unit

log = logging.getLogger("hemostat.outcomes")

STATE_KEY = StateKey("outcomes")
"""The key of the trials' state in the store."""
SPENT_KEY = StateKey("outcomes.trials")
"""The store's key of the numbers of the trials, by kind (`SpentAlpha`)."""
SAVE_SECONDS = 60.0
"""The pause between writes of the state. After a restart, units since the last one are lost."""
_SEEN_BYTES = 6
SCHEMA = 1
_OUTCOMES = frozenset(outcome.value for outcome in Outcome)


class ServedKinds(Protocol):
    """The part of the profiles that outcomes read, and what they do to it."""

    def kinds(self) -> Collection[str]:
        """Returns the names of the kinds that are served and compared by themselves, the one for all others
        included."""

    def version(self, kind: str) -> str | None:
        """Returns the version that serves the kind now; None for identity."""

    def is_operators(self, kind: str) -> bool:
        """Returns True if only an operator changes what serves the kind: it is held at identity, or its profile is
        pinned.
        """

    def leave(self, kind: str, why: str, evidence: dict[str, Any]) -> None:
        """Takes the profile from the kind, and holds the kind at identity, unless it is pinned. evidence:
        JSON-ready."""


@dataclass(slots=True)
class _Kind:
    """The trials of one kind. number: the number of trials that have begun in this kind. trial: the trial that runs.
    harmed: what was proven, JSON-ready, while the kind is held for it."""

    number: int = 0
    trial: Trial | None = None
    harmed: dict[str, Any] | None = None
    changed: bool = False
    """It is True if units were counted since the last check."""
    readings: tuple[int, list[Reading]] = (-1, [])
    """The number of the trial's units, and its readings at that moment."""


@dataclass(frozen=True, slots=True)
class _StoredKind:
    """A `_Kind` as it is stored. trial: `Trial.save`."""

    number: int
    trial: Mapping[str, Any] | None
    harmed: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class _Stored:
    """The state as it is stored.

    sampling: the parts of the conversations that are reported and counted. begun: the numbers of the trials that have
    begun in other kinds. seen: the digests of conversations, which have been seen longest ago at the beginning.
    """

    control_fraction: float
    sampling: tuple[float, float]
    kinds: Mapping[str, _StoredKind]
    begun: Mapping[str, int]
    seen: Mapping[bytes, None]


class Outcomes:
    """Lives in the control process's event loop.

    control_fraction: of conversations; a stored state with another one is not used, because a comparison whose arms
    change their share is distorted where the traffic changes too. wall: Unix time.
    """

    def __init__(
        self,
        client_share: float,
        control_fraction: float,
        served: ServedKinds,
        writes: StoreWrites,
        wall: Callable[[], float],
        sampling: OutcomeSampling,
    ) -> None:
        self._settings = Settings(client_share=client_share)
        self._control_fraction = control_fraction
        self._served = served
        self._writes = writes
        self._wall = wall
        self._sampling = sampling
        self._saved_at = wall()
        self._kinds: dict[str, _Kind] = {}
        self._spent = SpentAlpha(SPENT_KEY, writes)
        """The numbers of the trials that have begun, by kind."""
        self._seen: OrderedDict[bytes, None] = OrderedDict()

    # --- evidence --------------------------------------------------------------------------------------------------

    def update(self, report: OutcomeReport) -> None:
        """Receives one answer, as a relay has judged it. Reports of a version that does not serve the kind now are
        ignored."""
        kind = report.kind
        if kind not in self._served.kinds() or self._served.version(kind) != report.version:
            return
        if not self._is_first(kind, report.conversation) or report.drawn >= self._sampling.counted:
            return
        state = self._kinds.get(kind)
        if state is None:
            state = self._kinds[kind] = _Kind(self._spent.get(kind))
        if state.harmed is not None:
            return
        if state.trial is None or state.trial.version != report.version:
            state.number = self._spent.get(kind) + 1
            state.trial = Trial(self._settings, report.version, state.number)
            self._spent.spend({kind: state.number})
        bad = {Outcome(name): value for name, value in report.bad.items() if name in _OUTCOMES}
        unit = Unit(report.client, report.treated, bad, report.output_tokens)
        if not state.trial.update(unit):
            return
        state.changed = True

    def _is_first(self, kind: str, conversation: bytes) -> bool:
        """Returns True if the conversation has not been seen in this kind; one that is not recognized never has."""
        if not conversation:
            return True
        key = blake2b(conversation + kind.encode(), digest_size=_SEEN_BYTES).digest()
        if key in self._seen:
            self._seen.move_to_end(key)
            return False
        self._seen[key] = None
        if len(self._seen) > MAX_SEEN:
            self._seen.popitem(last=False)
        return True

    def sample(self, requests_per_second: float, now: float) -> None:
        """Adapts what is reported and counted to the traffic; see `OutcomeSampling.update`. Call it regularly."""
        if self._sampling.update(requests_per_second, now):
            self.save()  # else a restart could count conversations that are not counted now

    def check(self) -> None:
        """Does what is due because of new units, or because time has passed. Call it regularly."""
        followed = set(self._served.kinds())
        for kind in [kind for kind in self._kinds if kind not in followed]:
            self._drop(kind)
        for kind, state in self._kinds.items():
            if state.harmed is not None and not self._served.is_operators(kind):
                state.harmed = None  # an operator has released or unpinned the kind
            if state.changed and self._spent.is_stored(state.number, kind):
                state.changed = False
                self._judge(kind, state)
        if self._wall() - self._saved_at >= SAVE_SECONDS:
            self.save()

    def _drop(self, kind: str) -> None:
        """Forgets what was counted in a kind; the trials that have begun there stay counted."""
        del self._kinds[kind]

    def _judge(self, kind: str, state: _Kind) -> None:
        trial = state.trial
        if trial is None or self._served.version(kind) != trial.version:
            return
        harm = trial.harm()
        if harm is None:
            return
        # The trial is over: the version may serve here again only by an operator's decision, and in a new trial.
        state.trial = None
        state.harmed = {"at": self._wall(), "version": trial.version, **to_json(harm)}
        why = _sentence(harm)
        log.warning("%s: profile %s leaves this kind: %s", kind, trial.version, why)
        self._served.leave(kind, why, {**to_json(harm), "trial": trial.number, "alpha": trial.alpha})
        self.save()

    # --- restarts --------------------------------------------------------------------------------------------------

    def after_break(self, time_break: TimeBreak) -> None:
        """Notes that the clock was set. Trials count units, and no time."""
        self._saved_at = time_break.seen(self._saved_at)

    def forget(self) -> None:
        """Forgets all, since the models are others: all that was counted is about something else. Alpha that was spent
        stays spent."""
        for kind in list(self._kinds):
            self._drop(kind)
        self._seen.clear()

    def save(self) -> None:
        """Queues a write of the state: at most 15 kB for each kind, and 400 kB for the conversations."""
        self._saved_at = self._wall()
        kinds = {
            kind: _StoredKind(state.number, None if state.trial is None else state.trial.save(), state.harmed)
            for kind, state in self._kinds.items()
        }
        state = _Stored(
            self._control_fraction,
            (self._sampling.reported, self._sampling.counted),
            kinds,
            {kind: number for kind, number in self._spent.counts.items() if kind not in kinds},
            self._seen,
        )
        write_state(self._writes, STATE_KEY, state, SCHEMA)

    def restore(self, states: Mapping[StateKey, str | None], report: Callable[[str], None]) -> None:
        """Goes on from what an earlier run stored. Versions before SPENT_KEY have stored the numbers of trials with the
        state. report: see `read_state`."""
        self._spent.restore(states.get(SPENT_KEY))
        self._spent.spend(_numbers(states.get(STATE_KEY) or ""))
        state = read_state(states, STATE_KEY, _Stored, SCHEMA, report)
        if state is None:
            return
        same = state.control_fraction == self._control_fraction
        try:
            kinds = {kind: self._load_kind(saved, same) for kind, saved in state.kinds.items()}
            self._sampling.restore(*state.sampling)
        except (ValueError, InvalidArgumentError) as error:
            report(f"what is stored as {STATE_KEY} cannot be read, and begins anew: {error}")
            return
        if not same:
            log.warning("stored outcomes are of another calibration.control_fraction: their units do not count")
        self._kinds = kinds
        self._seen = OrderedDict(state.seen)

    def _load_kind(self, saved: _StoredKind, same_arms: bool) -> _Kind:
        return _Kind(
            number=saved.number,
            trial=Trial.load(saved.trial, self._settings) if same_arms and saved.trial is not None else None,
            harmed=None if saved.harmed is None else dict(saved.harmed),
            changed=True,
        )

    # --- what is shown ---------------------------------------------------------------------------------------------

    def harmed(self) -> dict[str, dict[str, Any]]:
        """Returns the kinds that are held because an outcome was harmed -> what was proven there, JSON-ready."""
        return {
            kind: state.harmed
            for kind, state in self._kinds.items()
            if state.harmed is not None and self._served.is_operators(kind)
        }

    def report(self) -> dict[str, Any]:
        """Returns the state of all trials, JSON-ready."""
        return {
            "counted": self._sampling.counted,
            "alpha": self._settings.alpha,
            "margin": self._settings.margin,
            "length_margin": self._settings.length_margin,
            "client_share": self._settings.client_share,
            "kinds": [self._kind_json(kind, state) for kind, state in sorted(self._kinds.items())],
        }

    def _kind_json(self, kind: str, state: _Kind) -> dict[str, Any]:
        trial = state.trial
        shown: dict[str, Any] = {"kind": kind, "trial": state.number, "harmed": state.harmed}
        if trial is None:
            return {**shown, "version": None, "units": 0, "outcomes": []}
        return {
            **shown,
            "version": trial.version,
            "units": trial.units,
            "refused": trial.refused,
            "client_share_active": trial.limits_clients,
            "alpha": trial.alpha,
            "length_cap": trial.cap,
            "outcomes": [to_json(reading) for reading in self._readings(state, trial)],
        }

    @staticmethod
    def _readings(state: _Kind, trial: Trial) -> list[Reading]:
        if state.readings[0] != trial.units:
            state.readings = trial.units, trial.readings()
        return state.readings[1]

    def samples(self) -> Iterator[Sample]:
        for kind, state in self._kinds.items():
            yield Sample(names.OUTCOME_HARM, (kind,), float(state.harmed is not None))
            if state.trial is None:
                continue
            for reading in self._readings(state, state.trial):
                result = reading.difference
                for edge, value in (("mean", result.mean), ("low", result.low), ("high", result.high)):
                    if math.isfinite(value):
                        yield Sample(names.OUTCOME_DIFFERENCE, (kind, reading.outcome, edge), value)


def _numbers(stored: str) -> dict[str, int]:
    """Returns the numbers of the trials in a stored state, of whatever format."""
    try:
        state = json.loads(stored)
        state = state.get("state", state)  # before schemas there was no `state`
        named = {**state.get("begun", {}), **{kind: saved["number"] for kind, saved in state["kinds"].items()}}
        return {kind: number for kind, number in named.items() if type(number) is int}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def to_json(reading: Reading) -> dict[str, Any]:
    """Returns the reading, JSON-ready: what is infinite or unknown is None."""
    result = reading.difference
    return {
        "outcome": reading.outcome,
        "control": {"units": reading.control_units, "value": finite(reading.control)},
        "treated": {"units": reading.treated_units, "value": finite(reading.treated)},
        "difference": finite(result.mean),
        "interval": [finite(result.low), finite(result.high)],
        "evidence": reading.evidence,
    }


def _sentence(harm: Reading) -> str:
    """Returns the harm in words, for people."""
    arms = f"{harm.treated_units} treated and {harm.control_units} control conversations"
    if harm.outcome == LENGTH:
        return (
            f"answers have a mean length of {harm.treated:.1f} tokens with the profile and {harm.control:.1f} without, "
            f"of {arms}"
        )
    return f"{harm.outcome} is bad in {harm.treated:.1%} with the profile and {harm.control:.1%} without, of {arms}"
