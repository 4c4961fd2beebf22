"""Quantization and pruning of weights: rounding to nearest, without any data.

Methods that use data (GPTQ, AWQ, SparseGPT) lose less. torch is imported where it is used, since importing it is slow.
"""

# ruff: noqa: PLC0415

from __future__ import annotations

import importlib.metadata
from typing import Any

from hemostat.models.checkpoint_folders import CompressError, Progress

SCHEMES = ("w4a16", "int3", "w8a8", "prune10", "prune30", "prune50")
"""w4a16: int4 weights, symmetric, groups of 64 inputs. int3: the same with 3 bits, written dense. w8a8: int8 weights
per output channel, int8 activations scaled per token at run time. pruneNN: the NN % of every layer's weights with the
smallest magnitude are set to zero. All linear layers except the head."""

GROUP_SIZE = 64
PACKED_FORMAT = "pack-quantized"


def pruned(weight: Any, sparsity: float) -> Any:
    """A copy of `weight`, [out, in], with the `sparsity` smallest part of its entries, by magnitude, set to zero."""
    import torch

    pruned = weight.clone().flatten()
    count = int(pruned.numel() * sparsity)
    pruned[torch.topk(pruned.abs().float(), count, largest=False, sorted=False).indices] = 0
    return pruned.view_as(weight)


def rounded(name: str, weight: Any, bits: int, group_size: int = GROUP_SIZE) -> Any:
    """A copy of layer `name`'s weight, [out, in], rounded to integers of `bits` bits times the scale of its group."""
    groups = weight_groups(name, weight, group_size)
    scale = _fitted_scale(groups, bits).float().unsqueeze(-1)
    highest = 2 ** (bits - 1) - 1
    steps = (groups.float() / scale).round().clamp(-highest - 1, highest)
    return (steps * scale).flatten(1).to(weight.dtype)


def weight_groups(name: str, weight: Any, group_size: int = GROUP_SIZE) -> Any:
    """`weight`, [out, in], as [out, groups, group_size]."""
    inputs = weight.shape[1]
    if inputs % group_size:
        raise CompressError(f"layer {name} has {inputs} inputs, not a multiple of {group_size}: use w8a8 or prune50")
    return weight.unflatten(1, (-1, group_size))


def quantize(
    state: dict[str, Any], linears: dict[str, Any], heads: list[str], scheme: str, progress: Progress
) -> dict[str, Any]:
    """Replace the weights of `linears` in `state` by quantized ones; returns config.json's `quantization_config`."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
    )

    if scheme == "w4a16":
        weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=GROUP_SIZE)
        activations = None
        written_as = PACKED_FORMAT
    else:
        weights = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="channel")
        activations = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True)
        written_as = "int-quantized"
    recipe = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=activations, format=written_as)
    compressor = BaseCompressor.get_value_from_registry(written_as)
    for done, name in enumerate(linears):
        if done % 50 == 0:
            progress(f"{scheme}: {done} of {len(linears)} layers")
        weight = state.pop(f"{name}.weight")
        groups = weight_groups(name, weight) if scheme == "w4a16" else weight.unsqueeze(1)
        scale = _fitted_scale(groups, weights.num_bits)
        quantized = compressor.compress({"weight": weight, "weight_scale": scale}, recipe)
        state.update({f"{name}.{key}": value for key, value in quantized.items()})
    config = QuantizationConfig(
        config_groups={"group_0": recipe},
        ignore=heads,
        format=written_as,
        quantization_status=QuantizationStatus.COMPRESSED,
    )
    dumped: dict[str, Any] = config.model_dump(mode="json")
    return dumped | {
        "quant_method": "compressed-tensors",
        "version": importlib.metadata.version("compressed-tensors"),
    }


def _fitted_scale(groups: Any, bits: int) -> Any:
    """Scales [out, groups] for weights [out, groups, inputs of a group], by search over how far to clip.

    Of the scales from the group's largest magnitude down to 0.6 of it, the one with the least sum of |error|^2.4: for
    few bits, clipping the largest weights a little costs less than rounding all the others coarsely.
    """
    import torch

    exact = groups.float()
    highest = 2 ** (bits - 1) - 1
    largest = exact.abs().amax(-1) / (highest + 0.5)
    best = torch.full_like(largest, torch.inf)
    fitted = torch.zeros_like(groups[..., 0])
    for shrink in torch.linspace(1.0, 0.6, 21):
        scale = (largest * shrink).to(groups.dtype).clamp(min=torch.finfo(groups.dtype).tiny)
        steps = scale.float().unsqueeze(-1)
        rounded = (exact / steps).round().clamp(-highest - 1, highest) * steps
        error = (rounded - exact).abs().pow(2.4).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        fitted = torch.where(better, scale, fitted)
    return fitted
