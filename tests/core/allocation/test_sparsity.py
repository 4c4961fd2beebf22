"""Budgets of zeros, compared with brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hemostat_calibration.allocation.sparsity import GROWTH, LEAST_KEPT, LEAST_LOST, share_units, share_zeros
from hemostat_calibration.errors import InvalidArgumentError

layers = st.lists(st.tuples(st.floats(0.0, 100.0), st.integers(1, 2000)), min_size=1, max_size=8)


def expected_loss(losses: dict[str, float], sizes: dict[str, int], zeros: dict[str, int], sparsity: float) -> float:
    return sum(losses[name] * np.exp(GROWTH * (zeros[name] / sizes[name] - sparsity)) for name in losses)


@given(layers, st.floats(0.01, 0.99))
def test_the_sum_is_exact_and_no_layer_is_beyond_its_bounds(found: list[tuple[float, int]], sparsity: float) -> None:
    losses = {str(n): loss for n, (loss, _) in enumerate(found)}
    sizes = {str(n): size for n, (_, size) in enumerate(found)}
    zeros = share_zeros(losses, sizes, sparsity)
    assert sum(zeros.values()) == round(sparsity * sum(sizes.values()))
    for name, size in sizes.items():
        assert LEAST_LOST * sparsity * size - 1 <= zeros[name] <= (1.0 - LEAST_KEPT * (1.0 - sparsity)) * size + 1


def test_no_exchange_of_zeros_between_two_layers_lowers_the_loss() -> None:
    rng = np.random.default_rng(0)
    names = [f"layer {n}" for n in range(6)]
    losses = dict(zip(names, rng.lognormal(0.0, 1.0, 6).tolist(), strict=True))
    sizes = dict(zip(names, rng.integers(2000, 9000, 6).tolist(), strict=True))
    zeros = share_zeros(losses, sizes, 0.5)
    assert zeros != {name: round(0.5 * size) for name, size in sizes.items()}
    least = expected_loss(losses, sizes, zeros, 0.5)
    for name in names:
        for other in names:
            if name != other:
                moved = zeros | {name: zeros[name] + 20, other: zeros[other] - 20}
                assert expected_loss(losses, sizes, moved, 0.5) > least


def test_layers_that_lose_the_same_for_each_weight_have_the_same_sparsity() -> None:
    assert share_zeros({"small": 1.0, "large": 10.0}, {"small": 100, "large": 1000}, 0.3) == {"small": 30, "large": 300}


def test_a_layer_without_a_loss_gives_what_it_may() -> None:
    assert share_zeros({"a": 0.0, "b": 1.0}, {"a": 100, "b": 100}, 0.5) == {"a": 75, "b": 25}


@pytest.mark.parametrize("sparsity", [0.29, 0.57, 0.58])
def test_a_share_that_binary_fractions_round_down_is_reached(sparsity: float) -> None:
    """0.29 · 100 is 28.999999999999996."""
    assert share_zeros({"a": 1.0}, {"a": 100}, sparsity) == {"a": round(100 * sparsity)}


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.floats(0.0, 1.0))
def test_units_with_the_least_score_by_weight_are_lost(scores: list[int], sparsity: float) -> None:
    values, weights = np.array(scores, np.float64), np.arange(1, len(scores) + 1)
    lost = share_units(values, weights, sparsity)
    dropped = int(weights[lost].sum())
    assert sparsity * weights.sum() <= dropped <= sparsity * weights.sum() + weights.max()
    by_weight = values / weights
    if lost.any() and not lost.all():
        assert by_weight[~lost].min() >= by_weight[lost].max()


def test_bad_arguments() -> None:
    for sparsity in (0.0, 1.0, float("nan")):
        with pytest.raises(InvalidArgumentError, match="sparsity is"):
            share_zeros({"a": 1.0}, {"a": 10}, sparsity)
    for loss in (float("nan"), float("inf"), -1.0):
        with pytest.raises(InvalidArgumentError, match="losses must be finite"):
            share_zeros({"a": loss}, {"a": 10}, 0.5)
    with pytest.raises(InvalidArgumentError, match="no positive number"):
        share_zeros({"a": 1.0}, {}, 0.5)
    with pytest.raises(InvalidArgumentError, match=r"sparsity is 1\.5"):
        share_units(np.ones(2), np.ones(2, int), 1.5)
    with pytest.raises(InvalidArgumentError, match="finite"):
        share_units(np.array([1.0, np.nan]), np.ones(2, int), 0.5)
