"""Held-out evidence, by kind of traffic: candidates against what serves there, and what serves there against identity.

The gain is of the models' own distributions on the tokens at hand, whatever arm they came from: both alternatives are
computed on the same tokens, so that nothing depends on which requests were assigned to which arm. Whether a record
counts is decided before its gain is looked at.

Where an adapter is on either side, the gain is in total variation, from exact distances that copies of the
models have computed on the record's tokens (`TokenRecord.distances`); a record without them does not count there. Why
not KL: see `hemostat_calibration.guard.decisions.Figure`. Elsewhere a record of an adapter does not count: its lists
are of another model than the one that the others change.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from hemostat.profiles.candidates import Candidate
from hemostat.profiles.catalogue import Catalogue
from hemostat.profiles.decisions import Reason, evidence_json
from hemostat.profiles.futility import why_hopeless
from hemostat.profiles.gains import Gains, UnitGain
from hemostat.profiles.guard_keys import WATCH
from hemostat.profiles.lifecycle import Lifecycle
from hemostat.profiles.serving import ServingState
from hemostat.profiles.trials import Trials
from hemostat.scored_record import ScoredRecord
from hemostat_calibration.arrays import Floats
from hemostat_calibration.divergence.gain import Gain
from hemostat_calibration.guard import decisions as guard_decisions
from hemostat_calibration.guard.decisions import Admission, Figure
from hemostat_calibration.profiles.profile import IDENTITY, CalibrationProfile
from hemostat_calibration.profiles.transform import anchor_set
from hemostat_calibration.records import ExactDistances, TokenRecord
from hemostat_calibration.statistics.split import held_out

ROLL_BACK_TEXTS = {
    guard_decisions.Reason.HARM: "its gain on held-out requests of this kind is below zero",
    guard_decisions.Reason.UNSUPPORTED: "its gain was not proven again within the window",
}

MAX_IDENTITY_NORMALIZER_NATS = 1e-4
"""A row's log-normalizer is within this of 0 where the engine applied nothing to the row."""


def is_held_out(record: TokenRecord, fraction: float) -> bool:
    """Returns True if the record's unit is judged by; then nothing is ever learned from it."""
    return held_out(record.unit, fraction)


def gain_interval(record: TokenRecord, profile: CalibrationProfile, gain: Gain) -> tuple[float, float] | None:
    """Returns the mean gain of a profile over identity on one request's tokens, nats, as an interval; None if
    nothing is known of it.

    Left out are requests for which the engine reported other profiles but not this one (it evaluates some at a time,
    and may not hold it yet), and tokens that the profile's family has to leave out. Neither depends on what the gain
    was.
    """
    shift = record.shifts.get(profile.version)
    normalizer = np.full(record.tokens, np.nan) if shift is None else shift.log_normalizer
    if record.engine_boot and np.isnan(normalizer).all() and not gain.exact.any():
        return None
    ends = token_gains(record, profile, gain, normalizer)
    return None if ends is None else (float(ends[0].mean()), float(ends[1].mean()))


def token_gains(
    record: TokenRecord, profile: CalibrationProfile, gain: Gain, normalizer: Floats
) -> tuple[Floats, Floats] | None:
    """Returns the lower and the upper ends of the gain at the tokens that are evidence, nats, [S] each with S ≤ T; None
    if no token is.

    normalizer: float64 [T], NaN where the engine gave none.

    If the profile reads anchors, tokens whose features were lost are left out. If an anchor is masked, the engine
    applies nothing, and the gain is 0.

    For an adapter it is always None: what an adapter does to the weights does not follow from a record of the
    compressed model. Its evidence, and the evidence of whatever is compared with it, is the total variation in
    `TokenRecord.distances` (`hemostat_calibration.guard.decisions.Figure`).
    """
    if profile.changes_weights:
        return None
    read = anchor_set(profile)
    if not read:
        return gain.lower, gain.upper
    features = record.features
    has_features: npt.NDArray[np.bool_] = np.zeros(record.tokens, dtype=np.bool_)
    if features is not None and features.anchors == read:
        has_features = ~np.isnan(features.values.sum(axis=1))
    not_applied = ~has_features & ~gain.exact & (np.abs(normalizer) < MAX_IDENTITY_NORMALIZER_NATS)
    known = has_features | gain.exact | not_applied
    if not known.any():
        return None
    return np.where(not_applied, 0.0, gain.lower)[known], np.where(not_applied, 0.0, gain.upper)[known]


