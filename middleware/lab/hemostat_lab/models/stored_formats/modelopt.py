"""NVIDIA ModelOpt's unified checkpoints: E4M3, NVFP4 and MXFP4 weights in `weight`, with `weight_scale` beside it.

The algorithm is `quant_algo`, for each layer with `MIXED_PRECISION`. NVFP4 has the scale of the tensor in
`weight_scale_2`. Inputs have the stored scale `input_scale`, unless they are rounded at run time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch

from hemostat.checkpoints.errors import AdaptError
from hemostat_lab.models.skeleton import EXACT, Inputs
from hemostat_lab.models.stored_formats.fp4 import mxfp4_weight, nvfp4_weight
from hemostat_lab.models.stored_formats.fp8 import scaled_weight
from hemostat_lab.models.stored_formats.stored_layer import StoredLayer, member

BLOCK = (128, 128)
"""Of FP8_PB_WO."""
ALGORITHMS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4", "W4A16_NVFP4", "MXFP4", "W4A8_MXFP4_FP8")
MIXED = "MIXED_PRECISION"


@dataclass(frozen=True, slots=True)
class ModelOpt:
    """algorithm: of all layers, or of those that `layers` names (MIXED). rounds_inputs: not said to be weights only."""

    algorithm: str
    layers: Mapping[str, str]
    rounds_inputs: bool
    where: str
    parts = frozenset({"weight", "weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale"})
    marks = frozenset({"weight_scale"})

    @classmethod
    def of(cls, quantization: Mapping[str, Any], where: str) -> ModelOpt:
        """AdaptError. where: how errors name the `quantization_config`."""
        inner = quantization.get("quantization")
        values = inner if isinstance(inner, dict) else quantization
        algorithm = str(member(values, "quant_algo") or "none").upper()
        layers = {
            name: str(layer.get("quant_algo", "none")).upper()
            for name, layer in (values.get("quantized_layers") or {}).items()
        }
        for name in layers.values() if algorithm == MIXED else (algorithm,):
            if name not in ALGORITHMS:
                raise AdaptError(
                    f"{where} has the quant_algo {name}, which is not supported: use {', '.join(ALGORITHMS)}"
                )
        groups = [group for group in (quantization.get("config_groups") or {}).values() if isinstance(group, dict)]
        weights_only = bool(groups) and all(group.get("input_activations") is None for group in groups)
        return cls(algorithm, layers, not weights_only, where)

    def algorithm_of(self, layer: StoredLayer) -> str:
        if self.algorithm != MIXED:
            return self.algorithm
        algorithm = self.layers.get(layer.name)
        if algorithm is None:
            algorithm = next((a for pattern, a in self.layers.items() if fnmatch(layer.name, pattern)), None)
        if algorithm is None:
            layer.refuse("weight_scale", "is of a layer that quantized_layers does not name")
        return algorithm

    def weight(self, layer: StoredLayer) -> torch.Tensor:
        if "pre_quant_scale" in layer.parts:
            layer.refuse("pre_quant_scale", "scales inputs", "layers with scaled inputs (AWQ) are not supported")
        algorithm = self.algorithm_of(layer)
        if algorithm.endswith("NVFP4"):
            tensor_scale = torch.tensor(layer.number("weight_scale_2"))
            return nvfp4_weight(layer, "weight", tensor_scale, divides=False)
        if "MXFP4" in algorithm:
            return mxfp4_weight(layer, "weight")
        return scaled_weight(layer, "weight_scale", BLOCK if algorithm == "FP8_PB_WO" else None)

    def inputs(self, layer: StoredLayer) -> Inputs:
        algorithm = self.algorithm_of(layer)
        if algorithm in ("W4A16_NVFP4", "FP8_PB_WO") or not self.rounds_inputs:
            return EXACT
        if algorithm == "MXFP4":
            return Inputs("mxfp4")
        if algorithm == "NVFP4":
            return Inputs("nvfp4", layer.number("input_scale"))
        if algorithm == "FP8_PER_CHANNEL_PER_TOKEN" or "input_scale" not in layer.parts:
            return Inputs("fp8")
        return Inputs("fp8", layer.number("input_scale"))
