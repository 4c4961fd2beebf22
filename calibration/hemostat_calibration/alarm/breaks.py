"""Adapts the times that the alarm keeps after a clock was set."""

from __future__ import annotations

import math
from dataclasses import replace

from hemostat_calibration.alarm.alarm import Alarm, KindState, RunningTest
from hemostat_calibration.alarm.budget import BudgetTest
from hemostat_calibration.elapsed import TimeBreak


def after_break(alarm: Alarm, time_break: TimeBreak) -> Alarm:
    """Returns the same after the time was set: what has to span a cycle begins again, or goes on without the time that
    was lost (`TimeBreak`); bets are funded as if nothing but known time had passed; and a kind was last seen as long
    ago as before. What baselines have learned, and evidence, stay.

    >>> import numpy as np
    >>> from hemostat_calibration.alarm.alarm import Observation, Settings, init, update
    >>> from hemostat_calibration.alarm.report import kind_readings
    >>> alarm = update(init(Settings()), "chat", Observation(5.0, np.full(8, 0.1), np.full(8, 0.1)))
    >>> kind_readings(after_break(alarm, TimeBreak(now=1.7e9, lost=1.7e9 - 9.0, anew=True)))[0].since
    1700000000.0
    """
    return replace(
        alarm,
        kinds={kind: _kind_after_break(state, time_break) for kind, state in alarm.kinds.items()},
        change=_test_after_break(alarm.change, time_break),
        workload=alarm.workload.after_break(time_break),
    )


def _kind_after_break(state: KindState, time_break: TimeBreak) -> KindState:
    return replace(
        state,
        since=time_break.begins(state.since, ended=state.baseline is not None),
        first=time_break.begins(state.first, ended=math.isfinite(state.inflation)),
        last=time_break.seen(state.last),
        budget=_test_after_break(state.budget, time_break),
    )


def _test_after_break(running: RunningTest | None, time_break: TimeBreak) -> RunningTest | None:
    if running is None:
        return None
    test = running.test
    # Written out for each class: a test of the one is no test of the other.
    if isinstance(test, BudgetTest):
        return replace(running, test=replace(test, wealth=test.wealth.after_break(time_break)))
    return replace(running, test=replace(test, wealth=test.wealth.after_break(time_break)))
