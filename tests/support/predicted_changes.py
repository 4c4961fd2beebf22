"""What a prescription predicts, by brute force: gradients of the whole model. Torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from hemostat_lab.compression.input_moments import InputMoments
from hemostat_lab.compression.plan import LayerPlan
from hemostat_lab.compression.pruning.compensation import shrunk
from hemostat_lab.doctor.prescription.candidates import planned_weight


def input_moments_of(rows: torch.Tensor) -> InputMoments:
    """rows: [tokens, inputs]."""
    return InputMoments(shrunk((rows.T @ rows).double(), len(rows)), len(rows))


def mean_square_change(model: Any, ids: Any, name: str, seed: int) -> Callable[[LayerPlan], float]:
    """E[(gᵀ ΔW x)²] of a plan of layer `name` over every second position of the text `ids`, the first batch; errors are
    compensated on the others."""
    module, seen = model.get_submodule(name), {}
    handle = module.register_forward_hook(lambda _, given, output: seen.update(x=given[0], y=output))
    logits = model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0]
    handle.remove()
    # The tokens that `output_gradients` draws.
    total = torch.softmax(logits.detach().float(), -1).cumsum(-1, dtype=torch.float64)
    uniforms = torch.from_numpy(np.random.default_rng([seed, 0]).random(len(ids)))
    drawn = torch.searchsorted(total, uniforms[:, None] * total[:, -1:], right=True)
    (gradient,) = torch.autograd.grad(-torch.log_softmax(logits, -1).gather(1, drawn).sum(), seen["y"])
    weight, x = module.weight.detach(), seen["x"][0].detach()

    def of(plan: LayerPlan) -> float:
        delta = weight - planned_weight(name, weight, plan, input_moments_of(x[0::2]))
        changes = (x @ delta.T * gradient[0]).sum(-1)[1::2]
        return float(changes.double().square().mean())

    return of
