"""Rounding that compensates its own error: the integers of a weight that keep what the layer computes on texts.

All functions minimize, for each output channel, the quadratic error (w − ŵ) H (w − ŵ)ᵀ of a weight row w, where H
[inputs, inputs] is the second moment Σ x xᵀ of the layer's inputs, each token weighted or not.

- `gptq`: one pass over the columns; the error of each is compensated by the columns that follow (Frantar et al. 2022,
  arXiv 2210.17323; in order of decreasing H_jj, which its authors call act-order, with groups as they are stored).
- `descend`: coordinate descent from there, each integer in turn given all others (Behdin et al. 2023, arXiv
  2309.01885). The error never increases.
- `refit_scales`: the best scales for given integers, in closed form by least squares.

Weighting each token by the squared gradient at the layer's outputs makes H a block of the Fisher information (Kim et
al. 2025, arXiv 2505.07004).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hemostat_lab.compression.rounding import highest_integer, round_to_steps
from hemostat_lab.models.skeleton import round_to_e2m1

BLOCK = 128
"""Columns that are compensated among themselves before the rest of the weight is updated."""
REFIT_NUMBERS = 1 << 24
"""The total size of the systems of equations that are solved at once, for the scales of some rows: 128 MiB in
float64."""
DAMPING = 0.01
"""Part of the mean of H's diagonal that is added to it."""


@dataclass(frozen=True, slots=True)
class Grid:
    """Integers of `bits` bits, or E2M1's numbers, times a scale: scale[:, j // group_size] for column j.

    scale: float32 [outputs, groups], the values that are stored. group_size: inputs of a group. e2m1: instead of
    integers.
    """

    bits: int
    scale: torch.Tensor
    group_size: int
    e2m1: bool = False

    @property
    def highest(self) -> int:
        return highest_integer(self.bits)

    def columns(self) -> torch.Tensor:
        """The scale of each weight [outputs, inputs]."""
        return self.scale.repeat_interleave(self.group_size, dim=1)

    def steps(self, weight: torch.Tensor) -> torch.Tensor:
        """The nearest integers, or E2M1 numbers, [outputs, inputs], as floats."""
        return self.nearest(weight, self.columns())

    def nearest(self, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """As `steps`, of some of the weights, with the scale of each."""
        if self.e2m1:
            return round_to_e2m1(weight / scale)
        return round_to_steps(weight, scale, self.highest)


def damped(hessian: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """Float64, with `damping` times the mean of the diagonal added to it; inputs that are always 0 have 1 there."""
    exact = hessian.double().clone()
    diagonal = exact.diagonal()
    diagonal += damping * diagonal.mean()
    diagonal[diagonal <= 0] = 1.0
    return exact


@dataclass(frozen=True, slots=True)
class GptqFactor:
    """The factor of a damped H that `gptq` needs. order: columns by decreasing H_jj. upper: the upper Cholesky factor
    of the inverse of H in this order."""

    order: torch.Tensor
    upper: torch.Tensor

    @classmethod
    def of(cls, hessian: torch.Tensor) -> GptqFactor:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian[order][:, order]))
        return cls(order, torch.linalg.cholesky(inverse, upper=True))


def gptq(weight: torch.Tensor, known: GptqFactor, grid: Grid) -> torch.Tensor:
    """Integers [outputs, inputs], as floats, for `weight` [outputs, inputs], in whose dtype it computes."""
    order, factor = known.order, known.upper.to(weight.dtype)
    # Columns as rows: each is read and written in one piece.
    left = weight.T[order].contiguous()
    scales = grid.columns().T[order].contiguous()
    steps = torch.empty_like(left)
    count = len(left)
    for begin in range(0, count, BLOCK):
        end = min(begin + BLOCK, count)
        errors = torch.empty_like(left[begin:end])
        for j in range(begin, end):
            steps[j] = grid.nearest(left[j], scales[j])
            errors[j - begin] = (left[j] - steps[j] * scales[j]) / factor[j, j]
            left[j + 1 : end].addr_(factor[j, j + 1 : end], errors[j - begin], alpha=-1)
        left[end:].addmm_(factor[begin:end, end:].T, errors, alpha=-1)
    restored = torch.empty_like(steps)
    restored[order] = steps
    return restored.T.contiguous()


def descend(
    weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, steps: torch.Tensor, sweeps: int = 1
) -> torch.Tensor:
    """Returns integers [outputs, inputs] whose error is at most the error of `steps`. hessian: float64, with a
    positive diagonal."""
    exact = hessian.float()
    scales = grid.columns().T.contiguous()
    now = steps.T.contiguous().clone()
    for _ in range(sweeps):
        # gradient[j] = Σ_i H_ji (w_i − ŵ_i), computed anew in each sweep: rounding errors do not add up.
        gradient = exact @ (weight.T - now * scales)
        for begin in range(0, len(now), BLOCK):
            end = min(begin + BLOCK, len(now))
            changes = torch.empty_like(now[begin:end])
            for j in range(begin, end):
                target = now[j] * scales[j] + gradient[j] / exact[j, j]
                new = grid.nearest(target, scales[j])
                changes[j - begin] = (now[j] - new) * scales[j]
                gradient[begin:end].addr_(exact[j, begin:end], changes[j - begin])
                now[j] = new
            gradient[end:].addmm_(exact[begin:end, end:].T, changes)
    return now.T.contiguous()


def refit_scales(weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, steps: torch.Tensor) -> torch.Tensor:
    """Scales [outputs, groups], float32, that minimize the error for the integers `steps`; where that has no solution
    or is not positive, the old ones."""
    groups = steps.shape[1] // grid.group_size
    rows = max(1, REFIT_NUMBERS // groups**2)
    exact = hessian.float()
    parts = zip(weight.split(rows), steps.split(rows), strict=True)
    result = torch.cat([_refit(w, exact, q, grid.group_size) for w, q in parts])
    return torch.where(result.isfinite() & (result > 0), result, grid.scale)


def _refit(weight: torch.Tensor, exact: torch.Tensor, steps: torch.Tensor, size: int) -> torch.Tensor:
    """The solution for some rows."""
    outputs, inputs = steps.shape
    groups = inputs // size
    grouped = steps.reshape(outputs, groups, size)
    # a[o, g, f] = q_g H_gf q_fᵀ, b[o, g] = q_g (H wᵀ)_g
    a = torch.empty(outputs, groups, groups)
    for g in range(groups):
        product = grouped[:, g] @ exact[g * size : (g + 1) * size]
        a[:, g] = (product.view(outputs, groups, size) * grouped).sum(-1)
    b = ((weight @ exact).view(outputs, groups, size) * grouped).sum(-1)
    a = a.double()
    a.diagonal(dim1=1, dim2=2).add_(1e-9 * a.diagonal(dim1=1, dim2=2).mean(-1, keepdim=True) + 1e-30)
    solved: torch.Tensor = torch.linalg.solve(a, b.double()).float()
    return solved


def quadratic_error(weight: torch.Tensor, hessian: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """(w − ŵ) H (w − ŵ)ᵀ of each output channel, float64 [outputs]."""
    difference = (weight - rounded).double()
    return ((difference @ hessian.double()) * difference).sum(1)
