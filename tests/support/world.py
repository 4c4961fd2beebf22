"""A reference and a compressed model over a small vocabulary, whose difference is known."""

from functools import lru_cache

import numpy as np
from tests.support.records import Truth, log_softmax

V, D, T = 60, 8, 40
"""Size of the vocabulary, of the hidden states, and tokens of a request."""


class World:
    """Reference logits z = W h with correlated contexts within a request; c = softmax(β z + b + noise)."""

    def __init__(self, beta=1.0, bias=0.0, noise=0.0, seed=0):
        rng = np.random.default_rng(seed)
        self.w = 2.0 * rng.normal(size=(D, V)) / np.sqrt(D)
        self.bias = bias * rng.normal(size=V)
        self.beta, self.noise = beta, noise

    @lru_cache(1024)  # noqa: B019 - tests feed the same requests of a few worlds
    def truth(self, seed):
        rng = np.random.default_rng(seed)
        h = rng.normal(size=(1, D)) + rng.normal(size=(T, D))
        z = h @ self.w
        log_c = log_softmax(self.beta * z + self.bias + self.noise * rng.normal(size=z.shape))
        cut = rng.random((T, 1))
        emitted = np.minimum((np.exp(log_c).cumsum(1) < cut).sum(1), V - 1)
        return Truth(log_softmax(z), log_c, emitted)
