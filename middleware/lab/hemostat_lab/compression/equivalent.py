"""Equivalent scales: numbers that are moved from what a layer reads into its weights, so that less is lost in rounding.

Channel i of what linear layers read is divided by s_i, in the norm or in the rows of the linear layer before them, and
column i of their weights is multiplied by s_i. The function stays the same. Two rules find s:

- AWQ (Lin et al. 2023, arXiv 2306.00978): s = (root mean square of the input)^α: weights that multiply large inputs
  are rounded more finely.
- SmoothQuant (Xiao et al. 2022, arXiv 2211.10438): s = max|x|^α / max|w|^(1−α): inputs that are rounded, too, lose
  their outliers to the weights.

α is searched by the error that is left in the layers' outputs on texts. No scaling, s = 1, is always one candidate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from hemostat_lab.compression.fisher_information import WeightedMoments
from hemostat_lab.compression.formats import FP4, WeightFormat, snapped_scale
from hemostat_lab.compression.frame import LayerData
from hemostat_lab.compression.rounding import E2M1_LARGEST, highest_integer, round_to_steps, weight_groups
from hemostat_lab.models.activations import Batch, forward_hooks, valid_rows
from hemostat_lab.models.skeleton import Inputs, consumers, norm_offset, round_to_e2m1, rounded_inputs

AWQ_ALPHAS = tuple(n / 20 for n in range(1, 21))
SMOOTH_ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SAMPLE_ROWS = 1024
"""Inputs on which rounded ones are tried."""
TOLERANCE = 0.02
"""Relative difference of a layer's outputs that rounding of scaled weights to bfloat16 explains."""
_BETWEEN = (("v_proj", "o_proj"), ("up_proj", "down_proj"))


@dataclass(frozen=True, slots=True)
class Site:
    """before: the norm or linear layer whose output channels are divided. after: the linear layers that read them."""

    before: str
    after: tuple[str, ...]
    is_norm: bool


@dataclass(frozen=True, slots=True)
class SiteInputs:
    """The inputs of the layers `after`. hessian: Σ x xᵀ [inputs, inputs]. largest: max |x| [inputs]. rows: some x."""

    hessian: torch.Tensor
    largest: torch.Tensor
    rows: torch.Tensor


FindScale = Callable[[Mapping[str, torch.Tensor], SiteInputs, Mapping[str, WeightFormat]], "torch.Tensor | None"]
"""Weights of the layers `after`, their inputs, their formats -> s, float32 [inputs]; None: 1."""


def sites(layer: LayerData) -> list[Site]:
    """Where scales can be moved, by the names that decoder models of transformers share."""
    modules = [f"{layer.name}.{name}" for name, _ in layer.run.skeleton.layers[layer.name].named_modules() if name]
    result = []
    for module in modules:
        after = tuple(name for name in consumers(module, modules) if name in layer.linears)
        if after:
            result.append(Site(module, after, True))
    for before, after_kind in _BETWEEN:
        for name in layer.linears:
            other = name.removesuffix(before) + after_kind
            if not name.endswith(f".{before}") or other not in layer.linears:
                continue
            if layer.linears[name].out_features == layer.linears[other].in_features:  # not with grouped heads
                result.append(Site(name, (other,), False))
    return result


def scale_layer(layer: LayerData, formats: Mapping[str, WeightFormat], find: FindScale) -> dict[str, torch.Tensor]:
    """Move scales in the loaded layer. Returns its parameters that are no linear weights and have changed.

    A norm that other linear layers read, too, is left out, and so is a site whose scaling changes the layer's outputs.
    Where the hidden states are much larger than what the layer adds, these hardly change, whatever it computes.
    """
    changed: dict[str, torch.Tensor] = {}
    for site in sites(layer):
        readers = {name for name, group in layer.groups.items() if group == layer.groups.get(site.after[0])}
        reached = site.after[0] in layer.groups  # not an expert that no text reaches
        if not reached or not all(name in formats for name in site.after) or not readers <= set(site.after):
            continue
        inputs = _inputs(layer, site.after[0])
        scale = find({name: layer.weight(name) for name in site.after}, inputs, formats)
        if scale is None:
            continue
        moved = _moved(layer, site, scale)
        original = {name: layer.parameter(name) for name in moved}
        expected = layer.first_outputs().float()
        for name, value in moved.items():
            layer.set_parameter(name, value)
        difference = (layer.first_outputs().float() - expected).norm() / expected.norm()
        if float(difference) > TOLERANCE:
            for name, value in original.items():
                layer.set_parameter(name, value)
        else:
            weights = {f"{name}.weight" for name in layer.linears}
            changed |= {name: layer.parameter(name) for name in moved if name not in weights}
    return changed


