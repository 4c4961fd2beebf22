"""The allocation against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.slow import examples

from hemostat_calibration.allocation.knapsack import Options, allocate
from hemostat_calibration.errors import InvalidArgumentError

UNIT = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 30)), min_size=1, max_size=4)


def options_of(units: list[list[tuple[int, int]]]) -> dict[str, Options]:
    return {
        str(n): Options(np.array([size for size, _ in unit]), np.array([float(loss) for _, loss in unit]))
        for n, unit in enumerate(units)
    }


def least(options: dict[str, Options], budget: int) -> float:
    """The optimum, of all choices."""
    return min(
        sum(float(option.losses[n]) for option, n in zip(options.values(), choice, strict=True))
        for choice in itertools.product(*(range(len(option.sizes)) for option in options.values()))
        if sum(int(option.sizes[n]) for option, n in zip(options.values(), choice, strict=True)) <= budget
    )


@settings(max_examples=examples(300))
@given(st.lists(UNIT, min_size=1, max_size=5), st.integers(0, 50))
def test_against_all_choices(units: list[list[tuple[int, int]]], spare: int) -> None:
    options = options_of(units)
    smallest = sum(int(option.sizes.min()) for option in options.values())
    budget = smallest + spare
    result = allocate(options, budget)
    optimum = least(options, budget)
    assert result.size == sum(int(options[name].sizes[n]) for name, n in result.chosen.items()) <= budget
    assert result.loss == pytest.approx(sum(float(options[name].losses[n]) for name, n in result.chosen.items()))
    assert result.lower_bound <= optimum + 1e-9
    # No worse than the optimum by more than one unit's largest step.
    assert optimum <= result.loss <= optimum + max(float(np.ptp(option.losses)) for option in options.values()) + 1e-9
    with pytest.raises(InvalidArgumentError, match=f"the smallest options need {smallest}"):
        allocate(options, smallest - 1)


@settings(max_examples=examples(200))
@given(st.lists(st.lists(st.integers(0, 9), min_size=4, max_size=4), min_size=2, max_size=5), st.integers(0, 12))
def test_equal_steps_give_the_optimum(steps: list[list[int]], budget: int) -> None:
    """Convex losses on equal sizes: what is left is less than a step."""
    options = {
        str(n): Options(np.arange(5), np.append(np.cumsum(sorted(unit))[::-1], 0).astype(float))
        for n, unit in enumerate(steps)
    }
    result = allocate(options, budget)
    assert result.loss == pytest.approx(least(options, budget)) == pytest.approx(result.lower_bound)


def test_an_option_off_the_hull_fills_the_rest() -> None:
    options = {
        "a": Options(np.array([0, 2, 10]), np.array([10.0, 9.0, 0.0])),
        "b": Options(np.array([0, 10]), np.array([10.0, 1.0])),
    }
    result = allocate(options, 12)
    assert result.chosen == {"a": 2, "b": 0}
    assert allocate(options, 2).chosen == {"a": 1, "b": 0}


def test_many_units_come_close_to_the_bound() -> None:
    rng = np.random.default_rng(0)
    sizes = np.array([2, 3, 4, 5, 6, 8, 16])
    options = {
        str(n): Options(sizes * int(rng.integers(100, 900)), rng.gamma(1.0, 1.0) * 4.0 ** -sizes.astype(float))
        for n in range(200)
    }
    budget = sum(int(option.sizes[2]) for option in options.values())
    result = allocate(options, budget)
    uniform = sum(float(option.losses[2]) for option in options.values())
    assert result.lower_bound <= result.loss < result.lower_bound * 1.01 < 0.8 * uniform


@pytest.mark.parametrize(
    ("sizes", "losses", "message"),
    [
        ([], [], "one size and one loss"),
        ([1, 2], [1.0], "one size and one loss"),
        ([-1], [1.0], "0 or more"),
        ([1], [np.nan], "finite"),
    ],
)
def test_bad_options(sizes: list[int], losses: list[float], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        Options(np.array(sizes, np.int64), np.array(losses, np.float64))
