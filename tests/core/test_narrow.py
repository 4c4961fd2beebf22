"""The narrow tail: exact where it is not cut, and the best of its rank where it is."""

from __future__ import annotations

import numpy as np
import pytest

from hemostat_calibration.learning.contextual.export import narrow

V, R, ROWS = 400, 12, 3000


def world(seed: int):
    rng = np.random.default_rng(seed)
    up = rng.normal(size=(V, R)) * np.exp(-0.2 * np.arange(R))
    y = rng.normal(size=(ROWS, R)) @ rng.normal(size=(R, R))
    mean = rng.dirichlet(np.full(V, 0.1))
    tail = mean < np.quantile(mean, 0.8)
    return up, y, mean, tail


def left_out(mean, tail, delta):
    return 0.5 * (np.square(delta[:, tail]) @ mean[tail]).mean()


@pytest.mark.parametrize("columns", [0, 1, 4, R])
def test_only_the_tail_changes(columns):
    up, y, mean, tail = world(1)
    cut, turn, lost = narrow(up, y.T @ y / len(y), mean, tail, columns)
    delta, exact = y @ turn.T @ cut.T, y @ up.T
    assert lost == pytest.approx(left_out(mean, tail, exact - delta), rel=1e-3, abs=1e-9)
    np.testing.assert_allclose(delta[:, ~tail], exact[:, ~tail], atol=1e-9)
    assert not cut[tail, columns:].any()
    np.testing.assert_allclose(np.square(cut[:, :columns]).mean(axis=0), 1.0)
    if columns == R:
        np.testing.assert_allclose(delta, exact, atol=1e-9)


@pytest.mark.parametrize("columns", [1, 4, 8])
@pytest.mark.parametrize("seed", range(5))
def test_no_other_map_of_its_rank_leaves_less(columns, seed):
    """Against Eckart and Young's bound, and against what comes first to mind: the largest components of y."""
    up, y, mean, tail = world(seed)
    moment = y.T @ y / len(y)
    cut, turn, lost = narrow(up, moment, mean, tail, columns)
    exact = y @ up.T
    result = left_out(mean, tail, exact - y @ turn.T @ cut.T)
    weighted = np.sqrt(mean[tail])[:, None] * up[tail] @ np.linalg.cholesky(moment)
    least = 0.5 * np.square(np.linalg.svd(weighted)[1][columns:]).sum()
    assert result == pytest.approx(least, rel=1e-3)
    assert lost == pytest.approx(least, rel=1e-3)
    largest = np.linalg.eigh(moment)[1][:, -columns:]
    assert result < left_out(mean, tail, exact - y @ largest @ largest.T @ up.T)


def test_a_tail_that_nothing_is_known_of_is_no_error():
    up, y, mean, tail = world(2)
    for values, p in ((up * 0.0, mean), (up, mean * 0.0), (up, mean)):
        for moment in (y.T @ y / len(y), np.zeros((R, R))):
            cut, turn, lost = narrow(values, moment, p, tail, 3)
            assert np.isfinite(cut).all()
            assert np.isfinite(turn).all()
            assert np.isfinite(lost)
            np.testing.assert_allclose((y @ turn.T @ cut.T)[:, ~tail], (y @ values.T)[:, ~tail], atol=1e-6)
