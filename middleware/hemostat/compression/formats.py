"""How a compressed layer is stored, in compressed-tensors' formats that vLLM loads."""

from __future__ import annotations

import importlib.metadata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import msgspec
import torch

from hemostat.compression.rounding import highest_integer, round_to_steps
from hemostat.compression.unpacking import PACKED_FORMAT
from hemostat.models.skeleton import InputRounding


class WeightFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of the weight of a linear layer, and of its inputs at run time.

    bits: of an integer, or 8 with kind `float` (E4M3). group_size: inputs that share a scale; None: one scale per
    output channel. inputs: how they are rounded by token at run time.
    """

    bits: int
    group_size: int | None = None
    kind: Literal["int", "float"] = "int"
    inputs: InputRounding = "exact"

    @property
    def container(self) -> str:
        """The name of its format in compressed-tensors."""
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


def stored(quantized: Quantized) -> dict[str, torch.Tensor]:
    """The tensors of the layer by the last part of their names, such as `weight_packed`."""
    scheme, compressor = _scheme(quantized.format)
    result: dict[str, torch.Tensor] = compressor.compress(
        {"weight": quantized.weight, "weight_scale": quantized.scale}, scheme
    )
    return result


def restored(weight_format: WeightFormat, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Float32 [outputs, inputs]: exact products of what `stored` stores."""
    scheme, compressor = _scheme(weight_format)
    # In float32, which represents every product of an integer and a scale exactly.
    parts = dict(tensors) | {"weight_scale": tensors["weight_scale"].float()}
    weight: torch.Tensor = compressor.decompress(parts, scheme)["weight"]
    return weight.float().contiguous()


def on_grid(quantized: Quantized) -> torch.Tensor:
    """Float32 [outputs, inputs]: the values that are stored."""
    exact = quantized.weight.float()
    scale = quantized.scale.float().repeat_interleave(exact.shape[1] // quantized.scale.shape[1], dim=1)
    if quantized.format.kind == "float":
        return (exact / scale).to(torch.float8_e4m3fn).float() * scale
    return round_to_steps(exact, scale, highest_integer(quantized.format.bits)) * scale


def quantization_config(
    formats: Mapping[str, WeightFormat], dense: Sequence[str], heads: Sequence[str]
) -> dict[str, Any] | None:
    """`quantization_config` of config.json; None where nothing is quantized.

    formats: of the quantized layers, by name. dense, heads: linear layers that are not quantized, and output
    embeddings. Layers that vLLM fuses must have one format.
    """
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus  # noqa: PLC0415  slow

    if not formats:
        return None
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
    weights = QuantizationArgs(num_bits=weight_format.bits, type=weight_format.kind, symmetric=True, **grouping)
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
