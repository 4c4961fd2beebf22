"""The Fisher information of each weight, its diagonal: Σ (g_i x_j)² over tokens.

With each token drawn from the model's own prediction, as `output_gradients` does, the expected square of the gradient
of −log p is the second derivative of the divergence from the model. The gradient of one token with respect to the
weight is g xᵀ, so that a sum over tokens is one product of two matrices. Tokens count as independent.

It takes one walk backwards through the model, with the memory of one layer. Finished layers are stored in the run's
parts.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch

from hemostat_lab.compression.frame import Run
from hemostat_lab.models.activations import GRAM_ROWS, Batch, Hook, forward_hooks, valid_rows
from hemostat_lab.models.skeleton import Skeleton

Totals = dict[str, torch.Tensor]
"""Float32 [out, in] by linear layer; a layer that no text reached is left out."""


def measure_totals(run: Run) -> None:
    """Store them of every decoder layer that is not stored yet."""

    def measure(n: int) -> Totals:
        totals: Totals = {}
        layer = run.texts_walk.names[n]
        run.texts_walk.measure(n, partial(_observed, run.skeleton, layer, totals), backwards=True)
        return totals

    run.measure_backwards(_part, measure)


def stored_totals(run: Run, index: int) -> Totals:
    """Returns the sums of the decoder layer `index`; empty if nothing was measured."""
    return run.parts.get(_part(index)) or {}


def _observed(skeleton: Skeleton, layer: str, totals: Totals, batch: Batch) -> AbstractContextManager[None]:
    """Inside of the context, passes backwards through the decoder layer `layer` add to `totals`."""

    def hook(name: str) -> Hook:
        def see(module: Any, arguments: tuple[Any, ...], output: torch.Tensor) -> None:
            inputs = valid_rows(arguments[0], batch.valid)

            def see_gradient(gradient: torch.Tensor) -> None:
                rows = valid_rows(gradient, batch.valid)
                for x, g in zip(inputs.split(GRAM_ROWS), rows.split(GRAM_ROWS), strict=True):
                    products = g.float().square().T @ x.float().square()
                    totals[name] = totals[name] + products if name in totals else products

            if output.requires_grad:
                output.register_hook(see_gradient)

        return see

    return forward_hooks((module, hook(name)) for name, module in skeleton.linears_of(layer).items())


def _part(index: int) -> str:
    return f"fisher-{index:04d}"
