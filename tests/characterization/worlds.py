"""Seeded pairs of models over a small vocabulary. Only numpy: nothing of the product is imported here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

V, D = 60, 8
"""Ids of the vocabulary; width of the hidden states."""
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Truth:
    """Log-probabilities of both models, float64 [T, V] in nats, and the emitted ids [T]."""

    reference: Array
    compressed: Array
    emitted: Array


class World:
    """Reference logits z = W h; the compressed model has z + bias + noise.

    bias: factor of a fixed direction, the same for all worlds; a negative one is the opposite error.
    noise: standard deviation in nats.
    """

    def __init__(self, bias: float = 0.0, noise: float = 0.0) -> None:
        rng = np.random.default_rng(0)
        self._w = 2.0 * rng.normal(size=(D, V)) / np.sqrt(D)
        self.bias = bias * rng.normal(size=V)
        self._noise = noise

    def truth(self, seed: int, tokens: int, *, greedy: bool = False) -> Truth:
        """One request: `tokens` positions whose hidden states are correlated."""
        rng = np.random.default_rng(seed)
        h = rng.normal(size=(1, D)) + rng.normal(size=(tokens, D))
        # A sum in a fixed order: the result does not depend on the BLAS library.
        z = (h[:, :, None] * self._w[None]).sum(axis=1)
        compressed = log_softmax(z + self.bias + self._noise * rng.normal(size=z.shape))
        drawn = np.minimum((np.exp(compressed).cumsum(1) < rng.random((tokens, 1))).sum(1), V - 1)
        return Truth(log_softmax(z), compressed, compressed.argmax(1) if greedy else drawn)


def log_softmax(logits: Array) -> Array:
    """[..., V] to log-probabilities, nats."""
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def entropy(logprobs: Array) -> Array:
    """[T, V] to [T], nats."""
    return np.asarray(-(np.exp(logprobs) * logprobs).sum(-1))


def top(logprobs: Array, k: int, emitted: Array | None = None) -> tuple[Array, Array]:
    """The k likeliest ids, int32, and their log-probabilities; with `emitted` one more column, as vLLM answers.

    That column holds the emitted id where it is not among the k, else -1 and -inf.
    """
    ids = np.argsort(-logprobs, axis=-1, kind="stable")[:, :k].astype(np.int32)
    values = np.take_along_axis(logprobs, ids, -1)
    if emitted is None:
        return ids, values
    outside = ~(ids == emitted[:, None]).any(1)
    last = np.where(outside, logprobs[np.arange(len(emitted)), emitted], -np.inf)
    return np.column_stack([ids, np.where(outside, emitted, -1).astype(np.int32)]), np.column_stack([values, last])
