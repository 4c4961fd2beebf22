"""The hemorrhage alarm: two tests over all kinds of traffic, with one false-alarm probability a week.

`budget`  the divergence per token of a kind exceeds the noise floor by more than the operator allows (`budget`).
`change`  the requests of the kinds are no longer what the frozen baselines of these kinds were: another checkpoint, a
          driver, a KV-cache type (`change`, `baseline`).

Both bet against "nothing is wrong" (`betting`), one bounded bet for each request; `alarm` updates the tests and shares
out the probability, and `state` is what it keeps; `workload` compares the mix of kinds with what it was, which is
information and no alarm; `serialization` keeps the state across restarts.

Use: `state = init(Settings(...))` once; for each scored request that is independent of the others (a conversation's
first in its kind) `state = update(state, kind, Observation(now, kl_rc, spread(record)), noise_floor)`, with
`noise_floor` the upper end, in nats, of the interval of what the noise adds (infinite while unknown: the budget test
waits); `readings(state)` and `kind_readings(state)` for metrics and console; `save` and `load` around restarts.

Further modules:

    outlier_engine  the test that names an outlier among several engines
    report          the states of tests and kinds, for metrics and the console
    placement       where the next figure falls among those before it
"""

from hemostat_calibration.alarm.alarm import (
    EFFECTIVE_SHARE,
    after_break,
    init,
    rebase,
    update,
    update_workload,
    with_settings,
)
from hemostat_calibration.alarm.baseline import Baseline, RequestSpread, fit_baseline, request_spread
from hemostat_calibration.alarm.betting import Crossing
from hemostat_calibration.alarm.budget import BudgetTest
from hemostat_calibration.alarm.change import ChangeTest, spread
from hemostat_calibration.alarm.report import KindReading, Reading, kind_readings, readings, weighted_spread_ratio
from hemostat_calibration.alarm.serialization import begun_tests, load, read, save
from hemostat_calibration.alarm.state import Alarm, AlarmTest, Observation, Settings
from hemostat_calibration.alarm.workload import Workload

__all__ = [
    "EFFECTIVE_SHARE",
    "Alarm",
    "AlarmTest",
    "Baseline",
    "BudgetTest",
    "ChangeTest",
    "Crossing",
    "KindReading",
    "Observation",
    "Reading",
    "RequestSpread",
    "Settings",
    "Workload",
    "after_break",
    "begun_tests",
    "fit_baseline",
    "init",
    "kind_readings",
    "load",
    "read",
    "readings",
    "rebase",
    "request_spread",
    "save",
    "spread",
    "update",
    "update_workload",
    "weighted_spread_ratio",
    "with_settings",
]
