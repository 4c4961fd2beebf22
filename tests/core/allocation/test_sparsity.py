"""Budgets of zeros, compared with brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hemostat_calibration.allocation.sparsity import share_units, share_zeros
from hemostat_calibration.errors import InvalidArgumentError

Layers = dict[str, list[int]]
layers = st.dictionaries(st.sampled_from("abcd"), st.lists(st.integers(0, 9), min_size=1, max_size=8), min_size=1)


def lost_score(scores: Layers, zeros: dict[str, int]) -> int:
    return sum(sum(sorted(values)[: zeros[name]]) for name, values in scores.items())


@given(layers, st.floats(0.0, 1.0))
def test_the_least_score_is_lost(scores: Layers, sparsity: float) -> None:
    sizes = {name: len(values) for name, values in scores.items()}
    quantiles = {name: np.sort(np.array(values, np.float64)) for name, values in scores.items()}
    zeros = share_zeros(quantiles, sizes, sparsity, 1.0)
    wanted = round(sparsity * sum(sizes.values()))
    assert sum(zeros.values()) == wanted
    assert all(0 <= zeros[name] <= size for name, size in sizes.items())
    assert lost_score(scores, zeros) == sum(sorted(itertools.chain(*scores.values()))[:wanted])


@given(layers, st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_no_layer_loses_more_than_its_part(scores: Layers, sparsity: float, most: float) -> None:
    sparsity, most = sorted((sparsity, most))
    sizes = {name: len(values) for name, values in scores.items()}
    quantiles = {name: np.sort(np.array(values, np.float64)) for name, values in scores.items()}
    zeros = share_zeros(quantiles, sizes, sparsity, most)
    room = {name: int(most * size + 1e-9) for name, size in sizes.items()}
    assert all(zeros[name] <= room[name] for name in sizes)
    assert sum(zeros.values()) == min(round(sparsity * sum(sizes.values())), sum(room.values()))


@pytest.mark.parametrize("share", [0.29, 0.57, 0.58])
def test_a_share_that_binary_fractions_round_down_is_reached(share: float) -> None:
    """0.29 · 100 is 28.999999999999996."""
    assert share_zeros({"a": np.arange(100.0)}, {"a": 100}, share, share) == {"a": round(100 * share)}


def test_a_few_quantiles_give_nearly_the_same() -> None:
    rng = np.random.default_rng(0)
    scores = {name: np.sort(rng.lognormal(mean, 1.0, 5000)) for name, mean in (("a", 0.0), ("b", 1.0), ("c", 3.0))}
    sizes = dict.fromkeys(scores, 5000)
    exact = share_zeros(scores, sizes, 0.5, 0.9)
    places = ((np.arange(200) + 0.5) * 25).astype(int)
    found = share_zeros({name: values[places] for name, values in scores.items()}, sizes, 0.5, 0.9)
    assert sum(found.values()) == sum(exact.values()) == 7500
    assert exact["a"] > exact["b"] > exact["c"]
    assert all(abs(found[name] - exact[name]) <= 50 for name in exact)


def test_layers_of_different_size_are_cut_at_one_threshold() -> None:
    scores = {"small": np.arange(10.0), "large": np.arange(0.0, 10.0, 0.01)}
    zeros = share_zeros(scores, {"small": 10, "large": 1000}, 0.3, 1.0)
    assert zeros == {"small": 3, "large": 300}


@given(layers, st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_units_with_the_least_score_by_weight_are_lost(scores: Layers, sparsity: float, most: float) -> None:
    sparsity, most = sorted((sparsity, most))
    arrays = {name: np.array(values, np.float64) for name, values in scores.items()}
    weights = {name: np.arange(1, len(values) + 1) for name, values in scores.items()}
    lost = share_units(arrays, weights, sparsity, most)
    total = sum(int(w.sum()) for w in weights.values())
    dropped = sum(int(weights[name][lost[name]].sum()) for name in scores)
    for name in scores:
        assert weights[name][lost[name]].sum() <= most * weights[name].sum()
    largest = max(int(w.max()) for w in weights.values())
    assert dropped <= sparsity * total + largest
    if most == 1.0:
        assert dropped >= sparsity * total
        by_weight = {name: arrays[name] / weights[name] for name in scores}
        worst = max((by_weight[n][lost[n]].max() for n in scores if lost[n].any()), default=0.0)
        assert all(by_weight[n][~lost[n]].min() >= worst for n in scores if not lost[n].all())


@pytest.mark.parametrize("share", [share_zeros, share_units])
def test_bad_arguments(share: object) -> None:
    assert callable(share)
    with pytest.raises(InvalidArgumentError, match=r"sparsity is 0\.6"):
        share({"a": np.ones(2)}, {"a": np.ones(2, int)}, 0.6, 0.5)
    with pytest.raises(InvalidArgumentError, match="finite"):
        share({"a": np.array([1.0, np.nan])}, {"a": np.ones(2, int)}, 0.5, 0.5)


def test_bad_quantiles() -> None:
    with pytest.raises(InvalidArgumentError, match="quantiles of a must be finite numbers in ascending order"):
        share_zeros({"a": np.array([2.0, 1.0])}, {"a": 2}, 0.5, 1.0)
    with pytest.raises(InvalidArgumentError, match="no positive number for a"):
        share_zeros({"a": np.array([1.0, 2.0])}, {}, 0.5, 1.0)
