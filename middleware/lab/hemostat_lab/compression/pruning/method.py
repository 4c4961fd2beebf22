"""Pruning as a method of compression: gradients of the dense model, a share of the zeros for each layer, then one layer
after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from hemostat_calibration.adapters.gram import Metric
from hemostat_calibration.allocation.sparsity import share_zeros
from hemostat_lab.compression.error_compensation import damped
from hemostat_lab.compression.frame import LayerData, LayerResult, Run
from hemostat_lab.compression.pruning.compensation import compensated, shrunk, towards_dense
from hemostat_lab.compression.pruning.dense_model import DenseInputs, measure_gradients, stored_gradients
from hemostat_lab.compression.pruning.rows import dropped_units, dropped_weights, find_units, unit_scores
from hemostat_lab.compression.pruning.weights import Pattern, check_sparsity, kept_share, prune_weight
from hemostat_lab.models.activations import Moments


@dataclass(frozen=True, slots=True)
class PruneOptions:
    """The options of pruning, as on the command line. sparsity: the part of the weights of all linear layers but the
    head that is dropped."""

    sparsity: float
    pattern: Pattern = Pattern.UNSTRUCTURED

    def __post_init__(self) -> None:
        """CompressError in one line."""
        check_sparsity(self.sparsity, self.pattern)


class PruneMethod:
    """A `Method` of `frame`.

    Gradients are of the dense model, from one walk backwards through it; `rows` does without. The second moments of
    inputs are of those that the pruned decoder layers before produce. 2:4, which loses more, is fitted to the dense
    model's outputs, and reads what the pruned linear layers of its own decoder layer compute, too.
    """

    needs_texts = True

    def __init__(self, options: PruneOptions) -> None:
        self._options = options
        self._zeros: dict[str, int] = {}
        """Without a pattern, of each linear layer that a text reached."""

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"scheme": "prune", **asdict(self._options)}

    def prepare(self, run: Run) -> None:
        if self._options.pattern is Pattern.ROWS:
            return
        losses = measure_gradients(run)
        if self._options.pattern is Pattern.UNSTRUCTURED:
            sizes = {name: run.skeleton.linears[name].weight.numel() for name in losses}
            self._zeros = share_zeros(losses, sizes, self._options.sparsity)

    def compress_layer(self, layer: LayerData) -> LayerResult:
        if self._options.pattern is Pattern.ROWS:
            return self._without_units(layer)
        gradients = stored_gradients(layer.run, layer.index)
        weights, report = {}, {}
        for name, target, second in _targets(layer, self._options.pattern):
            sparsity = self._zeros[name] / target.numel() if name in self._zeros else self._options.sparsity
            new, kept = prune_weight(target, sparsity, self._options.pattern, second, gradients.get(name))
            weights[f"{name}.weight"] = new
            layer.set_parameter(f"{name}.weight", new)
            scores = target.square() if second is None else target.square() * second.diagonal().float()
            if name in gradients:
                scores *= gradients[name].diagonal()[:, None]
            report[name] = _report(kept, kept_share(scores, kept))
        return LayerResult(weights, report)

    def _without_units(self, layer: LayerData) -> LayerResult:
        units = find_units(layer.run.skeleton, layer.name)
        moments = layer.moments(dict.fromkeys((kind.reader for kind in units), Metric.FULL))
        second = {kind.reader: damped(_second_moments(moments, kind.reader)) for kind in units}
        scores = [unit_scores(kind, layer.weight(kind.reader), second[kind.reader].diagonal()) for kind in units]
        weights, report = {}, {}
        for kind, own, dropped in zip(units, scores, dropped_units(units, scores, self._options.sparsity), strict=True):
            for name, kept in dropped_weights(kind, dropped, layer.linears):
                weight = layer.weight(name)
                new = weight * kept
                weights[f"{name}.weight"] = compensated(weight, second[name], kept, new) if name == kind.reader else new
                report[name] = _report(kept, None)
            report[kind.reader] |= {"kept_score": kept_share(own, ~dropped)}
        return LayerResult(weights, report)


def pathway_lines(layers: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """For people, from the `layers` of the report: by decoder layer, the part of the weights that is dropped, and the
    part of the score that is kept (the paper's critical pathways): the mean of its linear layers, and the least."""
    lines = [f"{'layer':<24} {'dropped':>8} {'score kept':>11}  least"]
    for layer, linears in layers.items():
        zeros, weights = (sum(row[key] for row in linears.values()) for key in ("zeros", "weights"))
        shares = {name: row["kept_score"] for name, row in linears.items() if row["kept_score"] is not None}
        least = min(shares, key=lambda name: shares[name])
        mean = sum(shares.values()) / len(shares)
        short = least.removeprefix(f"{layer}.")
        lines.append(f"{layer:<24} {zeros / weights:>8.1%} {mean:>11.1%}  {shares[least]:.1%} {short}")
    return lines


def _targets(layer: LayerData, pattern: Pattern) -> Iterator[tuple[str, torch.Tensor, torch.Tensor | None]]:
    """By linear layer, the weight that it is pruned from and the second moments of its inputs, None if no text reached
    it, such as an expert that is never chosen. Each is set before the next one is asked for."""
    reached = set()
    targets = _fitted_to_dense(layer) if pattern is Pattern.TWO_OF_FOUR else _as_stored(layer)
    for name, target, second in targets:
        reached.add(name)
        yield name, target, second
    for name in (name for name in layer.linears if name not in reached):
        yield name, layer.weight(name), None


def _fitted_to_dense(layer: LayerData) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    dense = DenseInputs(layer)
    for groups in dense.stages:
        for group, paired in dense.moments(groups).items():
            second = shrunk(paired.second, paired.tokens)
            change = towards_dense(damped(second), paired.gap)
            for name in dense.groups[group]:
                weight = layer.weight(name)
                yield name, weight + weight @ change, second


def _as_stored(layer: LayerData) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    moments = layer.moments(dict.fromkeys(layer.linears, Metric.FULL))
    for name in moments.groups:
        yield name, layer.weight(name), _second_moments(moments, name)


def _second_moments(moments: Moments, name: str) -> torch.Tensor:
    gram = moments.inputs(name)
    return shrunk(torch.from_numpy(gram.total.copy()), gram.count)


def _report(kept: torch.Tensor, share: float | None) -> dict[str, Any]:
    return {"zeros": int((~kept).sum()), "weights": kept.numel(), "kept_score": share}
