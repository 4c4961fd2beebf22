"""What a causal language model of transformers says about given tokens, at full vocabulary. Torch, no IO."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int32]

CHUNK_ELEMENTS = 1 << 24
"""Entries of one float32 log-softmax (64 MiB): positions are taken in chunks of this size."""


@dataclass(frozen=True, slots=True)
class ExactScores:
    """at, top_logprobs: float64 [T, K]; top_ids: int32 [T, K]; emitted, entropy, expected[name]: float64 [T]; nats."""

    at: Floats
    top_ids: Ids
    top_logprobs: Floats
    emitted: Floats
    entropy: Floats
    expected: dict[str, Floats]


def score(
    model: Any,
    prompt: Ids,
    output: Ids,
    ids: Ids,
    functionals: Mapping[str, torch.Tensor],
) -> ExactScores:
    """Score `output` [T] after `prompt` [P], P and T ≥ 1, also at `ids` [T, K] (-1 pads: NaN there).

    functionals: name -> float32 [V] on the model's device; `expected` gets E_r of each at every position.
    Raises ValueError when an id is not in the vocabulary.
    """
    with torch.inference_mode():
        return _score(model, prompt, output, ids, functionals)


def _score(model: Any, prompt: Ids, output: Ids, ids: Ids, functionals: Mapping[str, torch.Tensor]) -> ExactScores:
    tokens = len(output)
    # The logits behind the last token predict nothing that is asked.
    sequence = torch.from_numpy(np.concatenate([prompt, output[:-1]]).astype(np.int64)).to(model.device)
    keep = {"logits_to_keep": tokens} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    # Position P - 1 + t predicts output[t]: the last T of the P + T - 1.
    logits = model(input_ids=sequence[None], use_cache=False, **keep).logits[0, -tokens:]
    vocab_size = logits.shape[-1]
    largest = max(int(ids.max(initial=-1)), int(output.max()))
    if largest >= vocab_size or int(output.min()) < 0:
        raise ValueError(f"token id {largest} is not in the reference's vocabulary of {vocab_size}")

    width = ids.shape[1]
    top = min(width, vocab_size)
    scores = ExactScores(
        at=np.full((tokens, width), np.nan),
        top_ids=np.full((tokens, width), -1, np.int32),
        top_logprobs=np.full((tokens, width), -np.inf),
        emitted=np.empty(tokens),
        entropy=np.empty(tokens),
        expected={name: np.empty(tokens) for name in functionals},
    )
    chunk = max(1, CHUNK_ELEMENTS // vocab_size)
    for start in range(0, tokens, chunk):
        rows = slice(start, min(start + chunk, tokens))
        logprobs = torch.log_softmax(logits[rows].float(), dim=-1)
        asked = torch.from_numpy(ids[rows].astype(np.int64)).to(logprobs.device)
        given = logprobs.gather(1, asked.clamp_min(0)).masked_fill(asked < 0, torch.nan)
        scores.at[rows] = _numpy(given)
        emitted = torch.from_numpy(output[rows].astype(np.int64)).to(logprobs.device)
        scores.emitted[rows] = _numpy(logprobs.gather(1, emitted[:, None])[:, 0])
        best = logprobs.topk(top, dim=-1)
        scores.top_ids[rows, :top] = best.indices.cpu().numpy()
        scores.top_logprobs[rows, :top] = _numpy(best.values)
        probabilities = logprobs.exp()
        for name, values in functionals.items():
            scores.expected[name][rows] = _numpy(probabilities @ values)
        # p log p is 0 where p is 0, also where log p is -inf.
        terms = torch.where(probabilities > 0, probabilities * logprobs, 0.0)
        scores.entropy[rows] = _numpy(-terms.sum(-1))
    return scores


def _numpy(tensor: torch.Tensor) -> Floats:
    values: Floats = tensor.double().cpu().numpy()
    return values
