"""The states of the alarm's tests and kinds, for metrics and the console."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hemostat_calibration.alarm.betting import Crossing
from hemostat_calibration.alarm.state import Alarm, AlarmTest, RunningTest


@dataclass(frozen=True, slots=True)
class Reading:
    """The state of one test.

    kind: of a budget test; "" for the change test, which is of all kinds. raised: the evidence of the alarm; None when
        there is none. log_evidence: ln of the wealth; it alarms at ln(1/alpha). alpha: that the bets of this test
        spend; NaN before it begins. number: among all tests of its sort that were begun, 0 before. requests, tokens:
        that it has seen.
    """

    test: AlarmTest
    kind: str
    raised: Crossing | None
    log_evidence: float
    alpha: float
    number: int
    requests: int
    tokens: int


@dataclass(frozen=True, slots=True)
class KindReading:
    """The state of one kind.

    baseline_requests: the number of requests in its baseline so far. since: the time of the first of them. inflation:
    v̂ of their levels; infinite before it can be estimated. watched: its baseline is complete, and the kind is part of
    the change test. spread_ratio: its recent spread (geometric mean over about `RECENT_REQUESTS` requests), as a factor
    of its baseline's; None before the kind is watched. baseline_share: its part of the baseline's mix of kinds.
    """

    kind: str
    baseline_requests: int
    watched: bool
    since: float
    inflation: float
    spread_ratio: float | None
    baseline_share: float


def readings(alarm: Alarm) -> list[Reading]:
    """Returns the state of every test: the change test, also before it begins, then the budget tests in the order of
    kinds.

    >>> import numpy as np
    >>> from hemostat_calibration.alarm.alarm import init, update
    >>> from hemostat_calibration.alarm.state import Observation, Settings
    >>> alarm = init(Settings(budget=0.1))
    >>> for now in range(100):
    ...     alarm = update(alarm, "chat", Observation(float(now), np.full(8, 0.1), np.full(8, 0.1)))
    >>> [(reading.test.value, reading.kind, reading.number) for reading in readings(alarm)]
    [('change', '', 0), ('budget', 'chat', 1)]
    """
    result = [_reading(AlarmTest.CHANGE, "", alarm.change)] if alarm.settings.baseline_requests else []
    budgets = [(kind, alarm.kinds[kind].budget) for kind in sorted(alarm.kinds)]
    return result + [_reading(AlarmTest.BUDGET, kind, running) for kind, running in budgets if running is not None]


def _reading(test: AlarmTest, kind: str, running: RunningTest | None) -> Reading:
    if running is None:
        return Reading(test, kind, None, 0.0, math.nan, 0, 0, 0)
    wealth = running.test.wealth
    return Reading(
        test=test,
        kind=kind,
        raised=running.test.crossing,
        log_evidence=wealth.log_evidence,
        alpha=running.test.alpha,
        number=running.number,
        requests=wealth.requests,
        tokens=wealth.tokens,
    )


def kind_readings(alarm: Alarm) -> list[KindReading]:
    """Returns the state of every kind, sorted by name. The list is empty without a change test.

    >>> from hemostat_calibration.alarm.alarm import init
    >>> from hemostat_calibration.alarm.state import Settings
    >>> kind_readings(init(Settings()))
    []
    """
    needed = alarm.settings.baseline_requests
    return [
        KindReading(
            kind=kind,
            baseline_requests=state.levels.units if state.baseline is None else state.baseline.requests,
            watched=state.baseline is not None,
            since=state.since,
            inflation=float(state.levels.inflation()[0]) if state.baseline is None else state.baseline.inflation,
            spread_ratio=math.exp(state.recent_level) if state.recent_requests else None,
            baseline_share=alarm.workload.share(kind),
        )
        for kind, state in sorted(alarm.kinds.items())
        if needed
    ]


def weighted_spread_ratio(alarm: Alarm) -> float | None:
    """Returns the recent spread as a factor of the baseline's (geometric mean), over all kinds that are watched, each
    weighted by its part of the *baseline's* mix: what it would be had only the model changed, and not the traffic. None
    while the mix of the baseline is not known.

    >>> from hemostat_calibration.alarm.alarm import init
    >>> from hemostat_calibration.alarm.state import Settings
    >>> weighted_spread_ratio(init(Settings())) is None
    True
    """
    known = [(r.baseline_share, math.log(r.spread_ratio)) for r in kind_readings(alarm) if r.spread_ratio is not None]
    total = sum(share for share, _ in known)
    return math.exp(sum(share * level for share, level in known) / total) if total else None
