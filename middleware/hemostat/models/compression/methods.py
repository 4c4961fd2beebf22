"""Methods without data: rounding to nearest, and magnitude pruning of each layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from hemostat.models.compression.formats import Quantized, WeightFormat
from hemostat.models.compression.frame import LayerData, LayerResult, Run
from hemostat.models.compression.rounding import GROUP_SIZE, fitted_scale, pruned, rounded, weight_groups

Change = Callable[[str, torch.Tensor], "torch.Tensor | Quantized"]
"""What becomes of the weight [outputs, inputs] of the linear layer of this name, as it is stored."""


@dataclass(frozen=True, slots=True)
class EachWeight:
    """Changes every linear layer by itself, without data."""

    settings: Mapping[str, Any]
    change: Change = field(repr=False)
    needs_texts: bool = False

    def prepare(self, run: Run) -> None:
        pass

    def compress_layer(self, layer: LayerData) -> LayerResult:
        names = layer.linears
        return LayerResult({f"{n}.weight": self.change(n, layer.parameter(f"{n}.weight")) for n in names})


def round_to_nearest(weight_format: WeightFormat) -> Change:
    """Stored packed, with the scales that `fitted_scale` finds."""

    def change(name: str, weight: torch.Tensor) -> Quantized:
        groups = weight_groups(name, weight, weight_format.group_size)
        return Quantized(weight_format, weight, fitted_scale(groups, weight_format.bits))

    return change


def round_dense(bits: int, group_size: int | None) -> Change:
    """As `round_to_nearest`, stored dense: for widths that engines do not serve packed."""
    return lambda name, weight: rounded(name, weight, bits, group_size)


def prune_by_magnitude(sparsity: float) -> Change:
    return lambda name, weight: pruned(weight, sparsity)


def by_name(scheme: str) -> EachWeight:
    """The method of `compress.SCHEMES`."""
    if scheme == "w4a16":
        change: Change = round_to_nearest(WeightFormat(4, GROUP_SIZE))
    elif scheme == "w8a8":
        change = round_to_nearest(WeightFormat(8, inputs="int8"))
    elif scheme == "int3":
        change = round_dense(3, GROUP_SIZE)
    else:
        change = prune_by_magnitude(int(scheme.removeprefix("prune")) / 100)
    return EachWeight({"scheme": scheme}, change)
