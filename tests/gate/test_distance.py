"""Distances from lists of the likeliest ids: without bias, and of one partition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hemostat_calibration.arrays import Floats, Ids
from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.gate.distance import Listed, distance_gain, sampled_distance

VOCAB = 40


def listed(probabilities: Floats, output: Ids, top_k: int) -> Listed:
    """Returns what a server says of a model: its likeliest ids at each position, and the emitted one."""
    ids = np.argsort(-probabilities, axis=1)[:, :top_k].astype(np.int32)
    log_p = np.log(probabilities)
    rows = np.arange(len(output))
    return Listed(ids, np.take_along_axis(log_p, ids, axis=1), log_p[rows, output])


def models(seed: int) -> tuple[Floats, Floats]:
    random = np.random.default_rng(seed)
    logits = random.normal(0.0, 1.5, VOCAB)
    other = logits + random.normal(0.0, 0.7, VOCAB)
    p, q = np.exp(logits), np.exp(other)
    return p / p.sum(), q / q.sum()


@pytest.mark.parametrize("top_k", [1, 5, VOCAB])
@pytest.mark.parametrize("seed", [1, 2])
def test_the_sampled_distance_has_no_bias_however_short_the_lists_are(top_k: int, seed: int) -> None:
    """Its mean over all tokens, weighted by their probabilities, is the total variation."""
    p, q = models(seed)
    output = np.arange(VOCAB, dtype=np.int32)
    rows = np.tile(p, (VOCAB, 1)), np.tile(q, (VOCAB, 1))
    values = sampled_distance(listed(rows[0], output, top_k), listed(rows[1], output, top_k), output)
    assert p @ values == pytest.approx(0.5 * np.abs(p - q).sum(), abs=1e-12)
    assert ((values >= 0.0) & (values <= 1.0)).all()


@given(st.integers(0, 10_000), st.integers(1, 8))
def test_the_gain_is_that_of_the_partition_and_never_more_than_both_distances(seed: int, top_k: int) -> None:
    (r, c), (s, _) = models(seed), models(seed + 1)
    output = np.zeros(1, np.int32)
    reference, candidate, stable = (listed(x[None, :], output, top_k) for x in (r, c, s))
    gain = distance_gain(reference, candidate, stable)
    assert gain.shape == (1,)
    assert abs(float(gain[0])) <= 0.5 * (np.abs(r - c).sum() + np.abs(r - s).sum()) + 1e-12
    assert distance_gain(reference, stable, candidate) == pytest.approx(-gain)


def test_the_gain_of_whole_lists_is_the_difference_of_the_total_variations() -> None:
    (r, c), (s, _) = models(5), models(6)
    output = np.zeros(1, np.int32)
    reference, candidate, stable = (listed(x[None, :], output, VOCAB) for x in (r, c, s))
    expected = 0.5 * (np.abs(r - c).sum() - np.abs(r - s).sum())
    assert distance_gain(reference, candidate, stable)[0] == pytest.approx(expected)


def test_arrays_that_do_not_fit_are_refused() -> None:
    one = listed(models(1)[0][None, :], np.zeros(1, np.int32), 3)
    with pytest.raises(InvalidArgumentError, match=r"must be \[T, K\]"):
        Listed(one.ids, one.logprobs, np.zeros(2))
    with pytest.raises(InvalidArgumentError, match="must be as many"):
        sampled_distance(one, one, np.zeros(2, np.int32))
