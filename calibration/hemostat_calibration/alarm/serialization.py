"""The alarm's state as JSON, for restarts (`state_codec`). Renaming a field changes the schema.

What the types of the fields do not say is checked here: the shapes of arrays, and that counts are not negative. Nothing
that was read can make a later update fail.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from hemostat_calibration.alarm.alarm import with_settings
from hemostat_calibration.alarm.baseline import LEVEL_WEIGHTS, LEVELS, LOG_WEIGHTS, STAKES
from hemostat_calibration.alarm.betting import BET_FRACTIONS, WealthState
from hemostat_calibration.alarm.budget import BudgetTest
from hemostat_calibration.alarm.change import ChangeTest
from hemostat_calibration.alarm.outlier_engine import OutlierTest, Unit, init, update
from hemostat_calibration.alarm.state import Alarm, KindState, RunningTest, Settings
from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.state_codec import decode, encode
from hemostat_calibration.statistics.dependence import (
    RECENT_LAG,
    BatchMeans,
    RecentInflation,
    SuccessiveDifferences,
)

SCHEMA = 9
OLDER_SCHEMAS = (7, 8)
"""The schemas of the alarm without v̂ of recent requests, and without v̂ by successive differences."""
ENGINES_SCHEMA = 6

T = TypeVar("T")


def save(alarm: Alarm) -> bytes:
    """Returns the whole state as JSON; `load` reads it. A few kilobytes for each kind.

    >>> from hemostat_calibration.alarm import Settings, init
    >>> load(save(init(Settings(alpha=0.05), tests=3)), Settings(alpha=0.05)).change_tests
    3
    """
    return encode(alarm, SCHEMA)


def load(data: bytes, settings: Settings) -> Alarm:
    """Returns the alarm that `save` wrote, continued with `settings` (`with_settings`). Raises InvalidArgumentError if
    it cannot be read, or was written by a version that tested something else: begin anew with `init(settings,
    begun_tests(data))`.

    >>> from hemostat_calibration.alarm.alarm import init
    >>> load(save(init(Settings())), Settings(alpha=0.05)).settings.alpha
    0.05
    """
    return with_settings(read(data), settings)


def read(data: bytes) -> Alarm:
    """Returns the alarm that `save` wrote, with the settings of that time. Raises InvalidArgumentError as `load` does.

    >>> from hemostat_calibration.alarm.alarm import init
    >>> read(save(init(Settings(alpha=0.05)))).settings.alpha
    0.05
    """
    alarm = _decode(Alarm, data, SCHEMA, OLDER_SCHEMAS)
    _require_shapes(_arrays(alarm))
    _require_counts(alarm.budget_tests, alarm.change_tests, alarm.baselines, *alarm.workload.baseline.values())
    return alarm


def begun_tests(data: bytes) -> int:
    """Returns the largest number of tests of any sort that a saved alarm, or test of the engines, had begun, of
    whatever schema; 0 where it is damaged.

    >>> begun_tests(b'{"schema": 10, "state": {"budget_tests": 4, "change_tests": 2}}'), begun_tests(b"damaged")
    (4, 0)
    >>> begun_tests(b'{"schema": 3, "engines": {"is": "OddEngines", "fields": {"begun": 3}}}')
    3
    """
    try:
        stored = json.loads(data)
        # Up to schema 3 of the alarm and of the engines there was no `state`.
        old = stored.get("alarm") or stored.get("engines") or stored
        state = stored["state"] if "state" in stored else old["fields"]
        counts = [state.get(name, 0) for name in ("budget_tests", "change_tests", "baselines", "begun", "tests")]
        return max(count for count in counts if isinstance(count, int))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return 0


def save_engines(state: OutlierTest) -> bytes:
    """Returns the whole state of the test of the engines as JSON.

    >>> load_engines(save_engines(OutlierTest(0.01, begun=4)), 0.05)
    OutlierTest(alpha=0.05, begun=4, units=0, tests={}, strata={})
    """
    return encode(state, ENGINES_SCHEMA)


def load_engines(data: bytes, alpha: float) -> OutlierTest:
    """Returns what `save_engines` wrote, continued with `alpha`; tests that have begun keep their own. Raises
    InvalidArgumentError if it cannot be read: begin anew with `init(alpha, begun_tests(data))`.

    >>> load_engines(save_engines(OutlierTest(0.05)), 0.01).alpha
    0.01
    """
    state = _decode(OutlierTest, data, ENGINES_SCHEMA)
    _require_shapes(_engine_arrays(state))
    _require_counts(state.begun, state.units)
    for name, stratum in state.strata.items():
        if not len(stratum.figures) == len(stratum.engines) == len(stratum.numbers):
            raise InvalidArgumentError(f"the units of stratum {name[:40]!r} do not belong together; begin anew")
    return replace(state, alpha=alpha)


def _decode(kind: type[T], data: bytes, schema: int, older: Collection[int] = ()) -> T:
    try:
        return decode(kind, data, schema, older)
    except InvalidArgumentError as error:
        raise InvalidArgumentError(f"{error}; begin anew") from None


Array = npt.NDArray[np.generic]
Checks = Iterator[tuple[str, Array, tuple[int | None, ...]]]
"""Yields for each array its name, what was read, and the shape that it must have; None: any size."""


def _arrays(alarm: Alarm) -> Checks:
    fresh = KindState()
    yield from _like(alarm.levels, fresh.levels, "levels")
    yield from _recent_arrays(alarm.recent, "recent")
    if alarm.change is not None:
        yield from _test_arrays(alarm.change, ChangeTest, LEVEL_WEIGHTS.shape)
    for state in alarm.kinds.values():
        yield "learning", state.learning, (None, 3)
        yield from _like(state.levels, fresh.levels, "levels")
        yield from _like(state.divergences, fresh.divergences, "divergences")
        yield from _recent_arrays(state.recent, "recent")
        yield from _recent_arrays(state.recent_divergences, "recent_divergences")
        _require_differences(state.differences)
        if state.baseline is not None:
            yield "limits", state.baseline.limits, (len(LEVELS), len(LOG_WEIGHTS) // len(STAKES))
        if state.budget is not None:
            yield from _test_arrays(state.budget, BudgetTest, (len(BET_FRACTIONS),))


def _test_arrays(running: RunningTest, kind: type[BudgetTest | ChangeTest], shape: tuple[int, ...]) -> Checks:
    if not isinstance(running.test, kind):
        raise InvalidArgumentError(f"a {type(running.test).__name__} in place of a {kind.__name__}; begin anew")
    yield from _wealth_arrays(running.test.wealth, shape)
    if running.recovery_log_wealth is not None:
        yield "recovery_log_wealth", running.recovery_log_wealth, shape[-1:]


def _wealth_arrays(wealth: WealthState, shape: tuple[int, ...]) -> Checks:
    for name in ("log_wealth", "since", "first_request", "first_token"):
        yield name, getattr(wealth, name), shape


def _recent_arrays(recent: RecentInflation, where: str) -> Checks:
    if not (1.0 <= recent.value < math.inf and len(recent.waiting) <= RECENT_LAG):
        raise InvalidArgumentError(f"{where} has a v̂ of {recent.value} or too many units; begin anew")
    yield f"{where}.waiting", recent.waiting, (None,)
    yield from _like(recent.older, BatchMeans.of(1), f"{where}.older")
    yield from _like(recent.newer, BatchMeans.of(1), f"{where}.newer")


def _require_differences(differences: SuccessiveDifferences) -> None:
    finite = math.isfinite(differences.last) and 0.0 <= differences.ratio < math.inf
    if not (finite and differences.units >= 0):
        raise InvalidArgumentError(f"the successive differences are damaged: {differences}; begin anew")


def _like(stored: object, fresh: object, where: str) -> Checks:
    """Yields the checks of batch means."""
    for name in ("open", "sums"):
        yield f"{where}.{name}", getattr(stored, name), getattr(fresh, name).shape


def _engine_arrays(state: OutlierTest) -> Checks:
    fresh = update(init(0.5), "", Unit("", 0.0, 1)).tests[""]
    for test in state.tests.values():
        yield from _wealth_arrays(test.wealth, fresh.wealth.log_wealth.shape)
        yield "begun", test.begun, fresh.begun.shape
        yield "windows", test.windows, fresh.windows.shape
        if test.recovery is not None:
            yield "recovery", test.recovery, (len(fresh.wealth.log_wealth) // len(fresh.begun),)


def _require_shapes(arrays: Checks) -> None:
    for name, array, shape in arrays:
        fits = len(shape) == array.ndim and all(
            expected in {None, size} for expected, size in zip(shape, array.shape, strict=False)
        )
        if not fits:
            raise InvalidArgumentError(f"{name} has another shape, {list(array.shape)}; begin anew")


def _require_counts(*counts: int) -> None:
    if min(counts) < 0:
        raise InvalidArgumentError("a count is below 0; begin anew")
