"""Reduced-rank ridge from sums against the same from the rows themselves."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.support.slow import examples

from hemostat_calibration.learning.contextual.regression import (
    PENALTIES,
    Moments,
    choose,
    fitted,
    full_rank,
    standardiser,
    total,
)

A, D, N = 6, 5, 300


def rows(seed, n=N, noise=0.5, true_rank=2):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, A)) @ rng.normal(size=(A, A)) + 2.0
    b = rng.normal(size=(A + 1, true_rank)) @ rng.normal(size=(true_rank, D))
    inputs = np.column_stack([x, np.ones(n)])
    return inputs, inputs @ b + noise * rng.normal(size=(n, D))


def moments(x, t):
    return Moments(x.T @ x, x.T @ t, float(len(x)))


def coefficients(low):
    return (low.up @ low.read).T


def loss(x, t, b):
    return 0.5 * np.square(t - x @ b).sum() / len(x)


@given(st.integers(0, 1000), st.sampled_from(PENALTIES))
@settings(max_examples=examples(25))
def test_ridge_of_every_rank_is_that_of_the_rows(seed, penalty):
    x, t = rows(seed)
    s = standardiser(moments(x, t))
    standard = x @ s.T
    np.testing.assert_allclose(standard[:, :-1].mean(0), 0.0, atol=1e-9)
    # One scale for all: their variances keep their ratios.
    assert standard[:, :-1].var(0).mean() == pytest.approx(1.0)
    np.testing.assert_allclose(standard[:, :-1].std(0) / standard[:, 0].std(), x[:, :-1].std(0) / x[:, 0].std())
    stacked = np.vstack([standard, np.sqrt(penalty * N) * np.eye(A + 1)])
    expected = np.linalg.lstsq(stacked, np.vstack([t, np.zeros((A + 1, D))]), rcond=None)[0]
    np.testing.assert_allclose(x @ full_rank(moments(x, t), penalty), standard @ expected, atol=1e-6)
    (low,) = fitted(moments(x, t), [penalty], D)
    np.testing.assert_allclose(x @ coefficients(low), standard @ expected, atol=1e-6)
    np.testing.assert_allclose(low.up.T @ low.up, np.eye(D), atol=1e-8)


@given(st.integers(0, 1000), st.integers(1, D))
@example(361, 5)  # of all seeds the one where the penalty is felt most: 4e-6
@settings(max_examples=examples(25))
def test_no_map_of_the_rank_is_better(seed, rank):
    """With next to no penalty: against the best that a search from the found one finds."""
    x, t = rows(seed, noise=2.0, true_rank=D)
    (low,) = fitted(moments(x, t), [1e-9], rank)
    best = loss(x, t, coefficients(low))
    projected = x @ np.linalg.lstsq(x, t, rcond=None)[0]
    u, sizes, v = np.linalg.svd(projected, full_matrices=False)
    oracle = 0.5 * np.square(t - (u[:, :rank] * sizes[:rank]) @ v[:rank]).sum() / len(x)
    assert best == pytest.approx(oracle, rel=1e-5)


@given(st.integers(0, 1000))
@settings(max_examples=examples(25))
def test_the_gain_is_what_held_out_rows_say(seed):
    """The choice's gain, from sums, against fitting without each fold and measuring on its rows."""
    x, t = rows(seed, noise=3.0)
    parts = [moments(x[k::4], t[k::4]) for k in range(4)]
    whole = total(parts)
    result = choose(parts, (1, 2, 3))
    rank, gain = len(result.read), 0.0
    for k, part in enumerate(parts):
        (low,) = fitted(whole - part, [result.penalty], rank)
        # `choose` standardises by all rows, `fitted` by those that it is given.
        gain += (loss(x[k::4], t[k::4], np.zeros((A + 1, D))) - loss(x[k::4], t[k::4], coefficients(low))) / 4
    assert result.gain == pytest.approx(gain, rel=0.02, abs=1e-3)
    assert result.error >= 0.0


def test_noise_teaches_nothing():
    rng = np.random.default_rng(0)
    chosen = 0
    for _ in range(40):
        x = np.column_stack([rng.normal(size=(60, A)), np.ones(60)])
        t = rng.normal(size=(60, D))
        result = choose([moments(x[k::4], t[k::4]) for k in range(4)], (1, 2, 5))
        chosen += result is not None and result.gain > result.error
        assert result is None or result.penalty >= 0.1
    assert chosen < 20


def test_the_true_rank_suffices():
    x, t = rows(3, n=2000)
    parts = [moments(x[k::4], t[k::4]) for k in range(4)]
    assert len(choose(parts, (1, 2, 3, 4, 5)).read) in {2, 3}
