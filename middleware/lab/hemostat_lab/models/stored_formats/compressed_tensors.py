"""Compressed-tensors: llm-compressor's formats, and what `hemostat compress` writes.

Integers and E4M3 are read by the library itself; of FP4 it returns bfloat16, so that the numbers are read here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from hemostat.checkpoints.errors import AdaptError
from hemostat.config import packages
from hemostat_calibration.messages import one_line
from hemostat_lab.models.skeleton import EXACT, Inputs
from hemostat_lab.models.stored_formats.fp4 import MXFP4_GROUP, NVFP4_GROUP, mxfp4_weight, nvfp4_weight
from hemostat_lab.models.stored_formats.stored_layer import StoredLayer

NVFP4 = "nvfp4-pack-quantized"
MXFP4 = "mxfp4-pack-quantized"
FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", NVFP4, MXFP4)
"""A checkpoint of `mixed-precision` names one for each group of layers."""
SUPPORTED = f"supported are {', '.join(FORMATS)}"
_LIBRARY_PARTS = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")


@dataclass(frozen=True, slots=True)
class CompressedTensors:
    """schemes: a `QuantizationScheme` for each group of layers, with a format of FORMATS."""

    schemes: tuple[Any, ...]
    where: str
    parts = frozenset({*_LIBRARY_PARTS, "weight_global_scale", "input_scale", "input_global_scale"})
    marks = frozenset({"weight_scale"})

    @classmethod
    def of(cls, quantization: Mapping[str, Any], where: str) -> CompressedTensors:
        """AdaptError. where: how errors name the `quantization_config`."""
        if quantization.get("transform_config"):
            raise AdaptError(f"{where} has a transform_config (rotated weights), which is not supported: {SUPPORTED}")
        sparse = (quantization.get("sparsity_config") or {}).get("format", "dense")
        if sparse != "dense":
            raise AdaptError(f"{where} has the sparse format {sparse}: {SUPPORTED}")
        if problem := packages.missing("lab"):
            raise AdaptError(f"{where} is of compressed-tensors; {problem}")
        from compressed_tensors.quantization import QuantizationConfig  # noqa: PLC0415  slow

        try:
            known = {key: quantization[key] for key in QuantizationConfig.model_fields if key in quantization}
            parsed = QuantizationConfig.model_validate(known)
        except ValueError as error:
            raise AdaptError(f"{where} cannot be read: {one_line(error)}") from None
        schemes = tuple(parsed.config_groups.values())
        for scheme in schemes:
            scheme.format = getattr(scheme.format, "value", scheme.format) or parsed.format
            _check(scheme, where)
        return cls(schemes, where)

    def scheme(self, name: str) -> Any:
        from compressed_tensors.utils.match import match_name  # noqa: PLC0415

        # A name is more specific than a class of modules, such as Linear.
        for scheme in self.schemes:
            if any(match_name(name, target) for target in scheme.targets):
                return scheme
        by_class = [scheme for scheme in self.schemes if "Linear" in scheme.targets]
        if len(by_class) != 1:
            raise AdaptError(f"{self.where} does not say how layer {name} is quantized")
        return by_class[0]

    def weight(self, layer: StoredLayer) -> torch.Tensor:
        scheme = self.scheme(layer.name)
        if scheme.format == NVFP4:
            tensor_scale = torch.tensor(layer.number("weight_global_scale"))
            return nvfp4_weight(layer, "weight_packed", tensor_scale, divides=True)
        if scheme.format == MXFP4:
            return mxfp4_weight(layer, "weight_packed")
        return _by_library(layer, scheme)

    def inputs(self, layer: StoredLayer) -> Inputs:
        inputs = self.scheme(layer.name).input_activations
        if inputs is None:
            return EXACT
        if inputs.num_bits == 4:
            if inputs.group_size == MXFP4_GROUP:
                return Inputs("mxfp4")
            # The library divides by it where ModelOpt multiplies.
            return Inputs("nvfp4", 1.0 / layer.number("input_global_scale"))
        if inputs.strategy == "group":
            return Inputs("fp8_groups")
        rounding: Literal["int8", "fp8"] = "int8" if inputs.type == "int" else "fp8"
        return Inputs(rounding) if inputs.dynamic is True else Inputs(rounding, layer.number("input_scale"))


def _check(scheme: Any, where: str) -> None:
    """AdaptError for what is not read."""
    if scheme.format not in FORMATS:
        raise AdaptError(f"{where} has the format {scheme.format}, which is not supported: {SUPPORTED}")
    weights, inputs = scheme.weights, scheme.input_activations
    groups = {NVFP4: NVFP4_GROUP, MXFP4: MXFP4_GROUP}
    of_fp4 = scheme.format in groups
    if weights is None or not ((of_fp4 or weights.num_bits == 8) if weights.type == "float" else not of_fp4):
        kind = "no" if weights is None else f"{weights.num_bits}-bit {weights.type}"
        raise AdaptError(f"{where} has {kind} weights in {scheme.format}, which is not supported: {SUPPORTED}")
    if of_fp4 and (weights.num_bits, weights.group_size) != (4, groups[scheme.format]):
        raise AdaptError(
            f"{where} has {weights.num_bits} bits in groups of {weights.group_size} in {scheme.format}, whose groups "
            f"are {groups[scheme.format]} numbers of 4 bits: correct it"
        )
    if scheme.format == "pack-quantized" and not 1 <= weights.num_bits <= 8:
        raise AdaptError(f"{where} has {weights.num_bits}-bit weights in pack-quantized: supported are 1 to 8 bits")
    if inputs is not None and not _is_supported(inputs):
        raise AdaptError(
            f"{where} rounds inputs in another way than to int8 or FP8 by token, group or tensor, or to FP4, which is "
            "not supported"
        )
    if scheme.output_activations is not None:
        raise AdaptError(f"{where} rounds outputs, which is not supported: {SUPPORTED}")


def _is_supported(inputs: Any) -> bool:
    if not inputs.symmetric:
        return False
    if inputs.num_bits == 4:
        return inputs.type == "float" and inputs.group_size in (NVFP4_GROUP, MXFP4_GROUP)
    if inputs.num_bits != 8:
        return False
    if inputs.strategy == "group":
        return bool(inputs.type == "float" and inputs.group_size == 128 and inputs.dynamic is True)
    by_token = inputs.strategy == "token" and inputs.dynamic is True
    return by_token or (inputs.strategy == "tensor" and inputs.dynamic is False)


def _by_library(layer: StoredLayer, scheme: Any) -> torch.Tensor:
    from compressed_tensors.compressors import BaseCompressor  # noqa: PLC0415  slow

    stored = {part: layer.tensor(part, _ANY) for part in _LIBRARY_PARTS if part in layer.parts}
    # In float32, which represents every product of a small integer, or an E4M3 number, and a scale exactly.
    stored["weight_scale"] = layer.scales("weight_scale")
    _check_shapes(layer, scheme.weights, stored)
    try:
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        weight: torch.Tensor = compressor.decompress(stored, scheme)["weight"]
    except (KeyError, ValueError, RuntimeError, AssertionError, TypeError) as error:
        problem = f"and {', '.join(sorted(stored))} beside it cannot be dequantized ({one_line(error)})"
        layer.refuse("weight_scale", problem)
    return weight.float().contiguous()


def _check_shapes(layer: StoredLayer, weights: Any, stored: Mapping[str, torch.Tensor]) -> None:
    part = "weight_packed" if "weight_packed" in stored else "weight"
    if part == "weight_packed":
        shape = tuple(int(n) for n in layer.tensor("weight_shape", (torch.int32, torch.int64), (2,)))
        words = -(-shape[1] // (32 // weights.num_bits))  # no number goes on in the next word
        layer.tensor(part, (torch.int32,), (shape[0], words))
    else:
        shape = tuple(layer.tensor(part, _ANY, (None, None)).shape)
    if weights.strategy == "group":
        groups = layer.check_groups(part, shape[1], weights.group_size)
        layer.scales("weight_scale", (shape[0], groups))
    elif weights.strategy == "channel":
        layer.scales("weight_scale", (shape[0], 1))
    zeros = stored.get("weight_zero_point")
    if zeros is not None and part == "weight" and zeros.dtype == torch.int8:
        low, high = -(1 << (weights.num_bits - 1)), (1 << (weights.num_bits - 1)) - 1
        if int(zeros.min()) < low or int(zeros.max()) > high:
            layer.refuse("weight_zero_point", f"holds zero points outside of {low} to {high}")


_ANY = (
    torch.int8,
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.float8_e4m3fn,
    torch.float16,
    torch.bfloat16,
    torch.float32,
)
