import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hemostat_calibration.adapters.gram import (
    DiagonalGram,
    FullGram,
    Metric,
    gram_bytes,
    metric_for_budget,
)
from hemostat_calibration.errors import InvalidArgumentError

TYPES = pytest.mark.parametrize("kind", [FullGram, DiagonalGram])


@TYPES
@given(seed=st.integers(0, 1000), cuts=st.lists(st.integers(0, 50), max_size=4), dtype=st.sampled_from(["f4", "f8"]))
def test_streaming_in_any_order_is_the_batch(kind, seed, cuts, dtype) -> None:
    rng = np.random.default_rng(seed)
    rows = (rng.normal(size=(50, 5)) * np.exp(3.0 * rng.normal(size=5))).astype(dtype)
    exact = rows.astype(np.float64).T @ rows.astype(np.float64)
    scale = np.sqrt(np.outer(exact.diagonal(), exact.diagonal()))
    if kind is DiagonalGram:
        exact, scale = exact.diagonal(), scale.diagonal()
    tolerance = {"f4": 1e-5, "f8": 1e-13}[dtype]
    parts = np.split(rows, sorted(cuts))
    streamed, shuffled = kind.init(5), kind.init(5)
    for part in parts:
        streamed = streamed.update(part)
    for i in rng.permutation(len(parts)):
        shuffled = shuffled.update(parts[i])
    for statistics in (streamed, shuffled):
        assert statistics.count == 50
        assert (np.abs(statistics.total - exact) <= tolerance * scale).all()
        np.testing.assert_allclose(statistics.mean(), statistics.total / 50)


def test_more_rows_than_one_product() -> None:
    rows = np.random.default_rng(0).normal(size=(2500, 3))
    np.testing.assert_allclose(FullGram.init(3).update(rows).total, rows.T @ rows)
    np.testing.assert_allclose(DiagonalGram.init(3).update(rows).total, np.square(rows).sum(axis=0))


def test_the_diagonal_of_the_full_one() -> None:
    rows = np.random.default_rng(0).normal(size=(9, 3))
    full, diagonal = FullGram.init(3).update(rows), DiagonalGram.init(3).update(rows)
    np.testing.assert_allclose(full.diagonal().total, diagonal.total)
    assert diagonal.diagonal() is diagonal


@TYPES
def test_states_are_values(kind) -> None:
    start = kind.init(2)
    later = start.update(np.ones((1, 2)))
    assert start.count == 0
    assert not start.total.any()
    with pytest.raises(ValueError, match="read-only"):
        later.total[0] = 1.0


@TYPES
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.ones(2), "rows has shape"),
        (np.ones((2, 3)), "rows has shape"),
        (np.ones((2, 2), np.float16), "float16"),
        (np.full((2, 2), np.nan), "not finite"),
        (np.full((2, 2), 1e200), "not finite"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow")
def test_bad_rows(kind, rows: np.ndarray, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        kind.init(2).update(rows)


@TYPES
def test_bad_states(kind) -> None:
    with pytest.raises(InvalidArgumentError, match="not those of second moments"):
        kind(1, np.ones((2, 3)))
    with pytest.raises(InvalidArgumentError, match="not those of second moments"):
        kind(-1, kind.init(2).total)


def test_a_budget_of_memory() -> None:
    widths = {"qkv": 4096, "o": 4096, "gate_up": 4096, "down": 11008}
    full = dict.fromkeys(widths, Metric.FULL)
    assert gram_bytes(Metric.FULL, 11008) == 8 * 11008**2
    assert metric_for_budget(widths, 8 * (3 * 4096**2 + 11008**2)) == full
    assert metric_for_budget(widths, 8 * (3 * 4096**2 + 11008**2) - 1) == full | {"down": Metric.DIAGONAL}
    assert metric_for_budget(widths, 0) == dict.fromkeys(widths, Metric.DIAGONAL)
    assert metric_for_budget({}, 0) == {}


@given(st.dictionaries(st.text(max_size=3), st.integers(1, 300), max_size=6), st.integers(0, 10**6))
def test_the_budget_is_kept(widths: dict[str, int], budget: int) -> None:
    result = metric_for_budget(widths, budget)
    used = sum(gram_bytes(metric, widths[name]) for name, metric in result.items())
    diagonals = sum(gram_bytes(Metric.DIAGONAL, width) for width in widths.values())
    assert used <= max(budget, diagonals)
