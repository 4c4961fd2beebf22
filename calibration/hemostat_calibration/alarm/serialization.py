"""The alarm's state as JSON, for restarts.

Classes and fields are stored by their names: renaming one changes the format, and with it `SCHEMA`.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np

from hemostat_calibration.alarm.alarm import Alarm, KindState, RunningTest, Settings
from hemostat_calibration.alarm.baseline import Baseline
from hemostat_calibration.alarm.betting import Crossing, WealthState
from hemostat_calibration.alarm.budget import BudgetTest
from hemostat_calibration.alarm.change import ChangeTest
from hemostat_calibration.alarm.outlier_engine import EngineTest, OutlierTest, Stratum, init
from hemostat_calibration.alarm.workload import Workload
from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.statistics.dependence import BatchMeans

SCHEMA = 4
"""Of what `save` writes. 1 counted tokens by route, 2 took requests for independent, 3 did not know when they came."""


_STORED: Mapping[str, type[Any]] = {
    "Alarm": Alarm,
    "Settings": Settings,
    "KindState": KindState,
    "RunningTest": RunningTest,
    "BudgetTest": BudgetTest,
    "ChangeTest": ChangeTest,
    "Baseline": Baseline,
    "BatchMeans": BatchMeans,
    "WealthState": WealthState,
    "Crossing": Crossing,
    "Workload": Workload,
    "OutlierTest": OutlierTest,
    "EngineTest": EngineTest,
    "Stratum": Stratum,
}
_NAMES = {kind: name for name, kind in _STORED.items()}


def save(alarm: Alarm) -> bytes:
    """The whole state as JSON; `load` reads it. A few kilobytes for each kind.

    >>> from hemostat_calibration.alarm import Settings, init
    >>> load(save(init(Settings(alpha=0.05), tests=3)), Settings(alpha=0.05)).change_tests
    3
    """
    return json.dumps({"schema": SCHEMA, "alarm": _to_json(alarm)}).encode()


def load(data: bytes, settings: Settings) -> Alarm:
    """What `save` wrote, continued with `settings`; tests already begun keep the settings that they began with.

    InvalidArgumentError where it cannot be read, or was written by a version that tested something else: begin anew
    with `init(settings, begun_tests(data))`.

    >>> from hemostat_calibration.alarm.alarm import init
    >>> load(save(init(Settings())), Settings(alpha=0.05)).settings.alpha
    0.05
    """
    try:
        stored = json.loads(data)
        if isinstance(stored, dict) and stored.get("is") == "Alarm":
            raise InvalidArgumentError(
                "the saved alarm is of schema 1, which counted tokens by route: it cannot be continued; begin anew"
            )
        if stored["schema"] != SCHEMA:
            raise InvalidArgumentError(
                f"the saved alarm is of schema {str(stored['schema'])[:20]}, this version reads {SCHEMA}; begin anew"
            )
        alarm = _from_json(stored["alarm"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidArgumentError(f"not a saved alarm: {error}; begin anew") from None
    if not isinstance(alarm, Alarm):
        raise InvalidArgumentError("not a saved alarm: it holds something else; begin anew")
    if alarm.workload.size != settings.baseline_requests:
        alarm = replace(alarm, workload=Workload(settings.baseline_requests))
    return replace(alarm, settings=settings)


def begun_tests(data: bytes) -> int:
    """The largest number of tests of any sort that a saved alarm had begun, of whatever schema; 0 where it is damaged.

    >>> begun_tests(b'{"is": "Alarm", "fields": {"tests": 4}}'), begun_tests(b"damaged")
    (4, 0)
    """
    try:
        stored = json.loads(data)
        fields_ = stored.get("alarm", stored)["fields"]
        counts = [fields_.get(name, 0) for name in ("tests", "budget_tests", "change_tests", "baselines")]
        return max(count for count in counts if isinstance(count, int))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return 0


ENGINES_SCHEMA = 4
"""Of what `save_engines` writes. 1 had blocks of units, 2 windows without restarts, 3 units of engines that were not
drawn."""


def save_engines(state: OutlierTest) -> bytes:
    """The whole state of the test of the engines as JSON.

    >>> load_engines(save_engines(OutlierTest(0.01, begun=4)), 0.05)
    OutlierTest(alpha=0.05, begun=4, units=0, tests={}, strata={})
    """
    return json.dumps({"schema": ENGINES_SCHEMA, "engines": _to_json(state)}).encode()


def load_engines(data: bytes, alpha: float) -> OutlierTest:
    """What `save_engines` wrote, continued with `alpha`; tests already begun keep their own. Of what an earlier schema
    tested only the number of tests is kept, whose alpha is spent. InvalidArgumentError where it cannot be read.

    >>> load_engines(save_engines(OutlierTest(0.05)), 0.01).alpha
    0.01
    """
    try:
        stored = json.loads(data)
        if stored["schema"] in (1, 2, 3):
            return init(alpha, int(stored["engines"]["fields"]["begun"]))
        if stored["schema"] != ENGINES_SCHEMA:
            raise InvalidArgumentError(
                f"it is of schema {str(stored['schema'])[:20]}, this version reads {ENGINES_SCHEMA}"
            )
        state = _from_json(stored["engines"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidArgumentError(f"not a saved test of engines: {error}; begin anew") from None
    if not isinstance(state, OutlierTest):
        raise InvalidArgumentError("not a saved test of engines: it holds something else; begin anew")
    return replace(state, alpha=alpha)


def _to_json(value: Any) -> Any:
    if is_dataclass(value):
        items = {f.name: _to_json(getattr(value, f.name)) for f in fields(value)}
        return {"is": _NAMES[type(value)], "fields": items}
    if isinstance(value, np.ndarray):
        data = base64.b85encode(value.tobytes()).decode()
        return {"is": "array", "dtype": value.dtype.str, "shape": value.shape, "data": data}
    if isinstance(value, Mapping):
        return {"is": "mapping", "items": [[key, _to_json(item)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return [_to_json(item) for item in value]
    return value


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_from_json(item) for item in value)
    if not isinstance(value, dict):
        return value
    if value["is"] == "array":
        data = np.frombuffer(base64.b85decode(value["data"]), np.dtype(value["dtype"]))
        return data.reshape(value["shape"])
    if value["is"] == "mapping":
        return {key: _from_json(item) for key, item in value["items"]}
    return _STORED[value["is"]](**{name: _from_json(item) for name, item in value["fields"].items()})
