"""Methods without data: rounding to nearest, and magnitude pruning of each layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch

from hemostat_lab.compression.formats import FP4, Quantized, WeightFormat, snapped_scale
from hemostat_lab.compression.frame import LayerData, LayerResult, Run
from hemostat_lab.compression.rounding import GROUP_SIZE, e2m1_scale, fitted_scale, pruned, rounded, weight_groups

Change = Callable[[str, torch.Tensor], "torch.Tensor | Quantized"]
"""A function that returns the new weight of the linear layer of this name, given its weight [outputs, inputs] as it is
stored."""


@dataclass(frozen=True, slots=True)
class EachWeight:
    """Changes every linear layer by itself, without data."""

    settings: Mapping[str, Any]
    change: Change = field(repr=False)
    needs_texts = False

    def prepare(self, run: Run) -> None:
        pass

    def compress_layer(self, layer: LayerData) -> LayerResult:
        names = layer.linears
        return LayerResult({f"{n}.weight": self.change(n, layer.parameter(f"{n}.weight")) for n in names})


def round_to_nearest(weight_format: WeightFormat) -> Change:
    """Stored packed, with the scales that `nearest` finds."""
    return lambda name, weight: nearest(name, weight, weight_format)


def nearest(name: str, weight: torch.Tensor, weight_format: WeightFormat) -> Quantized:
    """Rounds to nearest, by the weight alone. E4M3 has one scale per output channel: the largest weight becomes its
    largest number."""
    if weight_format.kind == "float":
        largest = weight.abs().amax(1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
        return Quantized(weight_format, weight.float(), largest / torch.finfo(torch.float8_e4m3fn).max)
    groups = weight_groups(name, weight, weight_format.group_size)
    if weight_format.kind in FP4:
        return Quantized(weight_format, weight.float(), e2m1_scale(groups, snapped_scale(weight_format)))
    return Quantized(weight_format, weight.float(), fitted_scale(groups, weight_format.bits))


def _round_in_own_dtype(weight_format: WeightFormat) -> Change:
    """As `round_to_nearest`, but the quotient of weight and scale is of the source's dtype: in bfloat16, some integers
    are one off. The demo's checkpoints have always been made so; results on them stay comparable."""

    def change(name: str, weight: torch.Tensor) -> Quantized:
        result = nearest(name, weight, weight_format)
        return Quantized(weight_format, weight, result.scale)

    return change


def round_dense(bits: int, group_size: int | None) -> Change:
    """As `round_to_nearest`, stored dense: for studies of widths that engines do not serve packed."""
    return lambda name, weight: rounded(name, weight, bits, group_size)


def prune_by_magnitude(sparsity: float) -> Change:
    return lambda name, weight: pruned(weight, sparsity)


def without_texts(chosen: WeightFormat) -> EachWeight:
    """Returns the method that rounds every layer to nearest, in one format."""
    return EachWeight({"format": msgspec.to_builtins(chosen), "packed": True}, round_to_nearest(chosen))


def by_name(scheme: str) -> EachWeight:
    """Returns the method of one of `checkpoint_writer.SCHEMES`."""
    if scheme == "w4a16":
        change: Change = _round_in_own_dtype(WeightFormat(4, GROUP_SIZE))
    elif scheme == "w8a8":
        change = _round_in_own_dtype(WeightFormat(8, inputs="int8"))
    elif scheme == "int3":
        change = round_dense(3, GROUP_SIZE)
    else:
        change = prune_by_magnitude(int(scheme.removeprefix("prune")) / 100)
    return EachWeight({"scheme": scheme}, change)
