"""The weight of each token for a linear layer: the mean squared gradient at the layer's outputs.

The weighted second moment Σ w_t x_t x_tᵀ of a layer's inputs is then, averaged over the output channels, its block of
the Fisher information (Kim et al. 2025, GuidedQuant, arXiv 2505.07004; here with one weight for all channels of a
layer). The gradients are taken of −log p(y), with y drawn from the model's own prediction. Weights are kept by token,
so that second moments can be taken of inputs as the compressed model sees them.
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

Weights = Mapping[str, list[torch.Tensor]]
"""By linear layer, for each batch: float32 [valid tokens], mean 1 over all tokens."""


def measure_token_weights(run: Run) -> None:
    """Measures the token weights of every linear layer by one walk backwards, and stores them in the run's parts.
    Weights that are there already are kept."""

    def measure(n: int) -> Mapping[str, torch.Tensor]:
        result: dict[str, list[torch.Tensor]] = {}
        run.texts_walk.measure(n, partial(_seen, run, run.texts_walk.names[n], result), backwards=True)
        return {f"{name}|{b}": weights for name, batches in result.items() for b, weights in enumerate(batches)}

    run.measure_backwards(_part, measure)


def token_weights(layer: LayerData) -> Weights:
    """Returns the weights that `measure_token_weights` found for a decoder layer, divided by their mean. Experts have
    none: the tokens that a router sends to one change with the outputs of the layers before it."""
    kept = layer.run.parts.get(_part(layer.index))
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

    def add(self, name: str, rows: torch.Tensor, weights: torch.Tensor | None) -> None:
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
            return lambda module, arguments, output: moments.add(name, valid_rows(arguments[0], batch.valid), weights)

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


def _part(n: int) -> str:
    return f"token-weights-{n:04d}"
