"""Finite-sample intervals of running means: coverage over all looks, in the worlds where asymptotic ones fail."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.interval_worlds import RANGE, WORLDS

from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.statistics import running_mean
from hemostat_calibration.statistics.running_mean import RunningMean, boundary, enough

STREAMS, REQUESTS = 50, 600
MISSED = 5  # of 50 at a nominal 95 %: more have a probability of 4 %; the intervals are conservative


@pytest.mark.parametrize("name", WORLDS)
def test_the_interval_of_a_mean_by_request_covers_at_every_look(name):
    x, n, _, _, mean = WORLDS[name](np.random.default_rng(12), STREAMS, REQUESTS)
    running = mean.cumsum(-1) / np.arange(1, REQUESTS + 1)
    missed = 0
    for values, true in zip(x / n, running, strict=True):
        sequence, good = RunningMean(0.0, RANGE), True
        for t, (value, want) in enumerate(zip(values, true, strict=True)):
            sequence = sequence.update(float(value))
            if t % 20 == 19:
                result = sequence.get()
                good &= result.low <= want <= result.high
        missed += not good
    assert missed <= MISSED


@given(st.floats(0.0, 1e6), st.sampled_from([0.5, 0.05, 1e-4]))
def test_the_boundary_solves_the_mixture_from_above_and_is_below_the_stitched_one(squares, alpha):
    result = float(boundary(np.array(squares), alpha))
    fractions, weights, psi = running_mean._FRACTIONS, running_mean._WEIGHTS, running_mean._PSI
    exponents = np.log(weights) + fractions * result - psi * squares
    evidence = exponents.max() + math.log(np.exp(exponents - exponents.max()).sum())
    assert -1e-9 <= evidence + math.log(alpha) < 1e-6
    # Howard et al., equation (10) at η = 2, s = 1.4, m = 1: what the mixture replaces.
    eta, s = 2.0, 1.4
    v = max(squares, 1.0)
    loss = s * math.log(math.log(eta * v) / math.log(eta)) + math.log(3.1055 / alpha)
    k1, k2 = (eta**0.25 + eta**-0.25) / math.sqrt(2.0), (math.sqrt(eta) + 1.0) / 2.0
    stitched = math.sqrt(k1**2 * v * loss + k2**2 * loss**2) + k2 * loss
    assert result <= stitched


@given(st.lists(st.floats(-2.0, 3.0), min_size=1, max_size=60))
def test_a_mean_equals_its_batch_and_its_fields_are_its_state(values):
    sequence = RunningMean(-2.0, 3.0)
    for value in values:
        sequence = sequence.update(value)
    before = [0.0, *(np.cumsum(values)[:-1] / np.arange(1, len(values)))]
    assert sequence.mean == pytest.approx(np.mean(values), abs=1e-9)
    assert sequence.squares == pytest.approx(np.sum((np.array(values) - before) ** 2) / 25.0, abs=1e-9)
    result = RunningMean(**dataclasses.asdict(sequence)).get()
    assert result == sequence.get()
    assert -2.0 <= result.low <= result.mean <= result.high <= 3.0 or math.isclose(result.low, result.high)


def test_a_higher_level_is_wider_and_more_observations_are_narrower():
    few = many = RunningMean(-1.0, 1.0)
    for at in range(4000):
        value = 0.1 + 0.2 * (at % 2)
        many = many.update(value)
        if at < 400:
            few = few.update(value)
    widths = [mean.get(alpha).high - mean.get(alpha).low for mean, alpha in ((few, 0.05), (few, 0.5), (many, 0.05))]
    assert widths[1] < widths[0] > 4 * widths[2]
    assert many.get().low > 0.0


def test_before_there_is_evidence_nothing_is_refuted():
    result = RunningMean(0.0, 20.0).get()
    assert math.isnan(result.mean)
    assert (result.low, result.high) == (0.0, 20.0)
    assert not enough(result, 0.0, 20.0)
    result = RunningMean(0.0, 20.0).update(0.1).get()
    assert (result.low, result.high) == (0.0, 20.0)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: RunningMean(1.0, 1.0),
        lambda: RunningMean(0.0, math.inf),
        lambda: RunningMean(0.0, 1.0).update(1.1),
        lambda: RunningMean(0.0, 1.0).update(math.nan),
        lambda: RunningMean(0.0, 1.0).get(1.0),
    ],
)
def test_invalid_arguments_are_refused(wrong):
    with pytest.raises(InvalidArgumentError):
        wrong()
