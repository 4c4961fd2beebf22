"""Quantization that looks at what the layers read on texts: of all layers alike, or by a plan (`plan.json`)."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, Literal

import msgspec
import torch

from hemostat_lab.compression.equivalent import awq_scale, scale_layer, smooth_scale
from hemostat_lab.compression.error_compensation import Grid, descend, gptq, quadratic_error, refit_scales
from hemostat_lab.compression.fisher_information import (
    measure_token_weights,
    measure_totals,
    stored_totals,
    token_weights,
    weighted_moments,
)
from hemostat_lab.compression.formats import FP4, Quantized, WeightFormat, on_grid, snapped_scale
from hemostat_lab.compression.frame import LayerData, LayerResult, Run, Source
from hemostat_lab.compression.input_moments import InputMoments
from hemostat_lab.compression.methods import nearest
from hemostat_lab.compression.plan import DENSE_BITS, PACKED_BITS, LayerPlan, Plan, check_plan, fused_name
from hemostat_lab.compression.pruning.weights import Pattern, prune_weight
from hemostat_lab.compression.rounding import clipped_scale, e2m1_scale, weight_groups
from hemostat_lab.models.checkpoint_folders import CompressError

REFITS = 2
"""Times that scales are fitted to integers, and integers to scales, after `gptq`."""
SWEEPS = 2
"""The number of sweeps of coordinate descent after `gptq`."""


Rounding = Literal["nearest", "gptq", "descent"]


class Calibration(msgspec.Struct, frozen=True):
    """The way in which errors are measured and weights are rounded.

    scales: the equivalent scales that are moved into the norms and layers before, by `awq`, `smooth`, or `none`.
    rounding: `nearest`, `gptq`, or `descent`: coordinate descent and fitted scales after `gptq`. guided: tokens are
    weighted by the gradients at the layer's outputs.

    clip: the point at which each scale clips. It is the one where a sum over the scale's weights is least: Σ_j E[x_j²]
    ΔW_ij² (`inputs`), or Σ_j E[(g_i x_j)²] ΔW_ij² (`kl`). x are the inputs, and g the gradients, at the layer's
    outputs, of the log-likelihood of tokens drawn from the model. Half of the second sum is the second-order KL of the
    change, by the diagonal of the Fisher information (Martens 2020, arXiv 1412.1193; as a weight for quantization: Kim
    et al. 2023, SqueezeLLM, arXiv 2306.07629). Unlike `inputs`, it does not count large inputs to which the loss is
    not sensitive, such as the inputs of attention sinks. The Fisher information is measured on the dense model, before
    `scales` are moved.
    """

    rounding: Rounding = "nearest"
    scales: Literal["none", "awq", "smooth"] = "none"
    guided: bool = False
    clip: Literal["inputs", "kl"] = "inputs"


CALIBRATIONS = {
    "clip": Calibration(),
    "clip_kl": Calibration(clip="kl"),
    "awq": Calibration(scales="awq"),
    "smooth": Calibration(scales="smooth"),
    "gptq": Calibration("gptq"),
    "descent": Calibration("descent"),
    "guided": Calibration("descent", guided=True),
}
"""`--calibrate`."""


class Calibrated:
    """A method of the frame.

    formats: the formats of the layers that are quantized, by name. packed: the layers among them that are stored
    packed (None: all); the others are stored dense, rounded. sparse: the layers that are pruned first, with the part
    of the weights that is dropped; these are rounded to nearest, which keeps zeros.
    """

    needs_texts = True

    def __init__(
        self,
        formats: Mapping[str, WeightFormat],
        calibration: Calibration,
        packed: frozenset[str] | None = None,
        sparse: Mapping[str, tuple[float, Pattern]] | None = None,
    ) -> None:
        self._formats = formats
        self._calibration = calibration
        self._packed = frozenset(formats) if packed is None else packed
        self._sparse = sparse or {}

    @property
    def settings(self) -> Mapping[str, Any]:
        """Layers of the same format are one entry."""
        layers: dict[str, list[str]] = {}
        for name in dict.fromkeys([*self._formats, *self._sparse]):
            how = {"sparse": self._sparse.get(name)}
            if name in self._formats:
                how = msgspec.to_builtins(self._formats[name]) | {"packed": name in self._packed} | how
            layers.setdefault(json.dumps(how), []).append(name)
        return {"calibration": msgspec.to_builtins(self._calibration), "layers": layers}

    def prepare(self, run: Run) -> None:
        if self._calibration.guided:
            measure_token_weights(run)
        if self._calibration.clip == "kl":
            measure_totals(run)

    def compress_layer(self, layer: LayerData) -> LayerResult:
        weights: dict[str, torch.Tensor | Quantized] = {}
        errors: dict[str, float] = {}
        if self._calibration.scales != "none":
            find = awq_scale if self._calibration.scales == "awq" else smooth_scale
            weights |= scale_layer(layer, self._formats, find)
        guide = token_weights(layer) if self._calibration.guided else {}
        fisher = stored_totals(layer.run, layer.index) if self._calibration.clip == "kl" else {}
        for names in _input_groups(layer):
            # Layers that follow see what the rounded ones before them compute.
            wanted = [name for name in names if name in self._formats or name in self._sparse]
            if not wanted:
                continue
            moments = weighted_moments(layer, wanted if guide else wanted[:1], guide)
            inputs = {key: InputMoments(total, moments.tokens[key]) for key, total in moments.totals.items()}
            for name in wanted:
                own = inputs[name if guide else wanted[0]]
                hessian = own.total
                measured = [hessian, fisher[name]] if name in fisher else [hessian]
                if not all(bool(tensor.isfinite().all()) for tensor in measured):
                    raise CompressError(
                        f"layer {name}: its inputs on the texts, or its gradients, are not finite: SOURCE is damaged; "
                        "copy it again"
                    )
                new = calibrated_weight(
                    name,
                    layer.parameter(f"{name}.weight"),
                    own,
                    self._formats.get(name),
                    self._sparse.get(name),
                    self._calibration.rounding,
                    fisher.get(name),
                )
                before, now = layer.weight(name), on_grid(new) if isinstance(new, Quantized) else new
                whole = quadratic_error(before, hessian, torch.zeros_like(before)).sum()
                errors[name] = float(quadratic_error(before, hessian, now).sum() / whole) if whole > 0 else 0.0
                layer.set_parameter(f"{name}.weight", now)
                weights[f"{name}.weight"] = new if name in self._packed else now
        for name in [name for name in layer.linears if name in self._formats and name not in errors]:
            # No text reached it, such as an expert that is never chosen.
            new = nearest(name, layer.parameter(f"{name}.weight"), self._formats[name])
            weights[f"{name}.weight"] = new if name in self._packed else on_grid(new)
        return LayerResult(weights, {"relative_error": errors})


def calibrated_weight(
    name: str,
    stored: torch.Tensor,
    inputs: InputMoments,
    weight_format: WeightFormat | None,
    sparse: tuple[float, Pattern] | None,
    rounding: Rounding,
    fisher: torch.Tensor | None = None,
) -> torch.Tensor | Quantized:
    """Returns the weight of one linear layer, pruned, quantized, or both, with errors compensated on its inputs.

    stored: [outputs, inputs], in the source's dtype, in which the scales are stored, too. weight_format: None if it is
    only pruned. A pruned weight is rounded to nearest, which keeps zeros. fisher: Σ (g_i x_j)², [outputs, inputs], for
    `Calibration.clip`.
    """
    if sparse is not None:
        sparsity, pattern = sparse
        pruned, _ = prune_weight(stored.float(), sparsity, pattern, inputs.shrunk)
        return pruned if weight_format is None else on_grid(nearest(name, pruned, weight_format))
    assert weight_format is not None, name
    if weight_format.kind == "float":
        return nearest(name, stored, weight_format)
    weight, exact = stored.float(), inputs.damped
    groups = weight_groups(name, weight, weight_format.group_size)
    importance = exact.diagonal().float() if fisher is None else fisher
    of_fp4 = weight_format.kind in FP4
    if of_fp4:
        scale = e2m1_scale(groups, snapped_scale(weight_format), importance)
    else:
        scale = clipped_scale(groups, weight_format.bits, importance, stored.dtype)
    grid = Grid(weight_format.bits, scale.float(), groups.shape[-1], of_fp4)
    if rounding == "nearest":
        return Quantized(weight_format, grid.steps(weight) * grid.columns(), scale)
    steps = gptq(weight, inputs.factor, grid)
    if rounding == "descent":
        steps = descend(weight, exact, grid, steps, SWEEPS)
        for _ in range(0 if of_fp4 else REFITS):  # FP4's scales cannot be any numbers
            scale = refit_scales(weight, exact, grid, steps).to(stored.dtype)
            grid = Grid(grid.bits, scale.float(), grid.group_size)
            steps = descend(weight, exact, grid, steps)
    return Quantized(weight_format, steps * grid.columns(), scale)


def _input_groups(layer: LayerData) -> list[list[str]]:
    """Linear layers that read the same tensor, in the order in which they are computed."""
    groups: dict[str, list[str]] = {}
    for name, group in layer.groups.items():
        groups.setdefault(group, []).append(name)
    return list(groups.values())


def planned(plan: Plan, source: Source, calibration: Calibration) -> tuple[Calibrated, list[str]]:
    """The method, and notes for people: what is written dense, and why. CompressError unless it is for `source`."""
    check_plan(plan, source.checkpoint.digest(), source.shapes)
    layers = {name: plan.layers[name] for name in source.shapes}
    rounded = {n: WeightFormat(p.bits, p.group_size, p.kind) for n, p in layers.items() if p.bits != DENSE_BITS}
    sparse = {n: (p.sparsity, Pattern(p.pattern)) for n, p in layers.items() if p.sparsity}
    mixed = mixed_fused(layers)
    widths = sorted({p.bits for p in layers.values()} - {*PACKED_BITS, DENSE_BITS})
    packed = frozenset(
        name for name in rounded if layers[name].bits in PACKED_BITS and name not in sparse and name not in mixed
    )
    notes = []
    if widths:
        notes.append(
            f"layers of {', '.join(map(str, widths))} bits are written dense: vLLM packs {PACKED_BITS} bits only"
        )
    if sparse:
        notes.append(f"{len(sparse)} layers with zeros are written dense: vLLM has no format for them")
    if mixed:
        notes.append(
            f"{len(mixed)} layers are written dense: vLLM fuses them with others that have another format, such as "
            f"{min(mixed)}; give q, k and v, and gate and up, the same bits and group size to have them packed"
        )
    return Calibrated(rounded, calibration, packed, sparse), notes


def mixed_fused(layers: dict[str, LayerPlan]) -> set[str]:
    """The layers that vLLM fuses with one of another format."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in layers:
        groups[fused_name(name)].append(name)
    return {name for names in groups.values() if len({layers[n] for n in names}) > 1 for name in names}
