"""The test of which engine is not like the others. Simulated worlds: tests/bench/faults/."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hemostat_calibration.alarm.odd_engine import (
    ACTIVE_SECONDS,
    COHORT,
    MAX_ENGINES,
    MAX_STRATA,
    UNITS_PER_ENGINE,
    OddEngines,
    Unit,
    init,
    log_e_values,
    readings,
    update,
)
from hemostat_calibration.alarm.serialization import load_engines, save_engines
from hemostat_calibration.errors import InvalidArgumentError

ALPHA = 0.01
figures = st.lists(st.one_of(st.floats(0.0, 1e300), st.sampled_from([0.0, 0.5, 1.0])), min_size=2, max_size=7)


@given(figures, st.data())
def test_the_mean_over_all_placements_is_one(values: list[float], data: st.DataObject) -> None:
    count = len(values)
    chosen = data.draw(st.integers(1, count - 1))
    placements = list(combinations(range(count), chosen))
    total = sum(np.exp(log_e_values(np.array(values), np.isin(np.arange(count), own))) for own in placements)
    assert np.allclose(total / len(placements), 1.0)


@pytest.mark.parametrize("own", [[False] * 4, [True] * 4])
def test_a_block_of_one_side_says_nothing(own: list[bool]) -> None:
    assert not log_e_values(np.arange(4.0), np.array(own)).any()


def named(state: OddEngines) -> list[str]:
    return [one.engine for one in readings(state) if one.raised is not None]


def lived(state: OddEngines, units: int, odd: int | None, seed: int = 0) -> OddEngines:
    rng = np.random.default_rng(seed)
    for n in range(units):
        level = 0.03 if n % 4 == odd else 0.6
        state = update(state, "chat", Unit(f"engine {n % 4}", level * rng.lognormal(0.0, 0.3), 50), float(n))
    return state


def test_the_alarm_says_in_which_direction_and_clears_when_the_engine_is_repaired() -> None:
    state = lived(init(ALPHA), 200, odd=2)
    (reading,) = [one for one in readings(state) if one.raised]
    assert (reading.engine, reading.farther) == ("engine 2", False)
    assert reading.raised is not None
    assert reading.raised.tokens <= 1000
    state = lived(state, 400, odd=None, seed=1)
    assert not named(state)
    assert state.begun == 5, "another test has begun, and its alpha is a part of its own"


def test_the_state_survives_a_restart() -> None:
    state = lived(init(ALPHA), 130, odd=2)
    again = load_engines(save_engines(state), ALPHA)
    assert readings(lived(again, 50, odd=2)) == readings(lived(state, 50, odd=2))


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b'{"schema": 2}', b'{"schema": 1, "engines": 3}'])
def test_damaged_state_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidArgumentError, match="begin anew"):
        load_engines(data, ALPHA)


def test_all_alpha_that_is_ever_spent_is_at_most_alpha() -> None:
    state, spent = init(ALPHA), []
    for n in range(40 * COHORT):
        state = update(state, "chat", Unit(f"engine {n}", 1.0, 1), float(n))
        spent.append(state.tests[f"engine {n}"].alpha)
    assert ALPHA * 0.9 < sum(spent) <= ALPHA
    assert len(state.tests) == MAX_ENGINES


def test_strata_are_bounded_and_figures_that_are_none_are_left_out() -> None:
    state = init(ALPHA)
    for n in range(MAX_STRATA + 10):
        state = update(state, f"kind {n}", Unit("engine 0", 1.0, 1), float(n))
        state = update(state, f"kind {n}", Unit("engine 1", float("nan"), 1), float(n))
    assert len(state.blocks) == MAX_STRATA
    assert len(state.tests) == 1


def test_of_two_engines_both_are_named_until_the_one_that_differs_is_repaired() -> None:
    rng, state, changes = np.random.default_rng(0), init(ALPHA), [[]]
    for n in range(1200):
        engine = int(rng.integers(2))
        level = 0.6 if engine == 1 and n < 800 else 0.1
        state = update(state, "chat", Unit(f"engine {engine}", level * rng.lognormal(0.0, 0.5), 50), float(n))
        if named(state) != changes[-1]:
            changes.append(named(state))
        if n == 799:
            assert named(state) == ["engine 0", "engine 1"]
    assert len([found for found in changes if len(found) == 2]) == 1, "the alarm does not flap"
    assert not named(state)
    assert state.begun == 4


def test_a_block_of_one_engine_alone_is_no_recovery() -> None:
    """It has nothing to be compared with."""
    state = lived(init(ALPHA), 200, odd=2)
    for n in range(400):
        state = update(state, "code", Unit("engine 2", 0.03, 50), 200.0 + n)
    assert named(state) == ["engine 2"]


def test_engines_that_are_gone_do_not_lengthen_blocks() -> None:
    state = init(ALPHA)
    for n in range(20):
        state = update(state, "old", Unit(f"gone {n}", 1.0, 1), 0.0)
    for n in range(2):
        state = update(state, "chat", Unit(f"engine {n}", 1.0, 1), 2.0 * ACTIVE_SECONDS)
    assert state.blocks["chat"].size == 2 * UNITS_PER_ENGINE
