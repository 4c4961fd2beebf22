"""The hemorrhage alarm: two tests on every route, with one false-alarm probability over all of them and the whole run.

`budget`  the divergence per token exceeds the noise floor by more than the operator allows (`budget`).
`change`  the stream is no longer what a frozen baseline of it was: another checkpoint, a driver, a KV-cache type
          (`change`).

Both bet against "nothing is wrong" (`betting`); `routes` holds the tests of all routes and shares out the probability;
`serialization` keeps the state across restarts.

Use: `state = init(Settings(...))` once; for each scored record `state = update(state, route, Observation(now, kl_rc,
spread(record)), noise_floor)`, with `noise_floor` the upper end, in nats, of the noise floor's interval
(`confidence.ClippedMean.get(settings.alpha / 4).high` over the noise-floor records of the same figure; infinite while
unknown: the budget test waits); `readings(state)` for metrics and console; `save` and `load` around restarts.
"""

from hemostat_calibration.alarm.betting import Crossing
from hemostat_calibration.alarm.budget import BudgetTest
from hemostat_calibration.alarm.change import ChangeTest, fit_bets
from hemostat_calibration.alarm.logit_spread import spread
from hemostat_calibration.alarm.routes import (
    Alarm,
    Kind,
    Observation,
    Reading,
    Settings,
    init,
    readings,
    rebase,
    update,
)
from hemostat_calibration.alarm.serialization import load, save

__all__ = [
    "Alarm",
    "BudgetTest",
    "ChangeTest",
    "Crossing",
    "Kind",
    "Observation",
    "Reading",
    "Settings",
    "fit_bets",
    "init",
    "load",
    "readings",
    "rebase",
    "save",
    "spread",
    "update",
]
