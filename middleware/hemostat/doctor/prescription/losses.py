"""What each candidate of each layer is predicted to cost, from the reference's activations and gradients. Torch.

To second order a change ΔW of one layer costs KL(r‖c) ≈ ½ E[(gᵀ ΔW x)²] nats per token, with the layer's inputs x and
the gradients g, at its outputs, of the log-likelihood of tokens drawn from the model: the Fisher information (Martens
2020, arXiv 1412.1193), without the products between positions. K-FAC, which the adapters use, also takes x and g as
independent. That fails at attention sinks: at the first position a few layers have inputs hundreds of times as large as
elsewhere, to which the loss is hardly sensitive. Losses of layers are added up: what one layer's change does to the
inputs of another is left out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hemostat.doctor.options import Target
from hemostat.doctor.pair import Floats, Ids
from hemostat.doctor.prescription.candidates import candidates, planned_weight
from hemostat.models.adapters.activations import Moments, output_key
from hemostat.models.adapters.checkpoint import Checkpoint
from hemostat.models.adapters.copies import device_of, dtype_of, weights_of
from hemostat.models.adapters.parts import Parts
from hemostat.models.adapters.skeleton import Skeleton
from hemostat.models.adapters.statistics import LayerStatistics
from hemostat.models.compression.plan import LayerPlan
from hemostat_calibration.adapters.gram import Metric


class TokenRows(Moments):
    """Inputs and gradients of each token, in place of their second moments."""

    def __init__(self) -> None:
        super().__init__()
        self._rows: dict[str, list[torch.Tensor]] = defaultdict(list)

    def add(self, key: str, rows: torch.Tensor, metric: Metric) -> None:
        self._rows[key].append(rows.float().cpu())

    def mean_square(self, name: str, delta: torch.Tensor) -> float:
        """E[(gᵀ ΔW x)²] over the tokens; 0 for a layer that no token reached. delta: ΔW, float32 [outputs, inputs]."""
        gradients = self._rows[output_key(name)]
        if not gradients:
            return 0.0
        changes = torch.cat(self._rows[self.groups[name]]) @ delta.T
        return float((changes * torch.cat(gradients)).sum(-1).double().square().mean())


@dataclass(frozen=True, slots=True)
class LayerLosses:
    """Of one linear layer. losses: predicted KL, nats per token, float64, by candidate."""

    outputs: int
    inputs: int
    plans: Sequence[LayerPlan]
    losses: Floats


def predicted_losses(
    reference: Path, texts: Sequence[Ids], target: Target, device: str, seed: int, parts: Parts,
    steps: Callable[[int, int], None],
) -> dict[str, LayerLosses]:  # fmt: skip
    """By linear layer. One decoder layer is in memory at a time; finished ones are kept in `parts`. AdaptError."""
    checkpoint = Checkpoint(reference, "REFERENCE")
    skeleton = Skeleton(checkpoint.config, dtype_of(checkpoint, "auto"), device_of(device), "REFERENCE")
    statistics = LayerStatistics(
        skeleton,
        weights_of(checkpoint),
        texts,
        parts,
        gradients=True,
        full=False,
        memory_bytes=0,
        seed=seed,
        progress=lambda _, done, total: steps(done, total),
        moments=TokenRows,
    )

    def losses(layer: str, moments: Moments) -> Mapping[str, torch.Tensor]:
        assert isinstance(moments, TokenRows)
        found = {}
        for name, module in skeleton.linears_of(layer).items():
            weight = checkpoint.weight(name)
            values = []
            for plan in candidates(target, module.in_features):
                delta = weight.float() - planned_weight(name, weight, plan).float()
                values.append(0.5 * moments.mean_square(name, delta))
            found[name] = torch.tensor(values, dtype=torch.float64)
        return found

    together: dict[str, torch.Tensor] = {}
    for kept in statistics.run(losses).values():
        together |= kept
    return {
        name: LayerLosses(
            module.out_features,
            module.in_features,
            candidates(target, module.in_features),
            np.asarray(together[name].numpy()),
        )
        for name, module in skeleton.linears.items()
    }
