"""Each row of a table is what the same observations make of the figure alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.slow import examples

from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.statistics.confidence import MeanSequence
from hemostat_calibration.statistics.mean_table import MeanTable, RunningMeanTable
from hemostat_calibration.statistics.running_mean import RunningMean

FIGURES = 5
LO, HI = np.array([0.0, -1.0, -20.0, 0.5, -2.0]), np.array([1.0, 1.0, 20.0, 0.75, -1.0])


@given(seed=st.integers(0, 2**32 - 1), requests=st.integers(0, 30))
@settings(max_examples=examples(50))
def test_rows_are_mean_sequences_to_the_last_bit(seed: int, requests: int) -> None:
    rng = np.random.default_rng(seed)
    table, alone = MeanTable.of(FIGURES), [MeanSequence()] * FIGURES
    for _ in range(requests):
        n = rng.integers(0, 3, FIGURES) * rng.uniform(0.5, 50.0, FIGURES)
        x = rng.normal(3.0, 2.0, FIGURES) * rng.choice([1e-6, 1.0, 1e6])
        table = table.update(x, n)
        pairs = zip(alone, x.tolist(), n.tolist(), strict=True)
        alone = [mean.update(a, b) if b else mean for mean, a, b in pairs]
    assert [table.row(figure) for figure in range(FIGURES)] == alone


@given(seed=st.integers(0, 2**32 - 1), observations=st.integers(0, 30))
@settings(max_examples=examples(50))
def test_rows_are_running_means_to_the_last_bit(seed: int, observations: int) -> None:
    rng = np.random.default_rng(seed)
    table = RunningMeanTable.of(LO, HI)
    alone = [RunningMean(lo, hi) for lo, hi in zip(LO.tolist(), HI.tolist(), strict=True)]
    for _ in range(observations):
        # A little outside of the range is rounding.
        x = np.where(rng.random(FIGURES) < 0.2, HI + 1e-10, rng.uniform(LO, HI))
        x[rng.random(FIGURES) < 0.2] = np.nan
        table = table.update(x)
        alone = [mean if np.isnan(a) else mean.update(a) for mean, a in zip(alone, x.tolist(), strict=True)]
    assert [table.row(figure) for figure in range(FIGURES)] == alone


@pytest.mark.parametrize(
    ("x", "n"),
    [
        ([np.nan, 1.0], [1.0, 1.0]),
        ([np.inf, 1.0], [1.0, 1.0]),
        ([1.0, 1.0], [1.0, np.nan]),
        ([1.0, 1.0], [-1.0, 1.0]),
        ([1.0], [1.0]),
        ([1.0, 1.0], [1.0]),
    ],
)
def test_sums_that_cannot_be_are_refused(x: list[float], n: list[float]) -> None:
    with pytest.raises(InvalidArgumentError):
        MeanTable.of(2).update(np.array(x), np.array(n))


@pytest.mark.parametrize("x", [1.1, -0.1, np.inf])
def test_observations_outside_of_the_range_are_refused(x: float) -> None:
    with pytest.raises(InvalidArgumentError):
        RunningMeanTable.of(np.zeros(1), np.ones(1)).update(np.array([x]))


@pytest.mark.parametrize(("lo", "hi"), [(1.0, 1.0), (0.0, np.inf), (np.nan, 1.0)])
def test_ranges_that_cannot_be_are_refused(lo: float, hi: float) -> None:
    with pytest.raises(InvalidArgumentError):
        RunningMeanTable.of(np.array([lo]), np.array([hi]))


def test_an_update_leaves_what_others_hold() -> None:
    means, running = MeanTable.of(1), RunningMeanTable.of(np.zeros(1), np.ones(1))
    means.update(np.ones(1), np.ones(1))
    running.update(np.ones(1))
    assert not means.sums.any()
    assert not running.sums.any()
