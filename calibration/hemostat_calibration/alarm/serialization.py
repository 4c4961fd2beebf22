"""The alarm's state as JSON, for restarts (`state_codec`). Renaming a field changes the schema."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TypeVar

from hemostat_calibration.alarm.alarm import Alarm, Settings
from hemostat_calibration.alarm.outlier_engine import OutlierTest
from hemostat_calibration.alarm.workload import Workload
from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.state_codec import decode, encode

SCHEMA = 5
ENGINES_SCHEMA = 5

T = TypeVar("T")


def save(alarm: Alarm) -> bytes:
    """The whole state as JSON; `load` reads it. A few kilobytes for each kind.

    >>> from hemostat_calibration.alarm import Settings, init
    >>> load(save(init(Settings(alpha=0.05), tests=3)), Settings(alpha=0.05)).change_tests
    3
    """
    return encode(alarm, SCHEMA)


def load(data: bytes, settings: Settings) -> Alarm:
    """What `save` wrote, continued with `settings`; tests already begun keep the settings that they began with.

    InvalidArgumentError where it cannot be read, or was written by a version that tested something else: begin anew
    with `init(settings, begun_tests(data))`.

    >>> from hemostat_calibration.alarm.alarm import init
    >>> load(save(init(Settings())), Settings(alpha=0.05)).settings.alpha
    0.05
    """
    alarm = _decode(Alarm, data, SCHEMA)
    if alarm.workload.size != settings.baseline_requests:
        alarm = replace(alarm, workload=Workload(settings.baseline_requests))
    return replace(alarm, settings=settings)


def begun_tests(data: bytes) -> int:
    """The largest number of tests of any sort that a saved alarm, or test of the engines, had begun, of whatever
    schema; 0 where it is damaged.

    >>> begun_tests(b'{"schema": 9, "state": {"budget_tests": 4, "change_tests": 2}}'), begun_tests(b"damaged")
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
    """The whole state of the test of the engines as JSON.

    >>> load_engines(save_engines(OutlierTest(0.01, begun=4)), 0.05)
    OutlierTest(alpha=0.05, begun=4, units=0, tests={}, strata={})
    """
    return encode(state, ENGINES_SCHEMA)


def load_engines(data: bytes, alpha: float) -> OutlierTest:
    """What `save_engines` wrote, continued with `alpha`; tests already begun keep their own. InvalidArgumentError where
    it cannot be read: begin anew with `init(alpha, begun_tests(data))`.

    >>> load_engines(save_engines(OutlierTest(0.05)), 0.01).alpha
    0.01
    """
    return replace(_decode(OutlierTest, data, ENGINES_SCHEMA), alpha=alpha)


def _decode(kind: type[T], data: bytes, schema: int) -> T:
    try:
        return decode(kind, data, schema)
    except InvalidArgumentError as error:
        raise InvalidArgumentError(f"{error}; begin anew") from None
