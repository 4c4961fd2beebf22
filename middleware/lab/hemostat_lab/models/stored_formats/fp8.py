"""E4M3 weights with one scale, a scale for each output, or one for each block of outputs and inputs.

`quant_method: fp8`, as llm-compressor's predecessor and transformers write it: `weight` E4M3 [outputs, inputs] and
`weight_scale`, or `weight_scale_inv` of blocks (DeepSeek), which in spite of its name is multiplied, too. With
`activation_scheme: static` the inputs have the stored scale `input_scale`. `fbgemm_fp8`: a scale for each output.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hemostat.checkpoints.errors import AdaptError
from hemostat_lab.models.skeleton import Inputs
from hemostat_lab.models.stored_formats.stored_layer import StoredLayer

SCALES = ("weight_scale_inv", "weight_scale")


@dataclass(frozen=True, slots=True)
class Fp8:
    """block: outputs and inputs of a block; None: one scale, or one for each output. static: inputs have a stored
    scale."""

    block: tuple[int, int] | None
    static: bool
    parts = frozenset({"weight", *SCALES, "input_scale", "input_scale_ub"})
    marks = frozenset(SCALES)

    @classmethod
    def of(cls, quantization: Mapping[str, Any], where: str) -> Fp8:
        """AdaptError. where: how errors name the `quantization_config`."""
        scheme = quantization.get("activation_scheme") or "dynamic"
        block = quantization.get("weight_block_size")
        if scheme not in ("dynamic", "static"):
            raise AdaptError(f"{where} has the activation_scheme {scheme}: it must be dynamic or static")
        if block is None:
            return cls(None, scheme == "static")
        if not (isinstance(block, list) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)):
            raise AdaptError(f"{where} has the weight_block_size {block}: it must be two positive integers")
        return cls((block[0], block[1]), scheme == "static")

    def weight(self, layer: StoredLayer) -> torch.Tensor:
        return scaled_weight(layer, next((p for p in SCALES if p in layer.parts), SCALES[1]), self.block)

    def inputs(self, layer: StoredLayer) -> Inputs:
        if self.static:
            return Inputs("fp8", layer.number("input_scale"))
        return Inputs("fp8" if self.block is None else "fp8_groups")


def scaled_weight(layer: StoredLayer, part: str, block: tuple[int, int] | None) -> torch.Tensor:
    """Float32 [outputs, inputs] of E4M3 numbers times the scales in `part`."""
    numbers = layer.tensor("weight", (torch.float8_e4m3fn,), (None, None)).float()
    if not bool(numbers.isfinite().all()):
        layer.refuse("weight", "holds values that are not finite", "copy the checkpoint again")
    outputs, inputs = numbers.shape
    scale = layer.scales(part)
    if block is not None:
        wanted = (-(-outputs // block[0]), -(-inputs // block[1]))
        squeezed = scale.reshape(scale.shape[0], -1) if scale.ndim == 4 else scale
        if tuple(squeezed.shape) != wanted:
            layer.refuse(
                part, f"has the shape {list(scale.shape)}: blocks of {block[0]} by {block[1]} need {list(wanted)}"
            )
        rows = squeezed.repeat_interleave(block[0], 0)[:outputs]
        return numbers * rows.repeat_interleave(block[1], 1)[:, :inputs]
    if scale.numel() not in (1, outputs) or scale.ndim > 2 or (scale.ndim == 2 and scale.shape[1] != 1):
        layer.refuse(
            part, f"has the shape {list(scale.shape)}, and not one scale, or one for each of {outputs} outputs"
        )
    return numbers * scale.reshape(-1, 1)
