"""Rounding with compensation: compared with the textbook's way, and with every other choice of integers."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from hemostat_lab.compression import error_compensation  # noqa: E402
from hemostat_lab.compression.error_compensation import (  # noqa: E402
    GptqFactor,
    Grid,
    damped,
    descend,
    gptq,
    quadratic_error,
    refit_scales,
)


def problem(outputs: int, inputs: int, bits: int = 3, group: int = 4, seed: int = 0) -> tuple[Any, Any, Grid]:
    """Weights, the damped second moment of correlated inputs, and a grid."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator)
    mix = torch.randn(inputs, inputs, generator=generator)
    rows = torch.randn(6 * inputs, inputs, generator=generator) @ mix
    largest = weight.view(outputs, -1, group).abs().amax(-1)
    return weight, damped(rows.T @ rows), Grid(bits, largest / (2 ** (bits - 1) - 0.5), group)


def error(weight: Any, hessian: Any, grid: Grid, steps: Any) -> Any:
    return quadratic_error(weight, hessian, steps * grid.columns())


def textbook(weight: Any, hessian: Any, grid: Grid) -> Any:
    """Optimal brain quantization in a fixed order: each weight is rounded, and those that are left minimize the error
    given all that are rounded."""
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True).tolist()
    scales = grid.columns()
    rounded = torch.zeros_like(weight)
    for row in range(len(weight)):
        now = weight[row].double().clone()
        for position, j in enumerate(order):
            step = torch.clamp(torch.round(now[j] / scales[row, j]), -grid.highest - 1, grid.highest)
            rounded[row, j] = step
            left = order[position + 1 :]
            done = order[: position + 1]
            fixed = rounded[row, done].double() * scales[row, done].double()
            if left:
                # The minimum over the weights that are left of (w − ŵ) H (w − ŵ)ᵀ.
                difference = weight[row, done].double() - fixed
                shift = torch.linalg.solve(hessian[left][:, left], hessian[left][:, done] @ difference)
                now[left] = weight[row, left].double() + shift
    return rounded


@pytest.mark.parametrize("seed", range(5))
def test_gptq_is_optimal_brain_quantization_in_its_order(seed: int) -> None:
    weight, hessian, grid = problem(6, 12, seed=seed)
    weight, grid = weight.double(), Grid(grid.bits, grid.scale.double(), grid.group_size)
    assert torch.equal(gptq(weight, GptqFactor.of(hessian), grid), textbook(weight, hessian, grid))


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian, grid = problem(5, 24)
    whole = gptq(weight, GptqFactor.of(hessian), grid), descend(weight, hessian, grid, grid.steps(weight))
    monkeypatch.setattr("hemostat_lab.compression.error_compensation.BLOCK", 5)
    assert torch.equal(gptq(weight, GptqFactor.of(hessian), grid), whole[0])
    assert torch.equal(descend(weight, hessian, grid, grid.steps(weight)), whole[1])


@pytest.mark.parametrize("seed", range(3))
def test_after_descent_no_other_integer_is_better(seed: int) -> None:
    weight, hessian, grid = problem(4, 8, bits=2, seed=seed)
    start = gptq(weight, GptqFactor.of(hessian), grid)
    result = descend(weight, hessian, grid, start, sweeps=20)
    least = error(weight, hessian, grid, result)
    assert (least <= error(weight, hessian, grid, start) * (1 + 1e-5)).all()
    for j in range(weight.shape[1]):
        for step in range(-grid.highest - 1, grid.highest + 1):
            other = result.clone()
            other[:, j] = step
            assert (error(weight, hessian, grid, other) >= least * (1 - 1e-4)).all()


def test_the_order_of_the_errors_on_correlated_inputs() -> None:
    weight, hessian, grid = problem(16, 64, bits=4, group=16)
    nearest, compensated = grid.steps(weight), gptq(weight, GptqFactor.of(hessian), grid)
    better = descend(weight, hessian, grid, compensated, sweeps=2)
    errors = [float(error(weight, hessian, grid, steps).sum()) for steps in (nearest, compensated, better)]
    assert errors[1] < 0.7 * errors[0]
    assert errors[2] < errors[1]


def test_brute_force_over_all_integers_bounds_the_error() -> None:
    weight, hessian, grid = problem(1, 5, bits=2, group=5)
    choices = torch.cartesian_prod(*[torch.arange(-2.0, 2.0)] * 5)
    best = float(quadratic_error(weight.expand(len(choices), -1), hessian, choices * grid.scale[0, 0]).min())
    result = float(
        error(weight, hessian, grid, descend(weight, hessian, grid, gptq(weight, GptqFactor.of(hessian), grid), 9))
    )
    nearest = float(error(weight, hessian, grid, grid.steps(weight)))
    assert best * (1 - 1e-5) <= result <= nearest
    assert result < 1.5 * best


@pytest.mark.parametrize("numbers", [1 << 24, 20])
def test_refitted_scales_are_least_squares(numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(error_compensation, "REFIT_NUMBERS", numbers)
    weight, hessian, grid = problem(3, 12)
    steps = gptq(weight, GptqFactor.of(hessian), grid)
    result = refit_scales(weight, hessian, grid, steps)
    root = torch.linalg.cholesky(hessian).T
    for row in range(len(weight)):
        design = torch.stack(
            [root[:, g * 4 : (g + 1) * 4] @ steps[row, g * 4 : (g + 1) * 4].double() for g in range(3)], dim=1
        )
        exact = torch.linalg.lstsq(design, (root @ weight[row].double())[:, None]).solution[:, 0]
        assert torch.allclose(result[row].double(), exact, rtol=1e-3)
    again = Grid(grid.bits, result, grid.group_size)
    assert (error(weight, hessian, again, steps) <= error(weight, hessian, grid, steps) * (1 + 1e-5)).all()


def test_inputs_that_are_always_zero_and_groups_of_zeros() -> None:
    weight, hessian, grid = problem(2, 8)
    hessian[3] = hessian[:, 3] = 0.0
    steps = gptq(weight, GptqFactor.of(damped(hessian, 0.0)), grid)
    assert steps[:, 3].tolist() == grid.steps(weight)[:, 3].tolist()
    zeros = torch.zeros_like(steps)
    assert torch.equal(refit_scales(weight, hessian, grid, zeros), grid.scale), "any scale fits: the old one stays"
