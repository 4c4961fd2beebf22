"""Stored states of the alarm and of the test of the engines whose arrays do not fit are refused, and nothing that was
read makes a later update fail."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from hemostat_calibration.alarm import Alarm, Observation, Settings, init, load, save, update
from hemostat_calibration.alarm import outlier_engine as engines
from hemostat_calibration.alarm.serialization import load_engines, save_engines
from hemostat_calibration.errors import InvalidArgumentError

SETTINGS = Settings(alpha=0.06, budget=0.5, baseline_requests=30, clear_after=10)
Path = tuple[Any, ...]


def running() -> Alarm:
    """A kind that is watched, one that is learned, and both alarms, which wait to be cleared."""
    alarm, random = init(SETTINGS), np.random.default_rng(0)
    for now in range(300):
        level = 0.1 if now < 200 else 3.0
        spreads = level * np.exp(0.1 * random.normal(size=20))
        alarm = update(alarm, "chat", Observation(float(now), np.full(20, 20.0 * level), spreads), 0.0)
    return update(alarm, "new", Observation(300.0, np.full(20, 0.1), np.full(20, 0.1)), 0.0)


def compared() -> engines.OutlierTest:
    state = engines.init(0.01)
    for n in range(120):
        state = engines.update(state, "chat", engines.Unit(f"engine {n % 3}", 5.0 if n % 3 else 0.1, 40), float(n))
    return state


def arrays(value: Any, path: Path = ()) -> Iterator[Path]:
    """Where arrays are in the stored JSON."""
    if isinstance(value, list) and len(value) == 3 and isinstance(value[0], str) and isinstance(value[1], list):
        yield path
    elif isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from arrays(item, (*path, key))


def reshaped(data: bytes, path: Path) -> bytes:
    """One array gets a further dimension."""
    stored = json.loads(data)
    at = stored
    for key in path:
        at = at[key]
    at[1] = [*at[1], 1]
    return json.dumps(stored).encode()


def test_the_states_hold_all_sorts_of_arrays() -> None:
    names = {path[-1] for path in arrays(json.loads(save(running())))}
    assert names >= {"learning", "limits", "open", "sums", "log_wealth", "since", "recovery_log_wealth"}
    names = {path[-1] for path in arrays(json.loads(save_engines(compared())))}
    assert names >= {"begun", "windows", "log_wealth", "recovery"}


def test_an_array_of_another_shape_is_refused() -> None:
    data = save(running())
    assert save(load(data, SETTINGS)) == data
    for path in arrays(json.loads(data)):
        with pytest.raises(InvalidArgumentError, match=r"another shape.*begin anew"):
            load(reshaped(data, path), SETTINGS)
    data = save_engines(compared())
    assert save_engines(load_engines(data, 0.01)) == data
    for path in arrays(json.loads(data)):
        with pytest.raises(InvalidArgumentError, match=r"another shape.*begin anew"):
            load_engines(reshaped(data, path), 0.01)


@pytest.mark.parametrize("name", ["budget_tests", "change_tests", "baselines"])
def test_a_count_below_zero_is_refused(name: str) -> None:
    stored = json.loads(save(running()))
    stored["state"][name] = -1
    with pytest.raises(InvalidArgumentError, match="count is below 0; begin anew"):
        load(json.dumps(stored).encode(), SETTINGS)


def test_units_of_a_stratum_that_do_not_belong_together_are_refused() -> None:
    stored = json.loads(save_engines(compared()))
    stored["state"]["strata"]["chat"]["engines"].pop()
    with pytest.raises(InvalidArgumentError, match="do not belong together; begin anew"):
        load_engines(json.dumps(stored).encode(), 0.01)
