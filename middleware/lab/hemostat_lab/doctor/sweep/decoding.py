"""The distribution that a decoding strategy draws from. Torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hemostat_lab.doctor.sweep.points import PLAIN, Drawing


def decode(logits: torch.Tensor, drawing: Drawing) -> torch.Tensor:
    """Logits [..., V] of the distribution that is drawn from, -inf where it is cut.

    Temperature, then top-k (with what ties with the last), then of these the fewest that hold top-p, as vLLM does.
    Greedy: the likeliest id alone.
    """
    if drawing == PLAIN:
        return logits
    if drawing.temperature == 0.0:
        best = logits.argmax(-1, keepdim=True)
        return torch.full_like(logits, -torch.inf).scatter(-1, best, 0.0)
    logits = logits / drawing.temperature
    if drawing.top_k:
        least = logits.topk(min(drawing.top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if drawing.top_p < 1.0:
        ordered, ids = logits.float().sort(dim=-1, descending=True, stable=True)
        p = torch.softmax(ordered, -1)
        before = p.cumsum(-1) - p
        cut = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, ids, before >= drawing.top_p)
        logits = logits.masked_fill(cut, -torch.inf)
    return logits


@contextmanager
def drawn(model: Any, drawing: Drawing) -> Iterator[None]:
    """The model answers with the logits of the distribution that is drawn from."""
    if drawing == PLAIN:
        yield
        return

    def hook(module: Any, arguments: Any, output: Any) -> Any:
        output.logits = decode(output.logits, drawing)
        return output

    handle = model.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
