"""What each candidate of each layer is predicted to cost, from the reference's activations and gradients. Torch.

To second order a change ΔW of one layer costs KL(r‖c) ≈ ½ E[(gᵀ ΔW x)²] nats per token, with the layer's inputs x and
the gradients g, at its outputs, of the log-likelihood of tokens drawn from the model: the Fisher information (Martens
2020, arXiv 1412.1193), without the products between positions. K-FAC, which the adapters use, also takes x and g as
independent. That fails at attention sinks: at the first position a few layers have inputs hundreds of times as large as
elsewhere, to which the loss is hardly sensitive. Losses of layers are added up: what one layer's change does to the
inputs of another is left out.

ΔW is what is left after errors are compensated, as `hemostat compress --plan` does: what rounding to nearest would cost
is mostly in a few channels, and says little of it. Errors are compensated on every second token and E[…] is taken of
the others: on the same tokens it would be too small, most of all for layers with many inputs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from hemostat.checkpoints.errors import AdaptError
from hemostat_calibration.adapters.gram import Metric
from hemostat_lab.compression.input_moments import InputMoments
from hemostat_lab.compression.plan import LayerPlan
from hemostat_lab.compression.pruning.compensation import shrunk
from hemostat_lab.doctor.options import Target
from hemostat_lab.doctor.pair import Floats, Ids
from hemostat_lab.doctor.prescription.candidates import candidates, planned_weight
from hemostat_lab.models.activations import Moments, output_key
from hemostat_lab.models.checkpoint import Checkpoint
from hemostat_lab.models.copies import device_of, dtype_of, weights_of
from hemostat_lab.models.parts import Parts
from hemostat_lab.models.second_moments import LayerStatistics
from hemostat_lab.models.skeleton import Skeleton


class TokenRows(Moments):
    """Inputs and gradients of each token, in place of their second moments."""

    def __init__(self) -> None:
        super().__init__()
        self._rows: dict[str, list[torch.Tensor]] = defaultdict(list)
        self._inputs: dict[tuple[str, int], InputMoments] = {}

    def update(self, key: str, rows: torch.Tensor, metric: Metric) -> None:
        self._rows[key].append(rows.float().cpu())

    def reached(self, name: str) -> bool:
        """By two tokens at least; an expert may not be."""
        return sum(map(len, self._rows[self.groups[name]] if name in self.groups else [])) > 1

    def input_moments(self, name: str, step: int = 1) -> InputMoments:
        """Of every `step`-th token, shrunk; the same object for layers that read the same. AdaptError."""
        group = self.groups[name]
        if (group, step) not in self._inputs:
            rows = torch.cat(self._rows[group])[::step]
            total = (rows.T @ rows).double()
            if not bool(total.isfinite().all()):
                raise AdaptError(f"layer {name}: its inputs are not finite: REFERENCE is damaged; copy it again")
            self._inputs[group, step] = InputMoments(shrunk(total, len(rows)), len(rows))
        return self._inputs[group, step]

    def mean_square(self, name: str, delta: torch.Tensor, tokens: int) -> float:
        """E[(gᵀ ΔW x)²] over `tokens`, from every second of those that reached the layer, beginning with the second;
        the others count as 0. delta: ΔW, float32 [outputs, inputs]."""
        rows = torch.cat(self._rows[self.groups[name]])
        gradients = torch.cat(self._rows[output_key(name)])[1::2]
        products = ((rows[1::2] @ delta.T) * gradients).sum(-1)
        return float(products.double().square().mean()) * len(rows) / tokens


def token_statistics(
    reference: Path, texts: Sequence[Ids], device: str, parts: Parts, steps: Callable[[int, int], None], *,
    gradients: bool, seed: int = 0,
) -> tuple[Checkpoint, Skeleton, LayerStatistics]:  # fmt: skip
    """The reference's checkpoint, its layers, and the walk that can give `TokenRows` of each decoder layer. AdaptError.

    seed: of the tokens that gradients are taken for.
    """
    checkpoint = Checkpoint(reference, "REFERENCE")
    on = device_of(device)
    skeleton = Skeleton(checkpoint.config, dtype_of(checkpoint, "auto", on), on, "REFERENCE")
    statistics = LayerStatistics(
        skeleton,
        weights_of(checkpoint),
        texts,
        parts,
        gradients=gradients,
        memory_bytes=0,
        seed=seed,
        progress=lambda _, done, total: steps(done, total),
    )
    return checkpoint, skeleton, statistics


@dataclass(frozen=True, slots=True)
class LayerLosses:
    """Of one linear layer. losses: predicted KL, nats per token, float64, by candidate. reached: by a token."""

    outputs: int
    inputs: int
    plans: Sequence[LayerPlan]
    losses: Floats
    reached: bool = True


def predicted_losses(
    reference: Path, texts: Sequence[Ids], target: Target, device: str, seed: int, parts: Parts,
    steps: Callable[[int, int], None],
) -> dict[str, LayerLosses]:  # fmt: skip
    """By linear layer. One decoder layer is in memory at a time; finished ones are kept in `parts`. AdaptError.

    Layers that no token reached have the losses of `with_unreached`.
    """
    checkpoint, skeleton, statistics = token_statistics(
        reference, texts, device, parts, steps, gradients=True, seed=seed
    )
    tokens = sum(map(len, texts))

    def losses(layer: str, moments: TokenRows) -> Mapping[str, torch.Tensor]:
        result = {}
        for name, module in skeleton.linears_of(layer).items():
            if moments.reached(name):
                weight, inputs = checkpoint.weight(name), moments.input_moments(name, 2)
                values = []
                for plan in candidates(target, module.in_features):
                    delta = weight.float() - planned_weight(name, weight, plan, inputs).float()
                    values.append(0.5 * moments.mean_square(name, delta, tokens))
                result[name] = torch.tensor(values, dtype=torch.float64)
        return result

    by_layer: dict[str, torch.Tensor] = {}
    for kept in statistics.run(losses, TokenRows).values():
        by_layer |= kept
    result = {}
    for name, module in skeleton.linears.items():
        plans = candidates(target, module.in_features)
        known = by_layer[name].numpy() if name in by_layer else np.full(len(plans), np.nan)
        result[name] = LayerLosses(module.out_features, module.in_features, plans, known, name in by_layer)
    return with_unreached(result)


def with_unreached(losses: Mapping[str, LayerLosses]) -> dict[str, LayerLosses]:
    """The same, with losses for the layers that no token reached, such as experts: theirs are unknown, not 0.

    By candidate, the median loss per weight of the reached layers of the same kind (whose names are equal but for
    numbers); where there are none, the largest of any layer. AdaptError where no layer was reached.

    >>> import numpy as np
    >>> plans = [LayerPlan(4), LayerPlan(16)]
    >>> result = with_unreached({
    ...     "0.experts.0.up": LayerLosses(2, 8, plans, np.array([0.1, 0.0])),
    ...     "0.experts.1.up": LayerLosses(2, 8, plans, np.array([0.3, 0.0])),
    ...     "0.experts.2.up": LayerLosses(4, 8, plans, np.full(2, np.nan), reached=False),
    ... })
    >>> result["0.experts.2.up"].losses.round(6).tolist()
    [0.4, 0.0]
    """
    reached = {name: loss for name, loss in losses.items() if loss.reached}
    if not reached:
        raise AdaptError("no token of the texts reached a linear layer: give other prompts")
    return {name: loss if loss.reached else _unknown(name, loss, reached) for name, loss in losses.items()}


def _unknown(name: str, layer: LayerLosses, reached: Mapping[str, LayerLosses]) -> LayerLosses:
    same_kind = [layer for other, layer in reached.items() if _kind(other) == _kind(name)]
    highest = max(float(layer.losses.max()) / (layer.outputs * layer.inputs) for layer in reached.values())
    by_weight = []
    for plan in layer.plans:
        known = _losses_per_weight(same_kind, plan)
        others = _losses_per_weight(reached.values(), plan)
        by_weight.append(np.median(known) if known else max(others, default=highest))
    return replace(layer, losses=np.array(by_weight) * layer.outputs * layer.inputs)


def _losses_per_weight(layers: Iterable[LayerLosses], plan: LayerPlan) -> list[float]:
    """Of the layers that have the candidate."""
    return [
        float(layer.losses[layer.plans.index(plan)]) / (layer.outputs * layer.inputs)
        for layer in layers
        if plan in layer.plans
    ]


def _kind(layer: str) -> str:
    return ".".join(part for part in layer.split(".") if not part.isdecimal())
