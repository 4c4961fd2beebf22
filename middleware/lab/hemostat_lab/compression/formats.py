"""The form in which a compressed layer is stored: compressed-tensors' formats, GPTQ's or AWQ's, which vLLM loads."""

from __future__ import annotations

import importlib.metadata
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import msgspec
import torch

from hemostat_lab.compression.rounding import highest_integer, round_to_steps
from hemostat_lab.compression.unpacking import PACKED_FORMAT
from hemostat_lab.models.skeleton import InputRounding, round_to_e2m1
from hemostat_lab.models.stored_formats import awq, gptq
from hemostat_lab.models.stored_formats.compressed_tensors import MXFP4, NVFP4
from hemostat_lab.models.stored_formats.fp4 import E8M0_BIAS, MXFP4_GROUP, NVFP4_GROUP, pack_e2m1
from hemostat_lab.models.stored_formats.integers import pack_rows
from hemostat_lab.models.stored_formats.reading import stored_format
from hemostat_lab.models.stored_formats.stored_layer import StoredFormat, StoredLayer

FP4 = {"nvfp4": NVFP4_GROUP, "mxfp4": MXFP4_GROUP}
"""Kinds of E2M1 numbers, and the inputs that share a scale."""
NVFP4_DIVISOR = 128.0
"""The divisor of NVFP4's scales of groups. It is the same for all layers, because vLLM has one for the layers that it
fuses. E4M3 then represents scales of groups whose largest weight is from 0.0008 to 21 without loss of precision."""
PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_global_scale", "qweight", "qzeros", "scales", "g_idx")
"""Last parts of the names of tensors that take the place of `weight`."""


class WeightFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The format of the weight of a linear layer, and of its inputs at run time.

    bits: the bits of an integer; 8 with kind `float` (E4M3), or 4 with `nvfp4` and `mxfp4` (E2M1). group_size: the
    number of inputs that share a scale; None: one scale per output channel. inputs: the rounding of inputs by token at
    run time. layout: the layout of the file; `gptq` and `awq` hold integers.
    """

    bits: int
    group_size: int | None = None
    kind: Literal["int", "float", "nvfp4", "mxfp4"] = "int"
    inputs: InputRounding = "exact"
    layout: Literal["compressed-tensors", "gptq", "awq"] = "compressed-tensors"

    @property
    def container(self) -> str:
        """The name of its format in compressed-tensors."""
        if self.kind in FP4:
            return {"nvfp4": NVFP4, "mxfp4": MXFP4}[self.kind]
        if self.kind == "float":
            return "float-quantized"
        return PACKED_FORMAT if self.inputs == "exact" else "int-quantized"


@dataclass(frozen=True, slots=True)
class Quantized:
    """A weight [outputs, inputs] that is stored as integers (or E4M3) and scales [outputs, groups].

    weight: is rounded to the nearest multiple of the scale when it is stored: for what is on the grid already, that
    changes nothing. scale: in the dtype in which it is stored.
    """

    format: WeightFormat
    weight: torch.Tensor
    scale: torch.Tensor


def snapped_scale(weight_format: WeightFormat) -> Callable[[torch.Tensor], torch.Tensor]:
    """The nearest positive scales of groups that FP4 can store, of any float32."""

    def power(scale: torch.Tensor) -> torch.Tensor:
        return torch.exp2(scale.clamp_min(2.0**-100).log2().round())

    def e4m3(scale: torch.Tensor) -> torch.Tensor:
        in_range = (scale * NVFP4_DIVISOR).clamp(2.0**-9, torch.finfo(torch.float8_e4m3fn).max)
        return in_range.to(torch.float8_e4m3fn).float() / NVFP4_DIVISOR

    return power if weight_format.kind == "mxfp4" else e4m3


def stored(quantized: Quantized) -> dict[str, torch.Tensor]:
    """The tensors of the layer by the last part of their names, such as `weight_packed`."""
    of = quantized.format
    if of.kind in FP4:
        packed = {"weight_packed": pack_e2m1(_steps(quantized))}
        if of.kind == "mxfp4":
            exponents = quantized.scale.float().log2().round() + E8M0_BIAS
            return packed | {"weight_scale": exponents.to(torch.uint8)}
        scale = (quantized.scale.float() * NVFP4_DIVISOR).to(torch.float8_e4m3fn)
        return packed | {"weight_scale": scale, "weight_global_scale": torch.tensor([NVFP4_DIVISOR])}
    if of.layout != "compressed-tensors":
        return _integers(quantized)
    scheme, compressor = _scheme(quantized.format)
    result: dict[str, torch.Tensor] = compressor.compress(
        {"weight": quantized.weight, "weight_scale": quantized.scale}, scheme
    )
    return result


def restored(weight_format: WeightFormat, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Float32 [outputs, inputs]: exact products of what `stored` stores."""
    layer = StoredLayer("layer", tensors, lambda part: tensors[part], "compress")
    return _stored_format(weight_format).weight(layer)


