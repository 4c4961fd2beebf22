"""The test of which engine is not like the others. Simulated worlds: tests/bench/faults/."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hemostat_calibration.alarm import odd_engine
from hemostat_calibration.alarm.odd_engine import (
    ACTIVE_SECONDS,
    COHORT,
    LOG_WEIGHTS,
    MAX_ENGINES,
    MAX_STRATA,
    WINDOW_UNITS_PER_ENGINE,
    OddEngines,
    Unit,
    Window,
    init,
    probabilities,
    readings,
    update,
)
from hemostat_calibration.alarm.serialization import load_engines, save_engines
from hemostat_calibration.errors import InvalidArgumentError

ALPHA = 0.01
shares = st.floats(0.001, 0.999)


@given(st.lists(st.booleans(), max_size=63), shares)
def test_over_the_gaps_every_strategy_has_the_mean_of_the_forecast(labels: list[bool], share: float) -> None:
    """So that under exchangeable figures no strategy has an advantage over the forecast, on either label."""
    both = np.array([labels, [not label for label in labels]], bool)
    found = probabilities(both, np.array([share, 0.5]))
    assert found.shape == (2, len(LOG_WEIGHTS), len(labels) + 1)
    assert ((found > 0.0) & (found < 1.0)).all()
    assert np.allclose(found.mean(axis=2), np.array([[share], [0.5]]), rtol=1e-5)


@given(st.integers(1, 40), st.data())
def test_the_denominator_is_the_larger_of_forecast_and_largest_likelihood(units: int, data: st.DataObject) -> None:
    own, forecast = data.draw(st.integers(0, units)), data.draw(st.floats(-60.0, 0.0))
    grid = np.linspace(0.0, 1.0, 2001)
    likelihood = grid**own * (1.0 - grid) ** (units - own)
    expected = max(forecast, math.log(likelihood.max()))
    assert Window(units, own, forecast).log_denominator >= expected - 1e-9
    assert math.isclose(Window(units, own, forecast).log_denominator, expected, abs_tol=0.01)


def total_wealth(state: OddEngines, engine: str) -> float:
    return math.exp(state.tests[engine].log_evidence)


def test_under_random_labels_the_mean_wealth_is_at_most_one_whatever_the_figures() -> None:
    """All label sequences of two engines after two units, weighted by their probability: an oracle by enumeration.

    The figures drift, which the test is not told."""
    share, length = 0.3, 7
    begun = update(update(init(ALPHA), "chat", Unit("a", 1.0, 1)), "chat", Unit("b", 2.0, 1))
    mean = 0.0
    for labels in product((False, True), repeat=length):
        state = begun
        for n, own in enumerate(labels):
            state = update(state, "chat", Unit("a" if own else "b", 3.0 + n, 1))
        probability = math.prod(share if own else 1.0 - share for own in labels)
        mean += probability * total_wealth(state, "a")
    assert mean <= 1.0 + 1e-9


def test_under_exchangeable_figures_the_mean_wealth_is_at_most_one_whatever_the_labels() -> None:
    """All orders of the figures, for labels that follow a pattern: an oracle by sampling orders without ties."""
    rng, labels = np.random.default_rng(0), "aabbaabbbaaaabbb"
    wealth = []
    for _ in range(150):
        state = init(ALPHA)
        for name, figure in zip(labels, rng.permutation(len(labels)), strict=True):
            state = update(state, "chat", Unit(name, float(figure), 1))
        wealth.append(total_wealth(state, "a"))
    assert np.mean(wealth) <= 1.0 + 4.0 * np.std(wealth) / math.sqrt(len(wealth))


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


def test_alpha_that_an_older_version_spent_stays_spent() -> None:
    older = b'{"schema": 1, "engines": {"is": "OddEngines", "fields": {"alpha": 0.01, "begun": 5}}}'
    state = load_engines(older, ALPHA)
    assert (state.begun, state.tests) == (5, {})


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b'{"schema": 3}', b'{"schema": 2, "engines": 3}'])
def test_damaged_state_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidArgumentError, match="begin anew"):
        load_engines(data, ALPHA)


def test_all_alpha_that_is_ever_spent_is_at_most_alpha() -> None:
    state, spent = init(ALPHA), []
    for n in range(20 * COHORT):
        state = update(state, "chat", Unit(f"engine {n}", 1.0, 1), float(n))
        spent.append(state.tests[f"engine {n}"].alpha)
    assert ALPHA * 0.98 < sum(spent) <= ALPHA
    assert len(state.tests) == MAX_ENGINES


def test_strata_are_bounded_and_figures_that_are_none_are_left_out() -> None:
    state = init(ALPHA)
    for n in range(MAX_STRATA + 10):
        state = update(state, f"kind {n}", Unit("engine 0", 1.0, 1), float(n))
        state = update(state, f"kind {n}", Unit("engine 1", float("nan"), 1), float(n))
    assert len(state.strata) == MAX_STRATA
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


def test_a_window_of_one_engine_alone_is_no_recovery() -> None:
    """It has nothing to be compared with."""
    state = lived(init(ALPHA), 200, odd=2)
    for n in range(400):
        state = update(state, "code", Unit("engine 2", 0.03, 50), 200.0 + n)
    assert named(state) == ["engine 2"]


def test_engines_that_are_gone_are_neither_tested_nor_counted() -> None:
    state = init(ALPHA)
    for n in range(20):
        state = update(state, "old", Unit(f"gone {n}", 1.0, 1), 0.0)
    gone = state.tests["gone 0"]
    for n in range(2 * WINDOW_UNITS_PER_ENGINE + 2):
        state = update(state, "chat", Unit(f"engine {n % 2}", 1.0, 1), 2.0 * ACTIVE_SECONDS)
    assert state.tests["gone 0"] is gone
    assert state.tests["engine 0"].windows == 2
    assert state.tests["engine 0"].window.units <= 1, "a window of two engines has ended"


def test_a_change_that_comes_late_is_found() -> None:
    state = lived(init(ALPHA), 1000, odd=None)
    assert not named(state)
    state = lived(state, 120, odd=2, seed=1)
    (reading,) = [one for one in readings(state) if one.raised]
    assert (reading.engine, reading.farther) == ("engine 2", False)


def test_an_engine_that_joins_late_is_found_as_soon() -> None:
    """Its share of the units is that since it joined: of 100,000 units that others had before, it has none."""
    state = lived(init(ALPHA), 40, odd=None)
    tests = {name: replace(test, units=test.units + 25_000) for name, test in state.tests.items()}
    state = replace(state, units=state.units + 100_000, tests=tests)
    rng = np.random.default_rng(0)
    for _ in range(300):
        engine = int(rng.integers(4))
        name, level = (f"engine {engine}", 0.6) if engine < 3 else ("new", 2.0)
        state = update(state, "chat", Unit(name, level * rng.lognormal(0.0, 0.8), 50))
    assert [one.engine for one in readings(state) if one.raised] == ["new"]


def test_an_engine_that_is_farther_is_said_to_be() -> None:
    rng, state = np.random.default_rng(0), init(ALPHA)
    for n in range(100):
        level = 3.0 if n % 4 == 1 else 0.6
        state = update(state, "chat", Unit(f"engine {n % 4}", level * rng.lognormal(0.0, 0.3), 50), float(n))
    (reading,) = [one for one in readings(state) if one.raised]
    assert (reading.engine, reading.farther) == ("engine 1", True)
    assert odd_engine.FARTHER.shape == LOG_WEIGHTS.shape
