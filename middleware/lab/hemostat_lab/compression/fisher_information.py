"""The Fisher information of linear layers, from one walk backwards through the model: by weight, and by token.

With each token drawn from the model's own prediction, as `output_gradients` does, the expected square of the gradient
of −log p is the second derivative of the divergence from the model. A walk has the memory of one layer. Finished layers
are stored in the run's parts.

By weight it is the diagonal, Σ (g_i x_j)² over tokens (`measure_totals`). The gradient of one token with respect to the
weight is g xᵀ, so that a sum over tokens is one product of two matrices. Tokens count as independent.

By token it is the mean squared gradient at the layer's outputs (`measure_token_weights`). The weighted second moment
Σ w_t x_t x_tᵀ of a layer's inputs is then, averaged over the output channels, its block of the Fisher information (Kim
et al. 2025, GuidedQuant, arXiv 2505.07004; here with one weight for all channels of a layer). Weights are kept by
token, so that second moments can be taken of inputs as the compressed model sees them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch

from hemostat_lab.compression.frame import LayerData, Run
from hemostat_lab.models.activations import GRAM_ROWS, Batch, Hook, forward_hooks, valid_rows
from hemostat_lab.models.experts import is_expert
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

    run.measure_backwards(_totals_part, measure)


def stored_totals(run: Run, index: int) -> Totals:
    """Returns the sums of the decoder layer `index`; empty if nothing was measured."""
    return run.parts.get(_totals_part(index)) or {}


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


def _totals_part(index: int) -> str:
    return f"fisher-{index:04d}"


Weights = Mapping[str, list[torch.Tensor]]
"""By linear layer, for each batch: float32 [valid tokens], mean 1 over all tokens."""


def measure_token_weights(run: Run) -> None:
    """Measures the token weights of every linear layer by one walk backwards, and stores them in the run's parts.
    Weights that are there already are kept."""

    def measure(n: int) -> Mapping[str, torch.Tensor]:
        result: dict[str, list[torch.Tensor]] = {}
        run.texts_walk.measure(n, partial(_seen, run, run.texts_walk.names[n], result), backwards=True)
        return {f"{name}|{b}": weights for name, batches in result.items() for b, weights in enumerate(batches)}

    run.measure_backwards(_weights_part, measure)


def token_weights(layer: LayerData) -> Weights:
    """Returns the weights that `measure_token_weights` found for a decoder layer, divided by their mean. Experts have
    none: the tokens that a router sends to one change with the outputs of the layers before it."""
    kept = layer.run.parts.get(_weights_part(layer.index))
    assert kept is not None, layer.name
    result: dict[str, list[torch.Tensor]] = {}
    for name in layer.linears:
        if is_expert(name):
            continue
        weights = [kept[f"{name}|{b}"] for b in range(len(layer.run.texts_walk.batches))]
        mean = float(torch.cat(weights).double().mean())
        result[name] = [w / mean if mean > 0 else torch.ones_like(w) for w in weights]
    return result


class WeightedMoments:
    """Σ w_t x_t x_tᵀ over the valid tokens, float64 [inputs, inputs], of linear layers, and the number of tokens."""

    def __init__(self) -> None:
        self.totals: dict[str, torch.Tensor] = {}
        self.tokens: Counter[str] = Counter()

    def update(self, name: str, rows: torch.Tensor, weights: torch.Tensor | None) -> None:
        """rows: [n, inputs]. weights: [n]; None: each 1."""
        exact = rows.float()
        self.tokens[name] += len(rows)
        if name not in self.totals:
            self.totals[name] = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
        parts = (None,) * -(-len(exact) // GRAM_ROWS) if weights is None else weights.split(GRAM_ROWS)
        for part, w in zip(exact.split(GRAM_ROWS), parts, strict=True):
            product = part.T @ (part if w is None else part * w[:, None].to(part.device))
            self.totals[name] += product.to("cpu", torch.float64)


def weighted_moments(layer: LayerData, names: Sequence[str], guide: Weights) -> WeightedMoments:
    """Returns the second moments of the inputs of the linear layers `names`. guide: weights of the tokens, by layer;
    each token counts 1 for a layer without weights."""
    moments = WeightedMoments()
    batches = layer.run.texts_walk.batches
    numbers = {id(batch): number for number, batch in enumerate(batches)}

    def measuring(batch: Batch) -> AbstractContextManager[None]:
        def hook(name: str) -> Hook:
            weights = guide[name][numbers[id(batch)]] if name in guide else None
            return lambda module, arguments, output: moments.update(
                name, valid_rows(arguments[0], batch.valid), weights
            )

        return forward_hooks((layer.linears[name], hook(name)) for name in names)

    layer.forward(measuring)
    return moments


def _seen(run: Run, layer: str, gradients: dict[str, list[torch.Tensor]], batch: Batch) -> AbstractContextManager[None]:
    def hook(name: str) -> Hook:
        def see_gradient(gradient: torch.Tensor) -> None:
            rows = valid_rows(gradient, batch.valid)
            gradients.setdefault(name, []).append(rows.float().square().mean(-1).cpu())

        def see(module: Any, arguments: tuple[Any, ...], output: torch.Tensor) -> None:
            output.register_hook(see_gradient)

        return see

    linears = run.skeleton.linears_of(layer).items()
    return forward_hooks((module, hook(name)) for name, module in linears if not is_expert(name))


def _weights_part(n: int) -> str:
    return f"token-weights-{n:04d}"