def on_grid(quantized: Quantized) -> torch.Tensor:
    """Float32 [outputs, inputs]: the values that are stored."""
    scale = quantized.scale.float().repeat_interleave(quantized.weight.shape[1] // quantized.scale.shape[1], dim=1)
    return _steps(quantized) * scale


def _steps(quantized: Quantized) -> torch.Tensor:
    """Float32 [outputs, inputs]: the numbers that are stored, in units of the scales."""
    exact = quantized.weight.float()
    scale = quantized.scale.float().repeat_interleave(exact.shape[1] // quantized.scale.shape[1], dim=1)
    if quantized.format.kind == "float":
        return (exact / scale).to(torch.float8_e4m3fn).float()
    if quantized.format.kind in FP4:
        return round_to_e2m1(exact / scale)
    return round_to_steps(exact, scale, highest_integer(quantized.format.bits))


def _integers(quantized: Quantized) -> dict[str, torch.Tensor]:
    """Returns the stored tensors in GPTQ's or AWQ's layout; all zero points are the middle of the range, as symmetric
    integers have it."""
    bits = quantized.format.bits
    middle = highest_integer(bits) + 1
    steps = (_steps(quantized) + middle).to(torch.int32).T
    scales = quantized.scale.T.contiguous()
    zeros = torch.full(scales.shape, middle, dtype=torch.int32)
    if quantized.format.layout == "awq":
        return {"qweight": awq.pack_outputs(steps), "qzeros": awq.pack_outputs(zeros), "scales": scales}
    return {
        "qweight": pack_rows(steps, bits),
        "qzeros": gptq.one_less(pack_rows(zeros.T, bits), bits).T.contiguous(),
        "scales": scales,
        "g_idx": (torch.arange(len(steps)) // (len(steps) // len(scales))).to(torch.int32),
    }


def quantization_config(
    formats: Mapping[str, WeightFormat], dense: Sequence[str], heads: Sequence[str]
) -> dict[str, Any] | None:
    """`quantization_config` of config.json; None where nothing is quantized.

    formats: of the quantized layers, by name. dense, heads: linear layers that are not quantized, and output
    embeddings. Layers that vLLM fuses must have one format.
    """
    if not formats:
        return None
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus  # noqa: PLC0415  slow

    first = next(iter(formats.values()))
    if first.layout != "compressed-tensors":
        # Such a checkpoint has one format.
        common = {"bits": first.bits, "group_size": first.group_size or -1, "quant_method": first.layout}
        if first.layout == "awq":
            return common | {"zero_point": True, "version": "gemm", "modules_to_not_convert": [*heads, *dense]}
        return common | {"sym": True, "desc_act": False, "checkpoint_format": "gptq", "lm_head": False}
    members: dict[WeightFormat, list[str]] = defaultdict(list)
    for name, weight_format in formats.items():
        members[weight_format].append(name)
    uniform = len(members) == 1 and not dense
    groups = {}
    for number, (weight_format, names) in enumerate(members.items()):
        scheme, _ = _scheme(weight_format)
        groups[f"group_{number}"] = scheme.model_copy(update={"targets": ["Linear"] if uniform else names})
    containers = {weight_format.container for weight_format in members}
    config = QuantizationConfig(
        config_groups=groups,
        ignore=[*heads, *dense],
        format=containers.pop() if len(containers) == 1 else "mixed-precision",
        quantization_status=QuantizationStatus.COMPRESSED,
    )
    dumped: dict[str, Any] = config.model_dump(mode="json")
    return dumped | {
        "quant_method": "compressed-tensors",
        "version": importlib.metadata.version("compressed-tensors"),
    }


@cache
def _scheme(weight_format: WeightFormat) -> tuple[Any, Any]:
    from compressed_tensors.compressors import BaseCompressor  # noqa: PLC0415  slow
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme  # noqa: PLC0415

    group_size = weight_format.group_size
    grouping: dict[str, Any] = {"strategy": "channel"}
    if group_size is not None:
        grouping = {"strategy": "group", "group_size": group_size}
    if weight_format.kind == "nvfp4":
        grouping |= {"strategy": "tensor_group", "scale_dtype": torch.float8_e4m3fn}
    elif weight_format.kind == "mxfp4":
        grouping |= {"scale_dtype": torch.uint8}
    kind = "int" if weight_format.kind == "int" else "float"
    weights = QuantizationArgs(num_bits=weight_format.bits, type=kind, symmetric=True, **grouping)
    inputs = None
    if weight_format.inputs != "exact":
        inputs = QuantizationArgs(
            num_bits=8,
            type="int" if weight_format.inputs == "int8" else "float",
            symmetric=True,
            strategy="token",
            dynamic=True,
        )
    container = weight_format.container
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs, format=container)
    return scheme, BaseCompressor.get_value_from_registry(container)


@cache
def _stored_format(weight_format: WeightFormat) -> StoredFormat:
    config = quantization_config({"layer": weight_format}, [], [])
    assert config is not None
    return stored_format(config, "compress")
