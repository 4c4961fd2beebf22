"""What scores need of the dense model: sums over tokens of its layers' inputs and of the gradients at their outputs.

One walk through the model, backwards where gradients are needed: the memory is that of one layer. Finished layers are
stored in the run's parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from hemostat.compression.frame import Run
from hemostat.compression.pruning.masks import Score
from hemostat.models.activations import GRAM_ROWS, valid_rows
from hemostat.models.skeleton import Skeleton
from hemostat.models.walk import Around

STAGE = "scores"
Totals = dict[str, torch.Tensor]
"""Float32 by linear layer; a layer that no text reached is left out."""


def needs_gradients(score: Score) -> bool:
    """Of the divergence from the dense model's own predictions. Its gradient is 0 at the dense model; but with each
    token drawn from the model's prediction, as `output_gradients` does, the expected square of the gradient of −log p
    is the second derivative of the divergence (Fisher information)."""
    return score in (Score.TAYLOR, Score.FISHER)


def measure_totals(
    run: Run, score: Score, unit_widths: Callable[[str], Mapping[str, int] | None] = lambda layer: None
) -> None:
    """Store what `observed` adds up, of every decoder layer that is not stored yet. unit_widths: by decoder layer."""
    walk, count = run.texts_walk, len(run.skeleton.layers)
    backwards = needs_gradients(score)
    for done, n in enumerate(reversed(range(count)) if backwards else range(count)):
        if run.parts.get(_part(n)) is None:
            totals: Totals = {}
            around = _observing(run.skeleton, walk.names[n], score, totals, unit_widths(walk.names[n]))
            walk.measure(n, around, backwards=backwards)
            run.parts.put(_part(n), totals)
            walk.leave(n, backwards=backwards)
        run.progress(STAGE, done + 1, count)
    walk.drop()


def stored_totals(run: Run, index: int) -> Totals:
    """Of the decoder layer `index`; empty where nothing was measured."""
    return run.parts.get(_part(index)) or {}


@contextmanager
def observed(
    skeleton: Skeleton,
    layer: str,
    valid: torch.Tensor,
    score: Score,
    totals: Totals,
    unit_widths: Mapping[str, int] | None = None,
) -> Iterator[None]:
    """Inside of the context, passes through the decoder layer `layer` add to `totals` what scores need.

    valid: bool [texts, positions]. unit_widths: only for these linear layers, of the gates of units of so many inputs.

    Wanda: Σ x_j², [1, in]. Taylor: Σ |g_i x_j|, [out, in], or by unit Σ |Σ_j x_j (Wᵀg)_j|, [1, units]. Fisher: the same
    with squares. The gradient of one token with respect to the weight is g xᵀ, so that a sum over tokens is one product
    of two matrices. Tokens count as independent.
    """

    def hook(name: str) -> Callable[[Any, tuple[Any, ...], torch.Tensor], None]:
        def see(module: Any, arguments: tuple[Any, ...], output: torch.Tensor) -> None:
            inputs = valid_rows(arguments[0], valid)

            def see_gradient(gradient: torch.Tensor) -> None:
                for x, g in zip(inputs.split(GRAM_ROWS), valid_rows(gradient, valid).split(GRAM_ROWS), strict=True):
                    if unit_widths is None:
                        _add(totals, name, _sized(g, score).T @ _sized(x, score))
                    else:
                        gates = (x.float() * (g.float() @ module.weight.float())).unflatten(1, (-1, unit_widths[name]))
                        _add(totals, name, _sized(gates.sum(-1), score).sum(0, keepdim=True))

            if score is Score.WANDA:
                _add(totals, name, inputs.float().square().sum(0, keepdim=True))
            elif output.requires_grad:
                output.register_hook(see_gradient)

        return see

    modules = skeleton.linears_of(layer)
    names = modules if unit_widths is None else unit_widths
    handles = [modules[name].register_forward_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _sized(values: torch.Tensor, score: Score) -> torch.Tensor:
    exact = values.float()
    return exact.square() if score is Score.FISHER else exact.abs()


def _observing(
    skeleton: Skeleton, layer: str, score: Score, totals: Totals, unit_widths: Mapping[str, int] | None
) -> Around:
    return lambda batch: observed(skeleton, layer, batch.valid, score, totals, unit_widths)


def _part(index: int) -> str:
    return f"scores-{index:04d}"


def _add(totals: Totals, name: str, values: torch.Tensor) -> None:
    totals[name] = totals[name] + values if name in totals else values
