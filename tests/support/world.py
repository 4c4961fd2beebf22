"""A reference and a compressed model over a small vocabulary, whose difference is known."""

from functools import lru_cache

import numpy as np
from tests.support.oracle import apply
from tests.support.records import Truth, log_softmax, make_record

from hemostat_calibration.learning.temperature_bias import TemperatureBiasLearner

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

    def learn(self, requests, k=20, learner=None):
        learner = learner or TemperatureBiasLearner(min_requests=1, min_tokens=1)
        state = learner.init("m", V)
        for seed in range(0, requests, 4):
            batch = [make_record(self.truth(at), k) for at in range(seed, min(seed + 4, requests))]
            state = learner.update(state, batch)
        return learner, state

    def divergence(self, profile=None):
        """KL(r‖c) over the whole vocabulary, on requests that were not learned from."""
        values = []
        for seed in range(10_000, 10_040):
            truth = self.truth(seed)
            log_c = truth.compressed if profile is None else log_softmax(apply(profile, truth.compressed))
            values.append((np.exp(truth.reference) * (truth.reference - log_c)).sum(-1).mean())
        return np.mean(values)