def distance_gain(before: ExactDistances, after: ExactDistances) -> UnitGain:
    """Returns the exact gain of the second model over the first, on average over one request's tokens.

    If the second gives no distribution at a token, its total variation is 1 and the loss in KL infinite. If only the
    first gives none, nothing is gained in KL.

    >>> base = ExactDistances(np.array([0.6, 0.4]), np.array([0.3, 0.2]), np.array([False, True]))
    >>> adapted = ExactDistances(np.array([0.2, 0.2]), np.array([0.1, 0.1]), np.array([True, True]))
    >>> figures = distance_gain(base, adapted)
    >>> round(figures.lower, 6), round(figures.kl, 6)
    (0.15, 0.3)
    """
    gain = float((before.tv - after.tv).mean())
    with np.errstate(invalid="ignore"):
        of_kl = np.where(np.isinf(after.kl), -np.inf, np.where(np.isinf(before.kl), 0.0, before.kl - after.kl))
    return UnitGain(gain, gain, float(of_kl.mean()))


class Judge:
    """Turns held-out units into promotions, drops and rollbacks, each in the record's own kind. wall: Unix seconds."""

    def __init__(
        self,
        wall: Callable[[], float],
        *,
        catalogue: Catalogue,
        serving: ServingState,
        trials: Trials,
        lifecycle: Lifecycle,
        gains: Gains,
    ) -> None:
        self._wall = wall
        self._catalogue = catalogue
        self._serving = serving
        self._trials = trials
        self._lifecycle = lifecycle
        self._gains = gains

    def update(self, unit: ScoredRecord) -> None:
        """Judges by one held-out record, whose kind is followed or is the rest."""
        if unit.fresh:
            self._lifecycle.update_units(unit.record.kind)
        self._judge(unit)
        self._trials.update_seen()
        for candidate in self._trials.tested:
            self._give_way(candidate)

    def _judge(self, unit: ScoredRecord) -> None:
        record, now = unit.record, self._wall()
        watched = self._trials.admit(WATCH, record) is Admission.ADMITTED
        admissions = {candidate: self._trials.admit(candidate.test, record) for candidate in self._trials.tested}
        met = [c for c, admission in admissions.items() if admission in (Admission.ADMITTED, Admission.CLIENT_SHARE)]
        # A test may be full before it is known how much units depend on each other.
        full = [c for c, admission in admissions.items() if admission is Admission.FULL]
        selected = self._serving.kinds[record.kind].version
        # All of them count the unit before anything is decided: a decision ends other tests of this kind.
        if watched and selected is not None:
            over_identity = self._gain(unit, selected, None)
            watched = over_identity is not None
            if over_identity is not None:
                self._trials.update(WATCH, record, over_identity, now)
        counted = [c for c in met if self._count(c, unit, selected, admissions[c], now)]
        for candidate in full if unit.fresh else ():
            gain = self._gain(unit, candidate.version, selected)
            if gain is not None:
                self._trials.update_gain(candidate.test, record, gain, now)
        if watched and self._judge_serving(record.kind):
            return
        self._promote_best(counted + full, record.kind)

    def _count(
        self, candidate: Candidate, unit: ScoredRecord, selected: str | None, admission: Admission, now: float
    ) -> bool:
        """Counts the unit, and returns True, if it is admitted and something is known of the candidate's gain over what
        serves.
        """
        gain = self._gain(unit, candidate.version, selected)
        if gain is None:
            return False
        if admission is not Admission.ADMITTED:
            self._trials.oppose(candidate.test, unit.record, gain)
            return False
        self._trials.update(candidate.test, unit.record, gain, now)
        return True

    def _gain(self, unit: ScoredRecord, version: str, baseline: str | None) -> UnitGain | None:
        """Returns the gain of a version over another (None: identity); None if nothing is known of it. Whether it is
        known depends on what engines and copies have computed, not on the gain.
        """
        if self._gains.figure(version, baseline) is Figure.TOTAL_VARIATION:
            distances = unit.record.distances
            before, after = distances.get(baseline or IDENTITY), distances.get(version)
            return None if before is None or after is None else distance_gain(before, after)
        if unit.record.adapter is not None:
            return None
        own = self._over_identity(unit, version)
        other = self._over_identity(unit, baseline) if baseline is not None else (0.0, 0.0)
        return None if own is None or other is None else UnitGain(own[0] - other[1], own[1] - other[0])

    def _over_identity(self, unit: ScoredRecord, version: str) -> tuple[float, float] | None:
        """Returns the gain of a version over identity; None if it is not held, or nothing is known of it."""
        profile = self._catalogue.get(version)
        return None if profile is None else gain_interval(unit.record, profile, unit.gain(profile))

    def _judge_serving(self, kind: str) -> bool:
        """Returns True if what serves the kind was rolled back."""
        decision = self._trials.decide_serving(kind)
        if decision.reason is None or self._serving.kinds[kind].pinned:
            return False
        evidence = evidence_json(self._trials.serving_evidence(kind))
        self._lifecycle.roll_back(kind, Reason(decision.reason), ROLL_BACK_TEXTS[decision.reason], evidence)
        return True

    def _promote_best(self, candidates: list[Candidate], kind: str) -> None:
        """Promotes, of the candidates that are proven here and may serve, the one with the largest gain in KL: that
        gain is known of all of them, whatever figure they were proven by.
        """
        if self._serving.kinds[kind].pinned:
            return
        proven = [candidate for candidate in candidates if self._trials.promotes(candidate, kind)]
        fitting = [candidate for candidate in proven if self._serving.has_room(candidate.version, {kind})]
        if fitting:
            best = max(fitting, key=lambda candidate: self._trials.evidence(candidate, kind).gain_nats)
            self._lifecycle.promote(best, kind)
            return
        for candidate in proven:
            if self._take_slot(candidate):
                return

    def _is_due(self, candidate: Candidate, kind: str) -> bool:
        """Returns True if the next unit of this kind promotes the candidate."""
        free = not self._serving.kinds[kind].pinned and self._serving.has_room(candidate.version, {kind})
        return free and self._trials.promotes(candidate, kind)

    def _decides(self, candidate: Candidate, kind: str) -> bool:
        """Returns True if it could be promoted there by now."""
        return self._trials.has_seen_cycles and self._trials.spans_cycle(candidate, kind)

    def _take_slot(self, candidate: Candidate) -> bool:
        """Gives the slot of another adapter to a candidate that no slot is free for, if the candidate is proven better
        in most of the other one's traffic. Returns True if it did. The kinds in which it is not proven better go back
        to identity, and it is tested there against identity.
        """
        running = self._trials.running_kinds(candidate)
        proven = {kind for kind in running if self._trials.promotes(candidate, kind)}
        lost = self._serving.slot_for(candidate.version, proven)
        if lost is None:
            return False
        for kind in sorted(lost - proven):
            why = f"{candidate.version[:8]}, which is better in most of its traffic, takes its slot in the engine"
            self._lifecycle.roll_back(kind, Reason.SLOT, why, {})
        for kind in sorted(proven):
            if not self._serving.kinds[kind].pinned:
                self._lifecycle.promote(candidate, kind)
        return True

    def _give_way(self, candidate: Candidate) -> None:
        """Drops a candidate that is hopeless if others wait for the end of its test; see `futility`."""
        successors = self._trials.successors(candidate)
        if not successors:
            return
        running = self._trials.running_kinds(candidate)
        why = why_hopeless(
            {kind: self._trials.units(candidate, kind) for kind in running},
            lambda kind: self._trials.evidence(candidate, kind).log_e,
            seen=self._trials.seen(candidate),
            for_equal=any(other.priority <= candidate.priority for other in successors),
            decides=[kind for kind in running if self._decides(candidate, kind)],
        )
        if why and not any(self._is_due(candidate, kind) for kind in running):
            self._lifecycle.drop(candidate, Reason.UNPROVEN, f"{why}, and others wait")
