"""What each candidate of each layer is predicted to cost, from the reference's activations and gradients. Torch.

To second order a change ΔW of one layer costs KL(r‖c) ≈ ½ tr(ΔW A ΔWᵀ G) nats per token, with the second moments A of
the layer's inputs and G of the gradients of log-likelihood at its outputs (K-FAC: Martens & Grosse 2015,
arXiv 1503.05671), as in the adapters' corrections. Losses of layers are added up: what one layer's change does to the
inputs of another is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hemostat.doctor.options import Target
from hemostat.doctor.pair import Floats, Ids
from hemostat.doctor.prescription.candidates import candidates, planned_weight
from hemostat.models.adapters.activations import Moments
from hemostat.models.adapters.checkpoint import Checkpoint
from hemostat.models.adapters.copies import device_of, dtype_of, weights_of
from hemostat.models.adapters.parts import Parts
from hemostat.models.adapters.skeleton import Skeleton
from hemostat.models.adapters.statistics import LayerStatistics
from hemostat.models.compression.plan import LayerPlan
from hemostat_calibration.adapters.correction import weighted_error

MEMORY_BYTES = 4 << 30
"""For the statistics of a layer; where it is too little, only their diagonals are kept."""


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
        full=None,
        memory_bytes=MEMORY_BYTES,
        seed=seed,
        progress=lambda _, done, total: steps(done, total),
    )

    def losses(layer: str, moments: Moments) -> Mapping[str, torch.Tensor]:
        found = {}
        for name, module in skeleton.linears_of(layer).items():
            weight = checkpoint.weight(name)
            values = []
            for plan in candidates(target, module.in_features):
                delta = (weight.float() - planned_weight(name, weight, plan).float()).numpy()
                values.append(0.5 * weighted_error(delta, moments.inputs(name), moments.outputs(name)))
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
