"""The error of each layer's outputs. Torch.

Both models process the same tokens. `accumulated` compares the hidden states after the layer. `alone` compares the
outputs of both layers on the reference's input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import msgspec
import torch

from hemostat_lab.doctor.checkpoints import CheckpointPair, pieces
from hemostat_lab.doctor.kl_meter import Text


class Distances(msgspec.Struct):
    """Means over scored positions, by layer: |c − r| / |r| of the hidden states after it, their cosine, and the error
    of what the layer adds on the reference's input, relative to what it adds."""

    accumulated: list[float]
    cosine: list[float]
    alone: list[float]


def distances(pair: CheckpointPair, r_layers: Any, c_layers: Any, texts: Sequence[Text]) -> Distances:
    """Means over the scored positions, by layer."""
    sums = sum((_sums(pair, r_layers, c_layers, text) for text in texts), torch.zeros(3, len(r_layers)).double())
    means = sums / sum(len(text.output) for text in texts)
    return Distances(*means.tolist())


def _sums(pair: CheckpointPair, r_layers: Any, c_layers: Any, text: Text) -> torch.Tensor:
    """Sums over the scored positions of one text, float64 [3, layers]."""
    tokens, sequence = len(text.output), text.sequence(pair.device)
    sums = torch.zeros(3, len(r_layers), dtype=torch.float64)
    after: list[torch.Tensor] = []

    def keep(n: int, arguments: tuple[Any, Any], output: torch.Tensor) -> None:
        after.append(output[0, -tokens:])

    def compare(n: int, arguments: tuple[Any, Any], output: torch.Tensor) -> None:
        args, kwargs = arguments
        given = args[0] if args else kwargs["hidden_states"]
        r, c = output[0, -tokens:].float(), after[n].float()
        alone = hidden_state(c_layers[n](*args, **kwargs))[0, -tokens:].float()
        added = r - given[0, -tokens:].float()
        sums[0, n] = _relative(c - r, r)
        sums[1, n] = float(torch.cosine_similarity(c, r, dim=-1).double().sum())
        sums[2, n] = _relative(alone - r, added)

    with _hooked(c_layers, keep):
        next(pieces(pair.compressed_model, sequence, len(sequence) - 1, []))
    with _hooked(r_layers, compare):
        next(pieces(pair.reference_model, sequence, len(sequence) - 1, []))
    return sums


def _relative(error: torch.Tensor, of: torch.Tensor) -> float:
    """Sum over the rows of |error| / |of|."""
    norm = of.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    return float((error.norm(dim=-1) / norm).double().sum())


@contextmanager
def _hooked(layers: Any, see: Callable[[int, tuple[Any, Any], torch.Tensor], None]) -> Iterator[None]:
    """Call `see(layer, (args, kwargs), output)` after each layer's forward pass."""
    with ExitStack() as stack:
        for n, layer in enumerate(layers):

            def hook(module: Any, args: Any, kwargs: Any, output: Any, n: int = n) -> None:
                see(n, (args, kwargs), hidden_state(output))

            stack.callback(layer.register_forward_hook(hook, with_kwargs=True).remove)
        yield


def hidden_state(output: Any) -> torch.Tensor:
    """What a decoder layer returns, alone or first of several values: [texts, positions, d]."""
    tensor: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
    return tensor
