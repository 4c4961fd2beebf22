import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hemostat_calibration.allocation.knapsack import share_ranks
from hemostat_calibration.errors import InvalidArgumentError

curves = st.lists(st.integers(0, 50), min_size=1, max_size=3).map(
    lambda gains: np.append(np.cumsum(sorted(gains))[::-1], 0.0).astype(np.float64)
)


def best(errors: dict[str, np.ndarray], sizes: dict[str, int], budget: int, max_rank: int) -> float:
    """The least error of all allocations within the budget."""
    choices = [range(min(max_rank, len(left) - 1) + 1) for left in errors.values()]
    return min(
        sum(left[rank] for left, rank in zip(errors.values(), ranks, strict=True))
        for ranks in itertools.product(*choices)
        if sum(sizes[name] * rank for name, rank in zip(errors, ranks, strict=True)) <= budget
    )


@given(st.lists(curves, min_size=1, max_size=4), st.data())
def test_against_all_allocations(given_curves: list[np.ndarray], data: st.DataObject) -> None:
    errors = {str(i): curve for i, curve in enumerate(given_curves)}
    equal = data.draw(st.booleans())
    sizes = {name: 2 if equal else data.draw(st.integers(1, 4)) for name in errors}
    budget, max_rank = data.draw(st.integers(0, 20)), data.draw(st.integers(0, 3))
    ranks = share_ranks(errors, sizes, budget, max_rank)
    used = sum(sizes[name] * rank for name, rank in ranks.items())
    error = sum(errors[name][rank] for name, rank in ranks.items())
    assert used <= budget
    assert all(0 <= rank <= max_rank for rank in ranks.values())
    if equal:
        assert error == pytest.approx(best(errors, sizes, budget, max_rank))
    else:
        # What the greedy choice leaves over is less than one component.
        assert error <= best(errors, sizes, max(budget - max(sizes.values()), 0), max_rank) + 1e-9


def test_a_component_is_bought_where_it_takes_away_most_per_byte() -> None:
    errors = {"wide": np.array([100.0, 40.0, 0.0]), "narrow": np.array([30.0, 10.0, 0.0])}
    sizes = {"wide": 10, "narrow": 1}
    assert share_ranks(errors, sizes, 1, 2) == {"wide": 0, "narrow": 1}
    assert share_ranks(errors, sizes, 11, 2) == {"wide": 0, "narrow": 2}
    assert share_ranks(errors, sizes, 12, 2) == {"wide": 1, "narrow": 2}
    assert share_ranks(errors, sizes, 1000, 2) == {"wide": 2, "narrow": 2}
    assert share_ranks(errors, sizes, 1000, 1) == {"wide": 1, "narrow": 1}


def test_a_component_that_takes_nothing_away_is_not_bought() -> None:
    assert share_ranks({"q": np.array([1.0, 0.0, 0.0])}, {"q": 1}, 100, 2) == {"q": 1}


@pytest.mark.parametrize(
    ("errors", "sizes", "max_rank", "message"),
    [
        (np.array([1.0, 2.0]), {"q": 1}, 1, "errors of q"),
        (np.array([1.0, np.nan]), {"q": 1}, 1, "errors of q"),
        (np.array([]), {"q": 1}, 1, "errors of q"),
        (np.array([1.0, 0.0]), {}, 1, "bytes_per_rank of q"),
        (np.array([1.0, 0.0]), {"q": 0}, 1, "bytes_per_rank of q"),
        (np.array([1.0, 0.0]), {"q": 1}, -1, "max_rank is -1"),
    ],
)
def test_bad_arguments(errors: np.ndarray, sizes: dict[str, int], max_rank: int, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        share_ranks({"q": errors}, sizes, 10, max_rank)
