"""The test of which engine is an outlier. Simulated worlds: tests/bench/faults/."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hemostat_calibration.alarm import outlier_engine
from hemostat_calibration.alarm.outlier_engine import (
    ACTIVE_SECONDS,
    COHORT,
    FIRST_PART,
    MAX_ENGINES,
    MAX_STRATA,
    RESTART_UNITS_PER_ENGINE,
    OutlierTest,
    Unit,
    _held_back,
    init,
    max_log_likelihood,
    readings,
    update,
)
from hemostat_calibration.alarm.placement import FARTHER, LOG_WEIGHTS, placements
from hemostat_calibration.alarm.serialization import load_engines, save_engines
from hemostat_calibration.arrays import Floats
from hemostat_calibration.errors import InvalidArgumentError

ALPHA = 0.01
shares = st.floats(0.001, 0.999)


@given(st.lists(st.booleans(), max_size=40))
def test_every_strategy_spreads_a_probability_of_1_over_the_gaps(labels: list[bool]) -> None:
    """Own and another's each: so that under exchangeable figures no strategy has an advantage, whatever the label."""
    both = np.array([labels, [not label for label in labels]], bool)
    result = np.stack([placements(both, place) for place in range(len(labels) + 1)])
    assert result.shape == (len(labels) + 1, 2, 2, len(LOG_WEIGHTS))
    assert (result > 0.0).all()
    assert np.allclose(result.sum(axis=0), 1.0)


@given(st.lists(st.booleans(), max_size=12), st.data())
def test_placements_are_the_mean_over_thresholds(labels: list[bool], data: st.DataObject) -> None:
    """Oracle: the definition, threshold by threshold. The other direction is the mirror image."""
    units, noise = len(labels), 0.02
    place = data.draw(st.integers(0, units))
    total = own = other = 0.0
    for threshold in range(units + 1):
        share = (threshold + 0.5) / (units + 1)
        likelihood = share**-threshold * (1.0 - share) ** (threshold - units)
        for index, label in enumerate(labels):
            likelihood *= 1.0 - noise if label == (index < threshold) else noise
        below = (place <= threshold) / (threshold + 1)
        above = (place >= threshold) / (units - threshold + 1)
        total += likelihood
        own += likelihood * ((1.0 - noise) * below + noise * above)
        other += likelihood * (noise * below + (1.0 - noise) * above)
    result = placements(np.array(labels, bool), place)
    mirrored = placements(np.array(labels[::-1], bool), units - place)
    assert np.allclose([result[0][0], result[1][0]], [own / total, other / total])
    assert np.allclose([mirrored[0][1], mirrored[1][1]], [own / total, other / total])


@given(st.integers(0, 40), st.integers(0, 40))
def test_no_constant_probability_makes_labels_more_likely(own: int, others: int) -> None:
    grid = np.linspace(0.0, 1.0, 2001)
    expected = math.log((grid**own * (1.0 - grid) ** others).max())
    result = float(max_log_likelihood(np.array([own, others])))
    assert expected - 1e-9 <= result <= expected + 0.01


def both_wealths(state: OutlierTest, engine: str) -> Floats:
    """Of bets on gaps and of bets on labels, what is held back included: float64 [2]."""
    test = state.tests[engine]
    held_back = (1.0 - FIRST_PART) * _held_back(test.restarts)
    result: Floats = np.exp(test.wealth.log_wealth).reshape(2, -1).sum(axis=1) + held_back
    return result


@pytest.fixture
def frequent_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every two units: all runs begin anew within lives that are short enough to enumerate."""
    monkeypatch.setattr(outlier_engine, "RESTART_UNITS_PER_ENGINE", 1)


@pytest.mark.usefixtures("frequent_restarts")
def test_under_random_labels_the_mean_wealth_is_at_most_one_whatever_the_figures() -> None:
    """All label sequences of two engines after two units, weighted by their probability: an oracle by enumeration.

    The figures drift, which the test is not told, so that bets on gaps alone would win."""
    share, length = 0.3, 8
    begun = update(update(init(ALPHA), "chat", Unit("a", 1.0, 1)), "chat", Unit("b", 2.0, 1))
    mean = np.zeros(2)
    for labels in product((False, True), repeat=length):
        state = begun
        for n, own in enumerate(labels):
            state = update(state, "chat", Unit("a" if own else "b", 3.0 + n, 1))
        assert state.tests["a"].restarts == 4
        probability = math.prod(share if own else 1.0 - share for own in labels)
        mean += probability * both_wealths(state, "a")
        assert math.isclose(state.tests["a"].log_evidence, math.log(both_wealths(state, "a").min()))
    assert mean[0] > 1.1
    assert mean[1] <= 1.0 + 1e-9


@pytest.mark.usefixtures("frequent_restarts")
@pytest.mark.parametrize("labels", ["abbabb", "babaaa"])
def test_under_exchangeable_figures_the_mean_wealth_is_one_whatever_the_labels(labels: str) -> None:
    """All orders of the figures: an oracle by enumeration."""
    wealth = []
    for figures in permutations(range(len(labels))):
        state = init(ALPHA)
        for name, figure in zip(labels, figures, strict=True):
            state = update(state, "chat", Unit(name, float(figure), 1))
        wealth.append(both_wealths(state, "a")[0])
    assert math.isclose(float(np.mean(wealth)), 1.0)


def named(state: OutlierTest) -> list[str]:
    return [reading.engine for reading in readings(state) if reading.raised is not None]


def lived(state: OutlierTest, units: int, odd: int | None, seed: int = 0) -> OutlierTest:
    rng = np.random.default_rng(seed)
    for n in range(units):
        level = 0.03 if n % 4 == odd else 0.6
        state = update(state, "chat", Unit(f"engine {n % 4}", level * rng.lognormal(0.0, 0.3), 50), float(n))
    return state


def test_the_alarm_says_in_which_direction_and_clears_when_the_engine_is_repaired() -> None:
    state = lived(init(ALPHA), 200, odd=2)
    (reading,) = [reading for reading in readings(state) if reading.raised]
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


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b'{"schema": 6}', b'{"schema": 6, "state": {"begun": 3}}'])
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
    assert len([change for change in changes if len(change) == 2]) == 1, "the alarm does not flap"
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
    for n in range(2 * RESTART_UNITS_PER_ENGINE + 1):
        state = update(state, "chat", Unit(f"engine {n % 2}", 1.0, 1), 2.0 * ACTIVE_SECONDS)
    assert state.tests["gone 0"] is gone
    assert state.tests["engine 0"].restarts == 1, "after the units of two engines"


def test_a_change_that_comes_late_is_found() -> None:
    state = lived(init(ALPHA), 1000, odd=None)
    assert not named(state)
    state = lived(state, 120, odd=2, seed=1)
    (reading,) = [reading for reading in readings(state) if reading.raised]
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
    assert [reading.engine for reading in readings(state) if reading.raised] == ["new"]


def test_an_engine_that_is_farther_is_said_to_be() -> None:
    rng, state = np.random.default_rng(0), init(ALPHA)
    for n in range(100):
        level = 3.0 if n % 4 == 1 else 0.6
        state = update(state, "chat", Unit(f"engine {n % 4}", level * rng.lognormal(0.0, 0.3), 50), float(n))
    (reading,) = [reading for reading in readings(state) if reading.raised]
    assert (reading.engine, reading.farther) == ("engine 1", True)
    assert FARTHER.shape == LOG_WEIGHTS.shape
