"""Finite-sample intervals of running means: coverage over all looks, in the worlds where asymptotic ones fail."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.interval_worlds import MAX_TOKENS, RANGE, WORLDS, truth

from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.statistics import running_mean
from hemostat_calibration.statistics.running_mean import RunningMean, RunningRatio, boundary, enough, ratio_ends

STREAMS, REQUESTS = 50, 600
MISSED = 5  # of 50 at a nominal 95 %: more have a probability of 4 %; the intervals are conservative


@pytest.mark.parametrize("name", WORLDS)
def test_the_interval_of_a_ratio_covers_at_every_look(name):
    x, n, mean_x, mean_n, _ = WORLDS[name](np.random.default_rng(11), STREAMS, REQUESTS)
    looks = np.unique(np.geomspace(1, REQUESTS, 60).astype(int)) - 1
    sums = [part.cumsum(-1)[:, looks] for part in (x, n, x * x, x * n, n * n)]
    low, high = ratio_ends(*sums, lo=0.0, hi=RANGE, max_n=MAX_TOKENS, alpha=0.05)
    true = truth(mean_x, mean_n)[:, looks]
    assert (~((low <= true) & (true <= high)).all(-1)).sum() <= MISSED
    assert (low >= 0.0).all()
    assert (high <= RANGE).all()


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
                found = sequence.get()
                good &= found.low <= want <= found.high
        missed += not good
    assert missed <= MISSED


@given(st.floats(0.0, 1e6), st.sampled_from([0.5, 0.05, 1e-4]))
def test_the_boundary_solves_the_mixture_from_above_and_is_below_the_stitched_one(squares, alpha):
    found = float(boundary(np.array(squares), alpha))
    fractions, weights, psi = running_mean._FRACTIONS, running_mean._WEIGHTS, running_mean._PSI
    exponents = np.log(weights) + fractions * found - psi * squares
    evidence = exponents.max() + math.log(np.exp(exponents - exponents.max()).sum())
    assert -1e-9 <= evidence + math.log(alpha) < 1e-6
    # Howard et al., equation (10) at η = 2, s = 1.4, m = 1: what the mixture replaces.
    eta, s = 2.0, 1.4
    v = max(squares, 1.0)
    loss = s * math.log(math.log(eta * v) / math.log(eta)) + math.log(3.1055 / alpha)
    k1, k2 = (eta**0.25 + eta**-0.25) / math.sqrt(2.0), (math.sqrt(eta) + 1.0) / 2.0
    stitched = math.sqrt(k1**2 * v * loss + k2**2 * loss**2) + k2 * loss
    assert found <= stitched


@given(st.lists(st.floats(-2.0, 3.0), min_size=1, max_size=60))
def test_a_mean_equals_its_batch_and_its_fields_are_its_state(values):
    sequence = RunningMean(-2.0, 3.0)
    for value in values:
        sequence = sequence.update(value)
    before = [0.0, *(np.cumsum(values)[:-1] / np.arange(1, len(values)))]
    assert sequence.mean == pytest.approx(np.mean(values), abs=1e-9)
    assert sequence.squares == pytest.approx(np.sum((np.array(values) - before) ** 2) / 25.0, abs=1e-9)
    found = RunningMean(**dataclasses.asdict(sequence)).get()
    assert found == sequence.get()
    assert -2.0 <= found.low <= found.mean <= found.high <= 3.0 or math.isclose(found.low, found.high)


@given(st.lists(st.tuples(st.floats(0.0, 1.0), st.integers(1, 50)), min_size=1, max_size=60))
def test_a_ratio_contains_its_estimate_and_its_fields_are_its_state(pairs):
    sequence = RunningRatio(0.0, 1.0, 50.0)
    for value, n in pairs:
        sequence = sequence.update(value * n, n)
    x, n = np.array([value * n for value, n in pairs]), np.array([n for _, n in pairs])
    assert sequence.mean == pytest.approx(x.sum() / n.sum())
    found = RunningRatio(**dataclasses.asdict(sequence)).get()
    assert found == sequence.get()
    assert 0.0 <= found.low <= found.mean + 1e-12
    assert found.mean - 1e-12 <= found.high <= 1.0


def test_a_higher_level_is_wider_and_more_observations_are_narrower():
    few = many = RunningRatio(-1.0, 1.0, 100.0)
    mean_few = mean_many = RunningMean(-1.0, 1.0)
    for at in range(4000):
        value = 0.1 + 0.2 * (at % 2)
        many, mean_many = many.update(value * 50, 50), mean_many.update(value)
        if at < 400:
            few, mean_few = few.update(value * 50, 50), mean_few.update(value)
    for small, large in ((few, many), (mean_few, mean_many)):
        widths = [
            one.get(alpha).high - one.get(alpha).low for one, alpha in ((small, 0.05), (small, 0.5), (large, 0.05))
        ]
        assert widths[1] < widths[0] > 4 * widths[2]
    assert large.get().low > 0.0


def test_before_there_is_evidence_nothing_is_refuted():
    for sequence in (RunningMean(0.0, 20.0), RunningRatio(0.0, 20.0, 100.0)):
        found = sequence.get()
        assert math.isnan(found.mean)
        assert (found.low, found.high) == (0.0, 20.0)
        assert not enough(found, 0.0, 20.0)
    found = RunningMean(0.0, 20.0).update(0.1).get()
    assert (found.low, found.high) == (0.0, 20.0)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: RunningMean(1.0, 1.0),
        lambda: RunningRatio(0.0, math.inf, 1.0),
        lambda: RunningRatio(0.0, 1.0, 0.0),
        lambda: RunningMean(0.0, 1.0).update(1.1),
        lambda: RunningMean(0.0, 1.0).update(math.nan),
        lambda: RunningRatio(0.0, 1.0, 5.0).update(1.0, 6.0),
        lambda: RunningRatio(0.0, 1.0, 5.0).update(3.1, 3.0),
        lambda: RunningRatio(0.0, 1.0, 5.0).update(math.nan, 3.0),
        lambda: RunningMean(0.0, 1.0).get(1.0),
        lambda: RunningRatio(0.0, 1.0, 5.0).get(0.0),
    ],
)
def test_invalid_arguments_are_refused(wrong):
    with pytest.raises(InvalidArgumentError):
        wrong()
