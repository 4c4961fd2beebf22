"""Rounding to nearest and magnitude pruning of one weight, without any data."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hemostat_lab.models.checkpoint_folders import CompressError
from hemostat_lab.models.skeleton import round_to_e2m1

GROUP_SIZE = 64
E2M1_LARGEST = 6.0


def pruned(weight: torch.Tensor, sparsity: float) -> torch.Tensor:
    """A copy of `weight`, [out, in], with the `sparsity` smallest part of its entries, by magnitude, set to zero."""
    pruned = weight.clone().flatten()
    count = int(pruned.numel() * sparsity)
    pruned[torch.topk(pruned.abs().float(), count, largest=False, sorted=False).indices] = 0
    return pruned.view_as(weight)


def rounded(name: str, weight: torch.Tensor, bits: int, group_size: int | None) -> torch.Tensor:
    """A copy of layer `name`'s weight, [out, in], rounded to integers of `bits` bits times the scale of its group
    (None: of its row)."""
    groups = weight_groups(name, weight, group_size)
    scale = fitted_scale(groups, bits).float().unsqueeze(-1)
    return (round_to_steps(groups.float(), scale, highest_integer(bits)) * scale).flatten(1).to(weight.dtype)


def highest_integer(bits: int) -> int:
    """Returns the highest of the signed integers of `bits` bits; the lowest one is -highest - 1."""
    return int(2 ** (bits - 1) - 1)


def round_to_steps(weight: torch.Tensor, scale: torch.Tensor, highest: int) -> torch.Tensor:
    """The nearest integers to `weight / scale`, from -highest - 1 to highest, as floats."""
    return (weight / scale).round_().clamp_(-highest - 1, highest)


def weight_groups(name: str, weight: torch.Tensor, group_size: int | None) -> torch.Tensor:
    """`weight`, [out, in], as [out, groups, group_size]; None: one group. CompressError where it does not divide."""
    check_groups(name, weight.shape[1], group_size)
    return weight.unsqueeze(1) if group_size is None else weight.unflatten(1, (-1, group_size))


def check_groups(name: str, inputs: int, group_size: int | None) -> None:
    """CompressError where the groups do not divide the inputs of layer `name`."""
    if group_size is not None and inputs % group_size:
        raise CompressError(
            f"layer {name} has {inputs} inputs, not a multiple of {group_size}: use another group size, or w8a8"
        )


def fitted_scale(groups: torch.Tensor, bits: int) -> torch.Tensor:
    """Scales [out, groups] for weights [out, groups, inputs of a group], by search over how far to clip.

    Of the scales from the group's largest magnitude down to 0.6 of it, the one with the least sum of |error|^2.4: for
    few bits, clipping the largest weights a little costs less than rounding all the others coarsely.
    """
    return _integer_scale(groups, bits, None, groups.dtype)


def clipped_scale(groups: torch.Tensor, bits: int, importance: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As `fitted_scale`, with the least weighted squared error. importance: float [inputs], such as the mean square of
    each input, or [out, inputs], of each weight. dtype: of the scales."""
    return _integer_scale(groups, bits, importance, dtype)


def e2m1_scale(
    groups: torch.Tensor, snapped: Callable[[torch.Tensor], torch.Tensor], importance: torch.Tensor | None = None
) -> torch.Tensor:
    """Float32 scales [out, groups] of E2M1 numbers, by search over how far to clip.

    snapped: the nearest scales that can be stored. importance: as of `clipped_scale`; None: the loss of `fitted_scale`.
    """
    factors = torch.linspace(1.5, 0.6, 19)
    return _searched(groups, importance, E2M1_LARGEST, factors, snapped, lambda w, scale: round_to_e2m1(w / scale))


def _integer_scale(
    groups: torch.Tensor, bits: int, importance: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    highest, tiny = highest_integer(bits), torch.finfo(dtype).tiny
    return _searched(
        groups,
        importance,
        highest + 0.5,
        torch.linspace(1.0, 0.6, 21),
        lambda scale: scale.to(dtype).clamp(min=tiny),
        lambda w, scale: round_to_steps(w, scale, highest),
    )


def _searched(
    groups: torch.Tensor,
    importance: torch.Tensor | None,
    highest: float,
    factors: torch.Tensor,
    snapped: Callable[[torch.Tensor], torch.Tensor],
    steps: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Returns the best scale of each group among `factors` · largest magnitude / `highest`, `snapped`.

    steps: returns the numbers that weights, given with their scales, are rounded to, in units of the scales, as a new
    tensor.
    """
    exact = groups.float()
    weights = None if importance is None else importance.unflatten(-1, groups.shape[1:])
    largest = exact.abs().amax(-1) / highest
    best = torch.full_like(largest, torch.inf)
    fitted = torch.zeros_like(snapped(largest))
    for factor in factors:
        scale = snapped(largest * factor)
        wide = scale.float().unsqueeze(-1)
        # In place: a new tensor of this size is new memory of the system, which takes longer than the arithmetic.
        error = steps(exact, wide).mul_(wide).sub_(exact)
        total = (_power(error) if weights is None else error.square_().mul_(weights)).sum(-1)
        better = total < best
        best = torch.where(better, total, best)
        fitted = torch.where(better, scale, fitted)
    return fitted


def _power(error: torch.Tensor) -> torch.Tensor:
    """Returns |error|^2.4, computed in place: the logarithm and the exponential take a third of the time of `pow`."""
    return error.abs_().log_().mul_(2.4).exp_()
