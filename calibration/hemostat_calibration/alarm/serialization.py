"""The alarm's state as JSON, for restarts.

The stored format names classes and fields of its own (`_STORED`), so that renaming in the code does not change it.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import numpy as np

from hemostat_calibration.alarm.betting import Crossing, WealthState
from hemostat_calibration.alarm.budget import BudgetTest
from hemostat_calibration.alarm.change import Bets, ChangeTest
from hemostat_calibration.alarm.routes import Alarm, RouteState, RouteTest, Settings
from hemostat_calibration.errors import InvalidArgumentError


@dataclass(frozen=True, slots=True)
class _Stored:
    """How a class is stored. fields: attribute -> stored name, where they differ."""

    name: str
    kind: type[Any]
    fields: Mapping[str, str] = field(default_factory=dict)

    def attribute(self, stored: str) -> str:
        return next((attribute for attribute, name in self.fields.items() if name == stored), stored)


_STORED = (
    _Stored("Alarm", Alarm),
    _Stored("Settings", Settings, {"max_tokens": "most_tokens"}),
    _Stored("_Route", RouteState),
    _Stored("_Watch", RouteTest, {"recovery_log_wealth": "calm", "recovery_requests": "calm_requests"}),
    _Stored("BudgetTest", BudgetTest, {"max_tokens": "most_tokens", "wealth": "purse"}),
    _Stored("ChangeTest", ChangeTest, {"wealth": "purse"}),
    _Stored("Bets", Bets),
    _Stored("_Purse", WealthState, {"log_wealth": "log_capital"}),
    _Stored("Crossing", Crossing, {"log_wealth": "log_capital"}),
)
_BY_KIND = {stored.kind: stored for stored in _STORED}
_BY_NAME = {stored.name: stored for stored in _STORED}


def save(alarm: Alarm) -> bytes:
    """The whole state as JSON; `load` reads it.

    >>> from hemostat_calibration.alarm import Settings, init
    >>> load(save(init(Settings(alpha=0.05), tests=3)), Settings(alpha=0.05)).tests
    3
    """
    return json.dumps(_to_json(alarm)).encode()


def load(data: bytes, settings: Settings) -> Alarm:
    """What `save` wrote, continued with `settings`; tests already begun keep the settings that they began with.

    InvalidArgumentError where it cannot be read.

    >>> from hemostat_calibration.alarm.routes import init
    >>> load(save(init(Settings())), Settings(alpha=0.05)).settings.alpha
    0.05
    """
    try:
        alarm = _from_json(json.loads(data))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidArgumentError(f"not a saved alarm: {error}; begin anew") from None
    if not isinstance(alarm, Alarm):
        raise InvalidArgumentError("not a saved alarm: it holds something else; begin anew")
    return replace(alarm, settings=settings)


def _to_json(value: Any) -> Any:
    if is_dataclass(value):
        stored = _BY_KIND[type(value)]
        items = {stored.fields.get(f.name, f.name): _to_json(getattr(value, f.name)) for f in fields(value)}
        return {"is": stored.name, "fields": items}
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
    stored = _BY_NAME[value["is"]]
    return stored.kind(**{stored.attribute(name): _from_json(item) for name, item in value["fields"].items()})
