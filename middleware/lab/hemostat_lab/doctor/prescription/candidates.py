"""What a layer can be stored as, and its weight then."""

from __future__ import annotations

from typing import Any

import msgspec

from hemostat_lab.compression.calibrated import calibrated_weight
from hemostat_lab.compression.formats import Quantized, WeightFormat, on_grid
from hemostat_lab.compression.input_moments import InputMoments
from hemostat_lab.compression.methods import nearest
from hemostat_lab.compression.plan import DENSE_BITS, LayerPlan, fused_name
from hemostat_lab.compression.pruning.weights import Pattern
from hemostat_lab.compression.rounding import pruned, rounded
from hemostat_lab.doctor.options import Target
from hemostat_lab.models.checkpoint_folders import cache_key

KERNEL_GROUPS = (None, 128, 64, 32)
"""Of Marlin's kernels (`MARLIN_SUPPORTED_GROUP_SIZES` of vLLM 0.32), coarsest first; of Triton's and Intel's, too."""

_DENSE = LayerPlan(DENSE_BITS)
_INT4 = tuple(LayerPlan(4, group) for group in KERNEL_GROUPS)
_FP4 = (LayerPlan(4, 16, kind="nvfp4"), LayerPlan(4, 32, kind="mxfp4"))
_CANDIDATES: dict[Target, tuple[LayerPlan, ...]] = {
    # From compute capability 7.5 on Marlin has them all; other kernels for newer GPUs have some.
    "vllm": (*_INT4, *_FP4, LayerPlan(8), LayerPlan(8, 64), _DENSE),
    # vLLM 0.32 has no kernel for 8-bit weights alone there, and FP4 only with inputs that are rounded, or emulated.
    "vllm-amd": (*_INT4, _DENSE),
    "vllm-intel": (*_INT4, _DENSE),
    "vllm-cpu": (*_INT4, _DENSE),
    # Half of the weights at 8 bits need the bytes of 5 bits, at 4 bits those of 3.
    "any": (
        *(LayerPlan(bits, 64) for bits in range(2, 9)),
        *(LayerPlan(bits, 32) for bits in (3, 4)),
        *(LayerPlan(bits, 64, 0.5) for bits in (4, 8)),
        _DENSE,
    ),
}
"""Each candidate is rounded once for each layer, which takes most of a prescription's time."""


def candidates(target: Target, inputs: int) -> list[LayerPlan]:
    """For a layer of so many inputs. Where a group size does not divide them, one scale by channel takes its place."""
    fitting = (
        plan if not inputs % (plan.group_size or inputs) else LayerPlan(plan.bits, None, plan.sparsity, plan.pattern)
        for plan in _CANDIDATES[target]
    )
    return list(dict.fromkeys(fitting))


def candidates_key(target: Target) -> str:
    """Of the target's list: losses that are stored by candidate are of no use for another list."""
    return cache_key(msgspec.to_builtins(_CANDIDATES[target]))


def unit_name(target: Target, layer: str) -> str:
    """Layers with the same unit get the same plan: those that vLLM fuses."""
    return layer if target == "any" else fused_name(layer)


def planned_weight(name: str, weight: Any, plan: LayerPlan, inputs: InputMoments | None) -> Any:
    """Layer `name`'s weight, a tensor [out, in], as `plan` says, in the same dtype.

    inputs: errors are compensated on them, in one pass (`gptq`); None: it is pruned by magnitude and rounded to
    nearest.
    """
    if plan.bits == DENSE_BITS and not plan.sparsity:
        return weight.clone()
    if inputs is None:
        result = pruned(weight, plan.sparsity) if plan.sparsity else weight.clone()
        if plan.kind != "int":
            return on_grid(nearest(name, weight, WeightFormat(plan.bits, plan.group_size, plan.kind))).to(weight.dtype)
        return result if plan.bits == DENSE_BITS else rounded(name, result, plan.bits, plan.group_size)
    weight_format = None if plan.bits == DENSE_BITS else WeightFormat(plan.bits, plan.group_size, plan.kind)
    sparse = (plan.sparsity, Pattern(plan.pattern)) if plan.sparsity else None
    new = calibrated_weight(name, weight, inputs, weight_format, sparse, "gptq")
    return (on_grid(new) if isinstance(new, Quantized) else new).to(weight.dtype)
