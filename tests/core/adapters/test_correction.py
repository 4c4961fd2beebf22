"""The best correction of a layer: against a generic optimiser, the textbook formula, and where that formula fails."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.support.slow import slow_unless

from hemostat_calibration.adapters.correction import low_rank
from hemostat_calibration.adapters.factors import LowRank
from hemostat_calibration.adapters.gram import DiagonalGram, FullGram, Gram
from hemostat_calibration.errors import InvalidArgumentError

KINDS = ("none", "diagonal", "full", "singular")


def product(factors: LowRank) -> np.ndarray:
    return factors.b @ factors.a


def gram(rng: np.random.Generator, width: int, kind: str) -> Gram | None:
    if kind == "none":
        return None
    rows = rng.normal(size=(max(width // 2, 1) if kind == "singular" else 4 * width, width))
    rows *= np.exp(rng.normal(size=width))
    return (DiagonalGram if kind == "diagonal" else FullGram).init(width).update(rows)


def matrix(statistics: Gram | None, width: int) -> np.ndarray:
    if statistics is None:
        return np.eye(width)
    return np.diag(statistics.mean()) if isinstance(statistics, DiagonalGram) else statistics.mean()


def weighted_error(delta: np.ndarray, inputs: Gram | None, outputs: Gram | None) -> float:
    """Returns tr(S_o delta S_i deltaᵀ) for an error `delta` [outputs, inputs] that is left, a mean by token."""
    return float(np.trace(matrix(outputs, len(delta)) @ delta @ matrix(inputs, delta.shape[1]) @ delta.T))


def symmetric_root(s: np.ndarray, power: float = 0.5) -> np.ndarray:
    values, vectors = np.linalg.eigh(s)
    return (vectors * np.maximum(values, 0.0) ** power) @ vectors.T


def exact(layer: LowRank) -> np.ndarray:
    return layer.b.astype(np.float64) @ layer.a.astype(np.float64)


def optimised(delta: np.ndarray, rank: int, s_i: np.ndarray, s_o: np.ndarray, seed: int) -> float:
    """The least weighted error that L-BFGS finds from random starts."""
    torch.manual_seed(seed)
    d, root_i, root_o = (torch.from_numpy(x) for x in (delta, symmetric_root(s_i), symmetric_root(s_o)))
    best = np.inf
    for _ in range(3):
        a = torch.randn(rank, delta.shape[1], dtype=torch.float64, requires_grad=True)
        b = torch.randn(delta.shape[0], rank, dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.LBFGS([a, b], max_iter=300, tolerance_change=1e-14, line_search_fn="strong_wolfe")

        def loss(a: torch.Tensor = a, b: torch.Tensor = b, step=optimiser) -> torch.Tensor:
            step.zero_grad()
            value = (root_o @ (d - b @ a) @ root_i).square().sum()
            value.backward()
            return value

        optimiser.step(loss)
        best = min(best, float(loss().detach()))
    return best


PAIRS = [(inputs, outputs) for inputs in KINDS for outputs in KINDS]
QUICK = [("none", "none"), ("diagonal", "full"), ("full", "diagonal"), ("full", "singular"), ("singular", "full")]


@pytest.mark.parametrize("shape", [(5, 4), (3, 6)])
@pytest.mark.parametrize(("inputs", "outputs"), slow_unless(QUICK, PAIRS))
def test_no_optimiser_finds_a_smaller_error(shape: tuple[int, int], inputs: str, outputs: str) -> None:
    rng = np.random.default_rng(len(inputs) + 10 * len(outputs) + 100 * shape[0])
    delta = rng.normal(size=shape)
    given_i, given_o = gram(rng, shape[1], inputs), gram(rng, shape[0], outputs)
    s_i, s_o = matrix(given_i, shape[1]), matrix(given_o, shape[0])
    for rank in (1, 2):
        factors, errors = low_rank(delta, rank, given_i, given_o)
        mine = weighted_error(delta - exact(factors), given_i, given_o)
        total = weighted_error(delta, given_i, given_o)
        assert mine == pytest.approx(errors[rank], rel=1e-4, abs=1e-5 * total)  # float32 factors
        assert errors[0] == pytest.approx(total)
        theirs = optimised(delta, rank, s_i, s_o, seed=rank)
        assert theirs >= errors[rank] - 1e-9 * total
        assert theirs <= errors[rank] + 1e-3 * total, "the optimiser did not come near: the comparison shows nothing"


@given(
    st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 9), st.sampled_from(KINDS[:3]), st.sampled_from(KINDS[:3])
)
def test_it_is_the_textbook_formula_where_that_one_is_defined(
    seed: int, m: int, n: int, inputs: str, outputs: str
) -> None:
    rng = np.random.default_rng(seed)
    delta = rng.normal(size=(m, n))
    given_i, given_o = gram(rng, n, inputs), gram(rng, m, outputs)
    s_i, s_o = matrix(given_i, n), matrix(given_o, m)
    u, sigma, vt = np.linalg.svd(symmetric_root(s_o) @ delta @ symmetric_root(s_i))
    rank = int(rng.integers(1, 10))
    factors, errors = low_rank(delta, rank, given_i, given_o)
    most = min(rank, m, n)
    squares = np.append(sigma**2, 0.0)
    tail = [squares[k:].sum() for k in range(most + 1)]
    np.testing.assert_allclose(errors, tail, rtol=1e-8, atol=1e-9 * tail[0])
    assert (np.diff(errors) <= 0.0).all()
    assert (np.diff(errors, 2) >= -1e-12 * tail[0]).all()
    if most < len(sigma) and sigma[most - 1] - sigma[most] < 1e-2 * sigma[0]:
        return  # the minimiser is not unique
    expected = symmetric_root(s_o, -0.5) @ (u[:, :most] * sigma[:most]) @ vt[:most] @ symmetric_root(s_i, -0.5)
    np.testing.assert_allclose(exact(factors), expected, atol=2e-4 * np.abs(expected).max())


@given(st.integers(0, 10_000))
def test_the_first_components_are_the_smaller_correction(seed: int) -> None:
    rng = np.random.default_rng(seed)
    delta = rng.normal(size=(6, 8))
    given_i, given_o = gram(rng, 8, "full"), gram(rng, 6, "full")
    factors, errors = low_rank(delta, 5, given_i, given_o)
    for rank in range(6):
        left = weighted_error(delta - exact(factors.first(rank)), given_i, given_o)
        assert left == pytest.approx(errors[rank], rel=1e-3, abs=1e-4 * errors[0])


def test_on_diagonal_data_full_and_diagonal_agree() -> None:
    rng = np.random.default_rng(0)
    rows = np.diag(np.exp(rng.normal(size=6)))  # each row has one entry: no products of different ones
    delta = rng.normal(size=(4, 6))
    full, errors = low_rank(delta, 2, FullGram.init(6).update(rows))
    diagonal, others = low_rank(delta, 2, DiagonalGram.init(6).update(rows))
    np.testing.assert_allclose(errors, others)
    np.testing.assert_allclose(product(full), product(diagonal), atol=1e-6)


@given(st.integers(0, 1000), st.sampled_from(["few rows", "dead", "equal", "silent"]))
def test_singular_statistics(seed: int, what: str) -> None:
    """Directions that were never seen are extrapolated, not divided by: no output is worse off than without."""
    rng = np.random.default_rng(seed)
    x, g, delta = rng.normal(size=(40, 8)), rng.normal(size=(40, 6)), rng.normal(size=(6, 8))
    if what == "few rows":
        x, g = x[:3], g[:3]
    elif what == "dead":
        x[:, 2] = 0.0
    elif what == "equal":
        x[:, 2] = x[:, 5]
    else:
        g[:, 1] = 0.0
    given_i, given_o = FullGram.init(8).update(x), FullGram.init(6).update(g)
    factors, errors = low_rank(delta, 2, given_i, given_o)
    left = delta - exact(factors)
    assert np.isfinite(factors.a).all()
    assert np.isfinite(factors.b).all()
    assert weighted_error(left, given_i, given_o) == pytest.approx(errors[2], rel=1e-3, abs=1e-4 * errors[0])
    before, after = np.square(x @ delta.T).mean(axis=0), np.square(x @ left.T).mean(axis=0)
    assert (after <= before * (1.0 + 1e-4)).all()


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_a_condition_of_1e12(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    basis, _ = np.linalg.qr(rng.normal(size=(shape[1], shape[1])))
    s = (basis * np.logspace(0, -12, shape[1])) @ basis.T
    delta = rng.normal(size=shape)
    factors, errors = low_rank(delta, 2, FullGram(1, 0.5 * (s + s.T)))
    sigma = np.linalg.svd(delta @ (basis * np.logspace(0, -6, shape[1])), compute_uv=False)
    np.testing.assert_allclose(errors, [np.square(sigma[k:]).sum() for k in range(3)], rtol=1e-9)
    assert np.isfinite(exact(factors)).all()
    assert np.abs(exact(factors)).max() < 100.0


def test_outlier_inputs_in_float32() -> None:
    """One input is 3,000 times larger than the others, as in language models: the others are still corrected."""
    rng = np.random.default_rng(2)
    rows = rng.normal(size=(2000, 16)).astype(np.float32)
    rows[:, 3] *= 3000.0
    delta = rng.normal(size=(12, 16))
    delta[:, 3] *= 1e-4
    _, single = low_rank(delta, 4, FullGram.init(16).update(rows))
    _, double = low_rank(delta, 4, FullGram.init(16).update(rows.astype(np.float64)))
    np.testing.assert_allclose(single, double, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_correct(kind: str) -> None:
    factors, errors = low_rank(np.zeros((3, 5)), 2, gram(np.random.default_rng(0), 5, kind))
    assert (factors.rank, errors.tolist()) == (0, [0.0, 0.0, 0.0])
    empty, errors = low_rank(np.ones((3, 5)), 2, FullGram.init(5))
    assert (empty.rank, errors.tolist()) == (0, [0.0, 0.0, 0.0])
    none, errors = low_rank(np.ones((3, 5)), 0)
    assert (none.rank, product(none).shape, errors.tolist()) == (0, (3, 5), [pytest.approx(15.0)])


@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
def test_a_rank_of_the_whole_matrix_leaves_nothing(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(3)
    delta = rng.normal(size=shape)
    factors, errors = low_rank(delta, 10, gram(rng, shape[1], "full"), gram(rng, shape[0], "full"))
    assert len(errors) == 4
    assert errors[-1] == 0.0
    np.testing.assert_allclose(product(factors), delta, atol=1e-5)


def test_a_weight_error_of_rank_1_needs_one_component() -> None:
    factors, errors = low_rank(np.outer([1.0, 2.0, 3.0], [1.0, -1.0]), 2)
    assert factors.rank == 1
    assert errors[1:].max() < 1e-12


def test_the_factors_are_balanced() -> None:
    rng = np.random.default_rng(4)
    factors, _ = low_rank(rng.normal(size=(20, 30)) * np.exp(2.0 * rng.normal(size=30)), 5, gram(rng, 30, "full"))
    lengths = np.linalg.norm(factors.b, axis=0)
    np.testing.assert_allclose(lengths, lengths[0], rtol=1e-5)
    assert np.linalg.norm(factors.a) == pytest.approx(np.linalg.norm(factors.b), rel=1e-5)


def test_twice_the_same_is_the_same_bits() -> None:
    rng = np.random.default_rng(5)
    delta, s = rng.normal(size=(7, 9)), gram(rng, 9, "full")
    (one, errors), (two, others) = low_rank(delta, 3, s), low_rank(delta, 3, s)
    assert (one.a.tobytes(), one.b.tobytes(), errors.tobytes()) == (two.a.tobytes(), two.b.tobytes(), others.tobytes())


@pytest.mark.parametrize(
    ("delta", "rank", "inputs", "message"),
    [
        (np.ones(3), 1, None, "delta of shape"),
        (np.full((2, 2), np.nan), 1, None, "finite"),
        (np.ones((2, 2)), -1, None, "rank -1"),
        (np.ones((2, 2)), 1, FullGram.init(3), "inputs are statistics of 3"),
    ],
)
def test_bad_arguments(delta: np.ndarray, rank: int, inputs: Gram | None, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        low_rank(delta, rank, inputs)


def test_bad_factors() -> None:
    with pytest.raises(InvalidArgumentError, match=r"\[r, inputs\]"):
        LowRank(np.ones((2, 3), np.float32), np.ones((4, 3), np.float32))
    with pytest.raises(InvalidArgumentError, match="float32"):
        LowRank(np.ones((2, 3)), np.ones((4, 2), np.float32))


@pytest.mark.parametrize("way", ["for_rounding", "for_training"])
def test_other_lengths_of_the_components_are_the_same_correction(way: str) -> None:
    rng = np.random.default_rng(6)
    a, b = rng.normal(size=(3, 5)) * np.array([[1e-3], [1.0], [50.0]]), rng.normal(size=(4, 3))
    b[:, 1] = 0.0
    given_layer = LowRank(a.astype(np.float32), b.astype(np.float32))
    result = getattr(given_layer, way)()
    np.testing.assert_allclose(product(result), product(given_layer), rtol=1e-5, atol=1e-5)
    empty = LowRank(np.zeros((0, 5), np.float32), np.zeros((4, 0), np.float32))
    assert getattr(empty, way)().rank == 0
    if way == "for_training":
        lengths = np.linalg.norm(result.a, axis=1), np.linalg.norm(result.b, axis=0)
        np.testing.assert_allclose(lengths[0][[0, 2]], lengths[1][[0, 2]], rtol=1e-5)