def awq_scale(
    weights: Mapping[str, torch.Tensor], inputs: SiteInputs, formats: Mapping[str, WeightFormat]
) -> torch.Tensor | None:
    """Returns the scales [inputs] with the least error of the outputs when weights are rounded to nearest; None if no
    scales are better."""
    magnitude = inputs.hessian.diagonal().float().clamp_min(1e-20).sqrt()
    hessian = inputs.hessian.float()

    def loss(scale: torch.Tensor | None) -> float:
        total = 0.0
        for name, weight in weights.items():
            error = _through_grid(name, weight, scale, formats[name]) - weight
            total += float(((error @ hessian) * error).sum())
        return total

    return _best([_centred(magnitude**alpha) for alpha in AWQ_ALPHAS], loss)


def smooth_scale(
    weights: Mapping[str, torch.Tensor], inputs: SiteInputs, formats: Mapping[str, WeightFormat]
) -> torch.Tensor | None:
    """Returns the scales [inputs] with the least error of the outputs when weights and inputs are rounded; None if no
    scales are better."""
    of_weights = torch.stack([weight.abs().amax(0) for weight in weights.values()]).amax(0).clamp_min(1e-5)
    of_inputs = inputs.largest.float().clamp_min(1e-5)
    exact = {name: inputs.rows @ weight.T for name, weight in weights.items()}

    def loss(scale: torch.Tensor | None) -> float:
        rows = inputs.rows if scale is None else inputs.rows / scale
        steps, of_token = rounded_inputs(rows, Inputs("int8"))
        rounded = steps * of_token
        total = 0.0
        for name, weight in weights.items():
            moved = weight if scale is None else weight * scale
            outputs = rounded @ _through_grid(name, moved, None, formats[name]).T
            total += float((outputs - exact[name]).square().sum())
        return total

    candidates = [_centred(of_inputs**alpha / of_weights ** (1 - alpha)) for alpha in SMOOTH_ALPHAS]
    return _best(candidates, loss)


def _through_grid(
    name: str, weight: torch.Tensor, scale: torch.Tensor | None, weight_format: WeightFormat
) -> torch.Tensor:
    """The weight after its columns are multiplied by `scale`, rounded, and divided again."""
    moved = weight if scale is None else weight * scale
    groups = weight_groups(name, moved, weight_format.group_size)
    if weight_format.kind in FP4:
        scales = snapped_scale(weight_format)(groups.abs().amax(-1, keepdim=True) / E2M1_LARGEST)
        in_fp4 = (round_to_e2m1(groups / scales) * scales).flatten(1)
        return in_fp4 if scale is None else in_fp4 / scale
    highest = highest_integer(weight_format.bits)
    steps = groups.abs().amax(-1, keepdim=True).clamp_min(1e-12) / (highest + 0.5)
    rounded = (round_to_steps(groups, steps, highest) * steps).flatten(1)
    return rounded if scale is None else rounded / scale


def _centred(scale: torch.Tensor) -> torch.Tensor:
    """Times a number, so that the largest and the smallest are equally far from 1."""
    return scale / (scale.max() * scale.min()).sqrt()


def _best(candidates: Sequence[torch.Tensor], loss: Callable[[torch.Tensor | None], float]) -> torch.Tensor | None:
    best: torch.Tensor | None = None
    least = loss(None)
    for scale in candidates:
        value = loss(scale)
        if value < least:
            best, least = scale, value
    return best


def _moved(layer: LayerData, site: Site, scale: torch.Tensor) -> dict[str, torch.Tensor]:
    """New values of the parameters of a site, by name, in float32."""
    module = layer.run.skeleton.model.get_submodule(site.before)
    moved: dict[str, torch.Tensor] = {}
    if site.is_norm:
        weight = layer.parameter(f"{site.before}.weight")
        offset = norm_offset(module)
        divided = ((weight.float() + offset) / scale - offset).to(weight.dtype)
        # By what the rounded weight was divided by, exactly; where that is 0, the channel is 0 with any scale.
        ratio = (weight.float() + offset) / (divided.float() + offset)
        scale = torch.where(ratio.isfinite() & (ratio > 0), ratio, scale)
        moved[f"{site.before}.weight"] = divided
    else:
        moved[f"{site.before}.weight"] = layer.weight(site.before) / scale[:, None]
    if getattr(module, "bias", None) is not None:
        moved[f"{site.before}.bias"] = layer.parameter(f"{site.before}.bias").float() / scale
    return moved | {f"{name}.weight": layer.weight(name) * scale for name in site.after}


def _inputs(layer: LayerData, name: str) -> SiteInputs:
    """Returns the inputs of the linear layer `name`."""
    moments = WeightedMoments()
    largest: list[torch.Tensor] = []
    rows: list[torch.Tensor] = []
    each = -(-SAMPLE_ROWS // len(layer.run.texts_walk.batches))

    def measuring(batch: Batch) -> AbstractContextManager[None]:
        def see(module: Any, arguments: tuple[Any, ...], output: torch.Tensor) -> None:
            given = valid_rows(arguments[0], batch.valid)
            moments.update(name, given, None)
            largest.append(given.float().abs().amax(0))
            rows.append(given[:: -(-len(given) // each)].float())

        return forward_hooks([(layer.linears[name], see)])

    layer.forward(measuring)
    return SiteInputs(moments.totals[name], torch.stack(largest).amax(0), torch.cat(rows))
