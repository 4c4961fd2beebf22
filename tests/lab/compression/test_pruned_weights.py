"""One layer pruned: exact masks, and updates compared with brute force."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.slow import examples

torch = pytest.importorskip("torch")

from hemostat_lab.compression.error_compensation import BLOCK, damped  # noqa: E402
from hemostat_lab.compression.pruning.compensation import (  # noqa: E402
    compensated,
    pruned_in_blocks,
    shrunk,
    towards_dense,
)
from hemostat_lab.compression.pruning.weights import (  # noqa: E402
    ROW_FLOOR,
    Pattern,
    check_sparsity,
    kept_share,
    kept_two_of_four,
    kept_weights,
    prune_weight,
)
from hemostat_lab.models.checkpoint_folders import CompressError  # noqa: E402


def world(outputs: int = 6, inputs: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [outputs, inputs], and second moments of inputs that are strongly correlated."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(inputs, inputs, generator=generator)
    rows = torch.randn(200, inputs, generator=generator) @ (mixed + 2.0)
    return torch.randn(outputs, inputs, generator=generator), rows.T @ rows / 200


def error(new: torch.Tensor, weight: torch.Tensor, moments: torch.Tensor) -> float:
    """tr(Δ S Δᵀ), float64."""
    delta = (new - weight).double()
    return float(((delta @ moments.double()) * delta).sum())


def best_given(weight: torch.Tensor, moments: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """By the normal equations of each row, float64."""
    result = torch.zeros(weight.shape, dtype=torch.float64)
    second = moments.double()
    for row, mask in enumerate(kept):
        wanted = weight[row].double() @ second[:, mask]
        result[row, mask] = torch.linalg.solve(second[mask][:, mask], wanted)
    return result


@settings(max_examples=examples(40), deadline=None)
@given(st.integers(1, 7), st.integers(1, 9), st.data())
def test_exactly_as_many_zeros_as_asked_for(outputs: int, inputs: int, data: st.DataObject) -> None:
    """Also where scores are equal: the least ones are dropped."""
    zeros = data.draw(st.integers(0, outputs * inputs))
    values = data.draw(st.lists(st.integers(0, 3), min_size=outputs * inputs, max_size=outputs * inputs))
    scores = torch.tensor(values, dtype=torch.float32).view(outputs, inputs)
    kept = kept_weights(scores, zeros)
    assert int((~kept).sum()) == zeros
    if 0 < zeros < scores.numel():
        assert scores[~kept].max() <= scores[kept].min()
    floor = data.draw(st.integers(0, inputs))
    zeros = min(zeros, outputs * (inputs - floor))
    kept = kept_weights(scores, zeros, floor)
    assert int((~kept).sum()) == zeros
    assert int(kept.sum(1).min()) >= floor
    for row in range(outputs):
        if 0 < int(kept[row].sum()) < inputs:
            assert scores[row][~kept[row]].max() <= scores[row][kept[row]].min()


def test_two_of_each_four() -> None:
    scores = torch.rand(5, 16, generator=torch.Generator().manual_seed(1))
    kept = kept_two_of_four(scores)
    for row in range(5):
        for first in range(0, 16, 4):
            best = scores[row, first : first + 4].topk(2).indices
            assert sorted(kept[row, first : first + 4].nonzero()[:, 0].tolist()) == sorted(best.tolist())


def test_the_share_that_is_kept() -> None:
    scores = torch.tensor([[36.0, 144.0]])
    assert kept_share(scores, torch.tensor([[False, True]])) == pytest.approx(0.8)
    assert kept_share(torch.zeros(1, 2), torch.tensor([[False, True]])) == 1.0


def test_least_squares_finds_the_optimum_of_the_mask() -> None:
    weight, moments = world()
    kept = torch.rand(weight.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    kept[0] = False
    expected = best_given(weight, moments, kept)
    updated = compensated(weight, moments, kept, weight * kept, steps=200)
    assert (updated[~kept] == 0).all()
    assert error(updated, weight, moments) == pytest.approx(error(expected, weight, moments), rel=1e-3)
    assert error(updated, weight, moments) < 0.5 * error(weight * kept, weight, moments)


def test_least_squares_never_makes_it_worse() -> None:
    """After each number of steps."""
    weight, moments = world(seed=3)
    kept = torch.rand(weight.shape, generator=torch.Generator().manual_seed(4)) < 0.4
    errors = [
        error(compensated(weight, moments, kept, weight * kept, steps=steps), weight, moments) for steps in range(8)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]


def test_with_gradients_it_finds_the_optimum_of_all_rows_together() -> None:
    """By the normal equations of the Kronecker product, float64: rows are no problems of their own any more."""
    weight, moments = world(4, 7, seed=13)
    gradients = damped(world(4, 4, seed=14)[1])
    kept = torch.rand(weight.shape, generator=torch.Generator().manual_seed(15)) < 0.5
    inside = kept.flatten()
    matrix = torch.kron(gradients, moments.double())
    expected = torch.zeros(weight.numel(), dtype=torch.float64)
    expected[inside] = torch.linalg.solve(matrix[inside][:, inside], matrix[inside] @ weight.flatten().double())

    def loss(new: torch.Tensor) -> float:
        delta = (new - weight).double().flatten()
        return float(delta @ matrix @ delta)

    start = best_given(weight, moments, kept)
    updated = compensated(weight, moments, kept, start, gradients, steps=300)
    assert (updated[~kept] == 0).all()
    least = loss(expected.view_as(weight))
    assert loss(updated) == pytest.approx(least, rel=5e-3)
    assert least < 0.95 * loss(start)
    losses = [loss(compensated(weight, moments, kept, start, gradients, steps=steps)) for steps in range(8)]
    assert losses == sorted(losses, reverse=True)


def test_a_row_without_gradients_keeps_a_part() -> None:
    """The model is not sensitive to a small change of it: not to none of it, either, which was found on saturated
    attention."""
    weight, moments = world(6, BLOCK, seed=16)
    gradients = torch.eye(6).double()
    gradients[0] *= 1e-9
    _, kept = prune_weight(weight, 0.5, Pattern.UNSTRUCTURED, moments, gradients)
    assert int((~kept).sum()) == weight.numel() // 2
    assert int(kept[0].sum()) == int(ROW_FLOOR * 0.5 * BLOCK)
    assert int(kept[1:].sum(1).min()) > int(kept[0].sum())


def test_the_update_is_that_of_optimal_brain_surgeon() -> None:
    """Columns from left to right: the columns to the right make up for each dropped weight, by the formula of Hassibi &
    Stork 1993: δ = −w_j / [S⁻¹]_jj · (S⁻¹)_j of the columns that are left."""
    weight, moments = world(4, BLOCK + 5, seed=5)
    second = damped(moments)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(6)) < 0.6
    updated, kept = pruned_in_blocks(weight, second, lambda values, inverse, columns: mask[:, columns])
    assert torch.equal(kept, mask)
    expected = weight.double()
    for j in range(weight.shape[1]):
        inverse = torch.linalg.inv(second[j:, j:].double())
        for row in range(len(weight)):
            if not mask[row, j]:
                expected[row, j:] -= expected[row, j] / inverse[0, 0] * inverse[0]
                expected[row, j] = 0.0
    torch.testing.assert_close(updated.double(), expected, rtol=1e-3, atol=1e-3)
    assert (updated[~mask] == 0).all()


def test_what_is_chosen_by_is_the_inverse_of_what_is_left() -> None:
    weight, moments = world(2, 10, seed=7)
    second = damped(moments)
    seen: dict[int, torch.Tensor] = {}

    def choose(values: torch.Tensor, inverse: torch.Tensor, columns: slice) -> torch.Tensor:
        seen[columns.start] = inverse
        return torch.ones_like(values, dtype=torch.bool)

    pruned_in_blocks(weight, second, choose, 2)
    assert sorted(seen) == [0, 2, 4, 6, 8]
    for first, entries in seen.items():
        for place, entry in enumerate(entries):
            j = first + place
            assert float(entry) == pytest.approx(float(torch.linalg.inv(second[j:, j:].double())[0, 0]), rel=1e-2)


@pytest.mark.parametrize("pattern", list(Pattern))
def test_a_pruned_weight(pattern: Pattern) -> None:
    weight, moments = world(8, 24, seed=8)
    for second in (None, moments):
        new, kept = prune_weight(weight, 0.5, pattern, moments=second)
        assert (new[~kept] == 0).all()
        assert int(kept.sum()) == kept.numel() // 2
        if pattern is Pattern.TWO_OF_FOUR:
            assert (kept.unflatten(1, (-1, 4)).sum(-1) == 2).all()
        if pattern is Pattern.ROWS:
            assert set(kept.sum(1).tolist()) == {0, 24}
        if second is None:
            assert torch.equal(new, weight * kept)


@pytest.mark.parametrize("pattern", [Pattern.UNSTRUCTURED, Pattern.TWO_OF_FOUR])
def test_weights_that_stay_make_up_for_the_others(pattern: Pattern) -> None:
    weight, moments = world(8, 24, seed=9)
    plain, _ = prune_weight(weight, 0.5, pattern)
    new, kept = prune_weight(weight, 0.5, pattern, moments)
    assert error(new, weight, moments) < 0.3 * error(plain, weight, moments)
    least = error(best_given(weight, damped(moments), kept), weight, moments)
    assert error(new, weight, moments) == pytest.approx(least, rel=0.05)


def test_few_tokens_are_not_fitted_to() -> None:
    """A world in which an unshrunk update does harm: as many tokens as inputs. On other tokens of the same inputs the
    update from shrunk moments is better than none, the one from plain moments is not."""
    generator = torch.Generator().manual_seed(12)
    inputs, tokens = 48, 48
    mixed = torch.eye(inputs) + 0.1 * torch.randn(inputs, inputs, generator=generator)
    weight = torch.randn(64, inputs, generator=generator)
    rows = torch.randn(tokens, inputs, generator=generator) @ mixed
    moments, everywhere = rows.T @ rows, mixed.T @ mixed
    kept = kept_weights(weight.square() * moments.diagonal(), weight.numel() // 2)

    def left(second: torch.Tensor) -> float:
        return error(compensated(weight, damped(second), kept, weight * kept), weight, everywhere)

    none = error(weight * kept, weight, everywhere)
    assert left(shrunk(moments, tokens)) < 0.98 * none < none < left(moments)
    many = torch.randn(100 * inputs, inputs, generator=generator) @ mixed
    assert left(shrunk(many.T @ many, len(many))) == pytest.approx(left(everywhere), rel=0.05)


def test_the_target_is_the_regression_of_the_dense_outputs() -> None:
    """Of outputs W x on inputs x̂ that are x with some directions scaled, and noise."""
    generator = torch.Generator().manual_seed(17)
    inputs, tokens = 10, 4000
    dense = torch.randn(tokens, inputs, generator=generator).double()
    own = dense @ torch.diag(torch.linspace(0.5, 2.0, inputs)).double()
    own += 0.3 * torch.randn(tokens, inputs, generator=generator)
    weight = torch.randn(5, inputs, generator=generator)
    change = towards_dense(damped(own.T @ own), (dense - own).T @ own)
    target = weight + weight @ change
    expected = torch.linalg.lstsq(own, dense @ weight.T.double()).solution.T
    torch.testing.assert_close(target.double(), expected, rtol=0.05, atol=0.02)
    none = towards_dense(damped(own.T @ own), torch.zeros(inputs, inputs, dtype=torch.float64))
    assert not none.any()


def test_the_exact_number_over_blocks() -> None:
    weight, moments = world(3, 2 * BLOCK + 7, seed=10)
    for gradients in (None, torch.diag(torch.tensor([1.0, 1e-6, 1e6]))):
        _, kept = prune_weight(weight, 301 / weight.numel(), Pattern.UNSTRUCTURED, moments, gradients)
        assert int((~kept).sum()) == 301


def test_an_input_that_is_always_zero() -> None:
    weight, moments = world(3, 8, seed=11)
    moments[2] = moments[:, 2] = 0.0
    new, kept = prune_weight(weight, 0.5, Pattern.UNSTRUCTURED, moments)
    assert new.isfinite().all()
    assert not kept[:, 2].any()


@pytest.mark.parametrize(
    ("sparsity", "pattern", "message"),
    [
        (1.2, Pattern.UNSTRUCTURED, "--sparsity 1.2: it is the part of the weights that is dropped: above 0, below 1"),
        (0.0, Pattern.ROWS, "--sparsity 0: "),
        (float("nan"), Pattern.UNSTRUCTURED, "--sparsity nan: "),
        (0.4, Pattern.TWO_OF_FOUR, "--sparsity 0.4: the pattern 2:4 drops one half: give 0.5, or another pattern"),
    ],
)
def test_a_sparsity_that_cannot_be(sparsity: float, pattern: Pattern, message: str) -> None:
    with pytest.raises(CompressError) as caught:
        check_sparsity(sparsity, pattern)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_inputs_that_are_no_multiple_of_four() -> None:
    with pytest.raises(CompressError, match=r"--pattern 2:4: a layer has 6 inputs, not a multiple of 4"):
        prune_weight(torch.ones(2, 6), 0.5, Pattern.TWO_OF_FOUR)
