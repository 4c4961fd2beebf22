"""Pruning as a method of compression: scores of the dense model, a budget, then one layer after the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hemostat.compression.error_compensation import damped
from hemostat.compression.frame import LayerData, LayerResult, Run
from hemostat.compression.pruning.compensation import least_squares, shrunk
from hemostat.compression.pruning.masks import Pattern, Score, comparable_scores, kept_share
from hemostat.compression.pruning.rows import Units, dropped_weights, find_units, unit_scores
from hemostat.compression.pruning.totals import Totals, measure_totals, stored_totals
from hemostat.compression.pruning.weights import check_sparsity, prune_weight
from hemostat.models.activations import Moments
from hemostat.models.checkpoint_folders import CompressError
from hemostat_calibration.adapters.gram import Metric
from hemostat_calibration.allocation.sparsity import share_units, share_zeros

QUANTILES = 1024
"""Of a layer's scores, for a global budget: a layer's number of zeros is exact to that part of its weights."""
LEAST_KEPT = 0.3
"""With a global budget, every layer keeps at least this part of what it would keep with a budget of its own."""


class Budget(StrEnum):
    """Where the sparsity holds."""

    LAYER = "layer"
    """In every linear layer; with the pattern `rows`, in every decoder layer."""
    GLOBAL = "global"
    """In the whole model: one threshold for the scores of all layers."""


@dataclass(frozen=True, slots=True)
class PruneOptions:
    """As on the command line. sparsity: the part of the weights of all linear layers but the head that is dropped."""

    sparsity: float
    score: Score = Score.WANDA
    pattern: Pattern = Pattern.UNSTRUCTURED
    budget: Budget = Budget.LAYER
    compensate: bool = True

    def __post_init__(self) -> None:
        """CompressError in one line."""
        check_sparsity(self.sparsity, self.pattern)
        if self.pattern is Pattern.TWO_OF_FOUR and self.budget is Budget.GLOBAL:
            raise CompressError("--budget global: the pattern 2:4 drops one half of every layer: use --budget layer")

    @property
    def max_sparsity(self) -> float:
        """Of a layer, with a global budget."""
        return 1.0 - LEAST_KEPT * (1.0 - self.sparsity)


class PruneMethod:
    """A `Method` of `frame`.

    The scores are of the dense model, from one walk through it, backwards for those with gradients. The second moments
    for `compensate` are of the inputs that the pruned layers before produce.
    """

    def __init__(self, options: PruneOptions) -> None:
        self._options = options
        self._zeros: dict[str, int] = {}
        self._lost: dict[str, npt.NDArray[np.bool_]] = {}
        """By decoder layer, which of the units of `find_units` are dropped, one kind after the other."""

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"scheme": "prune", **asdict(self._options)}

    @property
    def needs_texts(self) -> bool:
        return self._options.compensate or self._options.score is not Score.MAGNITUDE

    def prepare(self, run: Run) -> None:
        if self._options.score is not Score.MAGNITUDE:
            measure_totals(run, self._options.score, lambda layer: self._unit_widths(run, layer))
        if self._options.pattern is Pattern.ROWS:
            self._share_units(run)
        elif self._options.budget is Budget.GLOBAL:
            self._share_zeros(run)

    def compress_layer(self, layer: LayerData) -> LayerResult:
        totals = stored_totals(layer.run, layer.index)
        moments = None
        if self._options.pattern is Pattern.ROWS:
            units = find_units(layer.run.skeleton, layer.name)
            if self._options.compensate:
                moments = layer.moments(dict.fromkeys((kind.reader for kind in units), Metric.FULL))
            return self._without_units(layer, units, totals, moments)
        if self._options.compensate:
            moments = layer.moments(dict.fromkeys(layer.linears, Metric.FULL))
        weights, report = {}, {}
        for name in layer.linears:
            weight, factor = layer.weight(name), self._factor(totals, name)
            new, kept = prune_weight(
                weight,
                self._options.sparsity,
                self._options.pattern,
                factor,
                None if moments is None else _second_moments(moments, name),
                zeros=self._zeros.get(name),
                by_row=self._options.budget is Budget.LAYER and self._options.score is not Score.MAGNITUDE,
            )
            weights[f"{name}.weight"] = new
            report[name] = _report(kept, kept_share(comparable_scores(weight, factor, self._options.score), kept))
        return LayerResult(weights, report)

    def _factor(self, totals: Totals, name: str) -> torch.Tensor:
        """f of the score w² · f: [out, in], or what broadcasts to it."""
        if self._options.score is Score.MAGNITUDE:
            return torch.ones(1, 1)
        return totals[name].square() if self._options.score is Score.TAYLOR else totals[name]

    def _unit_widths(self, run: Run, layer: str) -> dict[str, int] | None:
        if self._options.pattern is not Pattern.ROWS:
            return None
        return {kind.reader: kind.width for kind in find_units(run.skeleton, layer)}

    def _share_zeros(self, run: Run) -> None:
        quantiles, sizes = {}, {}
        for index, layer in enumerate(run.skeleton.layers):
            totals = stored_totals(run, index)
            for name in run.skeleton.linears_of(layer):
                weight = run.source.checkpoint.weight(name)
                scores = comparable_scores(weight, self._factor(totals, name), self._options.score).flatten()
                sizes[name] = scores.numel()
                count = min(QUANTILES, len(scores))
                middles = ((torch.arange(count) + 0.5) * (len(scores) / count)).long()
                quantiles[name] = scores.sort().values[middles].double().numpy()
        self._zeros = share_zeros(quantiles, sizes, self._options.sparsity, self._options.max_sparsity)

    def _share_units(self, run: Run) -> None:
        scores, sizes = {}, {}
        for index, layer in enumerate(run.skeleton.layers):
            totals = stored_totals(run, index)
            units = find_units(run.skeleton, layer)
            found = [unit_scores(kind, self._options.score, totals, run.source.checkpoint.weight) for kind in units]
            scores[layer] = torch.cat(found).double().numpy()
            sizes[layer] = np.concatenate([np.full(kind.count, kind.weights, np.int64) for kind in units])
        sparsity = self._options.sparsity
        if self._options.budget is Budget.GLOBAL:
            self._lost = share_units(scores, sizes, sparsity, self._options.max_sparsity)
        else:
            for layer, own in scores.items():
                self._lost |= share_units({layer: own}, {layer: sizes[layer]}, sparsity, 1.0)

    def _without_units(
        self, layer: LayerData, units: list[Units], totals: Totals, moments: Moments | None
    ) -> LayerResult:
        lost = torch.from_numpy(self._lost[layer.name])
        weights, report = {}, {}
        for kind, dropped in zip(units, lost.split([kind.count for kind in units]), strict=True):
            for name, kept in dropped_weights(kind, dropped, layer.linears):
                weight = layer.weight(name)
                if name == kind.reader and moments is not None:
                    second = damped(_second_moments(moments, name))
                    weights[f"{name}.weight"] = least_squares(weight, second, kept, weight * kept)
                else:
                    weights[f"{name}.weight"] = weight * kept
                report[name] = _report(kept, None)
            scores = unit_scores(kind, self._options.score, totals, layer.weight)
            report[kind.reader] |= {"kept_score": kept_share(scores, ~dropped)}
        return LayerResult(weights, report)


def prune_method(options: PruneOptions) -> PruneMethod:
    return PruneMethod(options)


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


def _second_moments(moments: Moments, name: str) -> torch.Tensor:
    gram = moments.inputs(name)
    return shrunk(torch.from_numpy(gram.total.copy()), gram.count)


def _report(kept: torch.Tensor, share: float | None) -> dict[str, Any]:
    return {"zeros": int((~kept).sum()), "weights": kept.numel(), "kept_score": share}
