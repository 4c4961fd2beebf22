"""Texts that a causal language model of transformers generates. Torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hemostat.checkpoints.architectures import is_recurrent
from hemostat.checkpoints.piecewise import PiecewiseReader

Ids = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float64]


def generate(
    model: Any, prompts: Sequence[Ids], limits: Sequence[int], uniforms: Sequence[Floats] | None, ends: frozenset[int]
) -> list[Ids]:
    """Continuations of at most `limits` tokens each, from 1, up to and including an id of `ends`.

    Sampled from the whole distribution at temperature 1, by inverting its cumulative sum at `uniforms`; None: greedy.
    A text does not depend on the other prompts. Raises StatelessModelError.
    """
    texts: list[Ids] = [np.empty(0, np.int32)] * len(prompts)
    for rows in _batches(model, prompts):
        drawn = None if uniforms is None else [uniforms[row] for row in rows]
        result = _generate(model, [prompts[row] for row in rows], [limits[row] for row in rows], drawn, ends)
        for row, text in zip(rows, result, strict=True):
            texts[row] = text
    return texts


def _batches(model: Any, prompts: Sequence[Ids]) -> list[list[int]]:
    """Rows that are generated together. A recurrent state would absorb padding, so there the lengths are equal."""
    if not is_recurrent(model):
        return [list(range(len(prompts)))]
    by_length: dict[int, list[int]] = defaultdict(list)
    for row, prompt in enumerate(prompts):
        by_length[len(prompt)].append(row)
    return list(by_length.values())


def _generate(
    model: Any, prompts: Sequence[Ids], limits: Sequence[int], uniforms: Sequence[Floats] | None, ends: frozenset[int]
) -> list[Ids]:
    """As `generate`, in one batch, padded on the left."""
    device = model.device
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[row, longest - len(prompt) :] = 1
    ids, mask = ids.to(device), mask.to(device)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    texts: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))
    reader = PiecewiseReader(model)
    while running:
        # Recurrent layers take a mask of the piece only, and their batches have no padding.
        masked = {} if is_recurrent(model) else {"attention_mask": mask, "position_ids": positions}
        logits = reader.read(ids, keep=1, **masked)[:, -1].float()
        if uniforms is None:
            chosen = logits.argmax(-1)
        else:
            total = torch.softmax(logits, -1).cumsum(-1, dtype=torch.float64)
            step = [
                u[len(text)] if row in running else 0.5
                for row, (u, text) in enumerate(zip(uniforms, texts, strict=True))
            ]
            at = torch.tensor(step, dtype=torch.float64, device=device)[:, None] * total[:, -1:]
            chosen = torch.searchsorted(total, at, right=True)[:, 0].clamp_max(logits.shape[-1] - 1)
        for row, token in enumerate(chosen.tolist()):
            if row in running:
                texts[row].append(token)
                if token in ends or len(texts[row]) == limits[row]:
                    running.discard(row)
        ids = chosen[:, None]
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        # The other rows stay where they are: learned positions end.
        positions = positions[:, -1:] + torch.tensor([[row in running] for row in range(len(prompts))]).to(device)
    return [np.array(text, np.int32) for text in texts]
