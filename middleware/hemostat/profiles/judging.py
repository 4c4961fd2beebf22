"""Held-out evidence: candidates against what serves, and what serves against identity.

The gain is of the models' own distributions on the tokens at hand, whatever arm they came from: both alternatives are
computed on the same tokens, so that nothing depends on which requests were assigned to which arm.
"""

from __future__ import annotations

import numpy as np

from hemostat.profiles.catalogue import Catalogue
from hemostat.profiles.decisions import Reason, evidence_json
from hemostat.profiles.families import FAMILY_RULES
from hemostat.profiles.lifecycle import Lifecycle
from hemostat.profiles.serving import ServingState
from hemostat.profiles.trials import Candidate, Trials
from hemostat.store.lease import Lease
from hemostat_calibration import guard
from hemostat_calibration.divergence.gain import Gain
from hemostat_calibration.divergence.record_gains import RecordGains
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_calibration.records import TokenRecord
from hemostat_calibration.statistics.split import held_out

MAX_UNPROVEN_REQUESTS = 500
"""Held-out requests after which an unproven candidate is dropped where one of its priority or a better one waits."""
MAX_UNPROVEN_REQUESTS_BEFORE_LOWER = 4 * MAX_UNPROVEN_REQUESTS
"""The same where only candidates of a lower priority wait."""

ROLL_BACK_TEXTS = {
    guard.Reason.HARM: "its gain on held-out requests is below zero",
    guard.Reason.UNSUPPORTED: "its gain was not proven again within the window",
}

Interval = tuple[float, float]
"""Lower and upper end of a request's mean gain per token, nats."""


def evidence_unit(record: TokenRecord) -> bytes:
    """What counts once in a test, and is either learned from or judged by."""
    return record.unit


def is_held_out(record: TokenRecord, fraction: float) -> bool:
    """Whether the record's unit is judged by; nothing is ever learned from it then."""
    return held_out(evidence_unit(record), fraction)


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
    """Turns held-out records into promotions, drops and rollbacks.

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

    def observe(self, record: TokenRecord, scope: str, gains: RecordGains) -> None:
        """One held-out record of a scope that is followed."""
        if not self._lease.is_last_leader:
            return
        serving_scope = self._serving.serving_scope(scope)
        selected = self._serving.scopes[serving_scope].selected
        over_identity = self._interval(record, selected, gains) if selected is not None else (0.0, 0.0)
        if over_identity is None:
            return
        for candidate in self._trials.tested if self._lease.leads else ():
            if candidate.scope not in (scope, serving_scope):
                continue
            if self._judge_candidate(candidate, record, over_identity, gains):
                return
        if selected is not None:
            self._judge_serving(serving_scope, record, over_identity)

    def _judge_candidate(
        self, candidate: Candidate, record: TokenRecord, serving_gain: Interval, gains: RecordGains
    ) -> bool:
        """Whether it was promoted."""
        interval = self._interval(record, candidate.version, gains)
        if interval is None:
            return False
        over_serving = (interval[0] - serving_gain[1], interval[1] - serving_gain[0])
        decision = self._trials.observe_candidate(candidate, evidence_unit(record), over_serving, record.tokens)
        if decision is None or self._serving.pinned:
            return False
        if decision.action is guard.Action.PROMOTE:
            self._lifecycle.promote(candidate, decision)
            return True
        requests = decision.evidence.requests
        equal_waits = self._trials.has_waiting_equal(candidate)
        limit = MAX_UNPROVEN_REQUESTS if equal_waits else MAX_UNPROVEN_REQUESTS_BEFORE_LOWER
        if requests >= limit and self._trials.waiting:
            why = f"not proven by {requests} held-out requests, and others wait"
            self._lifecycle.drop(candidate, Reason.UNPROVEN, why)
        return False

    def _judge_serving(self, scope: str, record: TokenRecord, over_identity: Interval) -> None:
        decision = self._trials.observe_serving(scope, evidence_unit(record), over_identity, record.tokens)
        if decision is not None and decision.reason is not None and not self._serving.pinned:
            why = ROLL_BACK_TEXTS[decision.reason]
            self._lifecycle.roll_back(scope, Reason(decision.reason), why, evidence_json(decision))

    def _interval(self, record: TokenRecord, version: str, gains: RecordGains) -> Interval | None:
        profile = self._catalogue[version]
        return gain_interval(record, profile, gains.of(profile))
