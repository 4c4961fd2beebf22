"""Held-out evidence, by kind of traffic: candidates against what serves there, and what serves there against identity.

The gain is of the models' own distributions on the tokens at hand, whatever arm they came from: both alternatives are
computed on the same tokens, so that nothing depends on which requests were assigned to which arm. Whether a record
counts is decided before its gain is looked at.
"""

from __future__ import annotations

import numpy as np

from hemostat.profiles.catalogue import Catalogue
from hemostat.profiles.decisions import Reason, evidence_json
from hemostat.profiles.families import FAMILY_RULES
from hemostat.profiles.lifecycle import Lifecycle
from hemostat.profiles.serving import ServingState
from hemostat.profiles.trials import WATCH, Candidate, Interval, Trials
from hemostat.store.lease import Lease
from hemostat_calibration.divergence.gain import Gain
from hemostat_calibration.divergence.record_gains import RecordGains
from hemostat_calibration.guard import decisions as guard_decisions
from hemostat_calibration.guard.decisions import Admission
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_calibration.records import TokenRecord
from hemostat_calibration.statistics.split import held_out

MAX_UNPROVEN_UNITS = 500
"""Held-out units of its most frequent kind after which an unproven candidate is dropped where one of its priority or a
better one waits."""
MAX_UNPROVEN_UNITS_BEFORE_LOWER = 4 * MAX_UNPROVEN_UNITS
"""The same where only candidates of a lower priority wait."""

MAX_SEEN_UNITS = 4 * MAX_UNPROVEN_UNITS
"""Held-out units of any kind since its test began, or since it was promoted last, after which a candidate is dropped
where others wait: the kinds in which it is still tested are rare."""

ROLL_BACK_TEXTS = {
    guard_decisions.Reason.HARM: "its gain on held-out requests of this kind is below zero",
    guard_decisions.Reason.UNSUPPORTED: "its gain was not proven again within the window",
}


def is_held_out(record: TokenRecord, fraction: float) -> bool:
    """Whether the record's unit (its conversation) is judged by; nothing is ever learned from it then."""
    return held_out(record.unit, fraction)


def gain_interval(record: TokenRecord, profile: CalibrationProfile, gain: Gain) -> Interval | None:
    """Mean gain of a profile over identity on one request's tokens, as an interval; None where nothing is known of it.

    Left out are requests for which the engine reported other profiles but not this one (it evaluates some at a time,
    and may not hold it yet), and tokens that the profile's family has to leave out. Neither depends on what the gain
    was.
    """
    shift = record.shifts.get(profile.version)
    normalizer = np.full(record.tokens, np.nan) if shift is None else shift.log_normalizer
    if record.engine_boot and np.isnan(normalizer).all() and not gain.exact.any():
        return None
    ends = FAMILY_RULES[profile.family].token_gains(record, profile, gain, normalizer)
    return None if ends is None else (float(ends[0].mean()), float(ends[1].mean()))


class Judge:
    """Turns held-out records into promotions, drops and rollbacks, each in the record's own kind.

    Of several replicas only the leader tests candidates; the last leader goes on watching what serves.
    """

    def __init__(
        self, *, catalogue: Catalogue, serving: ServingState, trials: Trials, lifecycle: Lifecycle, lease: Lease
    ) -> None:
        self._catalogue = catalogue
        self._serving = serving
        self._trials = trials
        self._lifecycle = lifecycle
        self._lease = lease

    def observe(self, record: TokenRecord, gains: RecordGains, *, fresh: bool = True) -> None:
        """One held-out record, whose kind is followed or is the rest. fresh: its unit is new in this kind."""
        if not self._lease.is_last_leader:
            return
        if fresh:
            self._lifecycle.count_unit(record.kind)
        self._judge(record, gains)
        if self._lease.leads:
            self._trials.count_seen(record.kind)
            for candidate in self._trials.tested:
                self._give_way(candidate)

    def _judge(self, record: TokenRecord, gains: RecordGains) -> None:
        watched = self._trials.admit(WATCH, record) is Admission.ADMITTED
        tested = self._trials.tested if self._lease.leads else []
        admissions = {candidate: self._trials.admit(candidate.test, record) for candidate in tested}
        met = [c for c, found in admissions.items() if found in (Admission.ADMITTED, Admission.CLIENT_SHARE)]
        if not watched and not met:
            return
        selected = self._serving.kinds[record.kind].version
        over_identity = self._interval(record, selected, gains) if selected is not None else (0.0, 0.0)
        if over_identity is None:
            return
        # All of them count the record before anything is decided: a decision ends other tests of this kind.
        if watched:
            self._trials.update(WATCH, record, over_identity)
        counted = [c for c in met if self._count(c, record, over_identity, gains, admissions[c])]
        if watched and self._judge_serving(record.kind):
            return
        self._promote_best(counted, record.kind)

    def _count(
        self,
        candidate: Candidate,
        record: TokenRecord,
        serving_gain: Interval,
        gains: RecordGains,
        admission: Admission,
    ) -> bool:
        """Whether it counts: it is admitted, and something is known of the candidate's gain over what serves."""
        interval = self._interval(record, candidate.version, gains)
        if interval is None:
            return False
        over_serving = (interval[0] - serving_gain[1], interval[1] - serving_gain[0])
        if admission is not Admission.ADMITTED:
            self._trials.oppose(candidate.test, record, over_serving)
            return False
        self._trials.update(candidate.test, record, over_serving)
        return True

    def _judge_serving(self, kind: str) -> bool:
        """Whether it was rolled back."""
        decision = self._trials.decide_serving(kind)
        if decision.reason is None or self._serving.kinds[kind].pinned:
            return False
        evidence = evidence_json(self._trials.serving_evidence(kind))
        self._lifecycle.roll_back(kind, Reason(decision.reason), ROLL_BACK_TEXTS[decision.reason], evidence)
        return True

    def _promote_best(self, candidates: list[Candidate], kind: str) -> None:
        """Of those that are proven here, and may serve, promote the one with the largest gain."""
        if self._serving.kinds[kind].pinned:
            return
        proven = [
            candidate
            for candidate in candidates
            if self._trials.promotes(candidate, kind) and self._serving.has_room(candidate.version, {kind})
        ]
        if proven:
            best = max(proven, key=lambda candidate: self._trials.evidence(candidate, kind).mean_gain)
            self._lifecycle.promote(best, kind)

    def _give_way(self, candidate: Candidate) -> None:
        """Drop a candidate that is not proven anywhere after many units, where others wait. Units that were refused for
        their client's share count, too: a test whose other clients are gone would else never end."""
        if not self._trials.waiting:
            return
        running = self._trials.running_kinds(candidate)
        shown = [self._trials.evidence(candidate, kind) for kind in running]
        units = max((evidence.units + evidence.refused for evidence in shown), default=0)
        equal_waits = self._trials.has_waiting_equal(candidate)
        if units >= (MAX_UNPROVEN_UNITS if equal_waits else MAX_UNPROVEN_UNITS_BEFORE_LOWER):
            why = f"not proven by {units} held-out requests of its most frequent kind, and others wait"
            self._lifecycle.drop(candidate, Reason.UNPROVEN, why)
        elif (seen := self._trials.seen(candidate)) >= MAX_SEEN_UNITS:
            why = f"not proven in another kind during {seen} held-out requests, and others wait"
            self._lifecycle.drop(candidate, Reason.UNPROVEN, why)

    def _interval(self, record: TokenRecord, version: str, gains: RecordGains) -> Interval | None:
        profile = self._catalogue[version]
        return gain_interval(record, profile, gains.of(profile))
