"""A pair of models whose difference is known: the compressed model's hidden state is an affine (or bent) function of
the reference's, plus noise."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
from tests.support.oracle import apply
from tests.support.records import Truth, log_softmax, make_record

from hemostat_calibration.learning.contextual.anchors import choose_anchors
from hemostat_calibration.learning.contextual.choose import ProfileLimits
from hemostat_calibration.learning.contextual.learner import ContextualLearner
from hemostat_calibration.profiles.transform import anchors_digest
from hemostat_calibration.records import Features

V, D, T, N, A = 150, 10, 40, 20, 14
"""Vocabulary, width of the hidden state, tokens of a request, anchors, features that the map reads."""


class HiddenStateWorld:
    """h_c = h_r + B h_r + b + bend tanh(2 h_r) + noise, tokens of one prompt alike. From `turns` on B has its sign
    changed: a workload that drifts. Prompts with even and odd seeds are of two labels, whose mean hidden states are
    2 `apart` from each other."""

    def __init__(self, strength=0.4, noise=0.2, bend=0.0, turns=10**9, apart=0.0, seed=0):
        rng = np.random.default_rng(seed)
        self.weight = (2.0 * rng.normal(size=(V, D)) / np.sqrt(D)).astype(np.float32)
        self.map = strength * rng.normal(size=(D, D)) / np.sqrt(D)
        self.bias = strength * rng.normal(size=D)
        self.noise, self.bend, self.turns = noise, bend, turns
        self.label = apart * np.random.default_rng(seed + 99).normal(size=D) / np.sqrt(D)
        self.anchors = choose_anchors(self.weight, N)

    def hidden(self, seed, tokens=T):
        rng = np.random.default_rng(seed)
        h = rng.normal(size=(1, D)) + rng.normal(size=(tokens, D)) + (self.label if seed % 2 else -self.label)
        sign = 1.0 if seed < self.turns else -1.0
        bent = self.bend * np.tanh(2.0 * h[:, ::-1])
        return h, h + sign * (h @ self.map + self.bias) + bent + self.noise * rng.normal(size=h.shape)

    def truth(self, seed, tokens=T):
        h_r, h_c = self.hidden(seed, tokens)
        log_c = log_softmax(h_c @ self.weight.T)
        cut = np.random.default_rng(seed + 1).random((tokens, 1))
        emitted = np.minimum((np.exp(log_c).cumsum(1) < cut).sum(1), V - 1)
        return Truth(log_softmax(h_r @ self.weight.T), log_c, emitted)

    def record(self, seed, tokens=T, *, features=True, hidden=True, k=20):
        truth = self.truth(seed, tokens)
        record = make_record(truth, k, key=str(seed).encode(), reference_k=None if hidden else 20)
        if features:
            values = truth.compressed[:, self.anchors]
            values = (values - values.mean(1, keepdims=True)).astype(np.float32)
            record = replace(record, features=Features(anchors_digest(self.anchors), values))
        if hidden:
            record = replace(record, reference_hidden=self.hidden(seed, tokens)[0].astype(np.float32))
        return record

    def learner(self, **changes):
        options = {"features": A, "rank": D, "min_tokens": 1, "min_requests": 1, **changes}
        limits = {field.name: options.pop(field.name) for field in fields(ProfileLimits) if field.name in options}
        return ContextualLearner(self.weight, self.anchors, limits=ProfileLimits(**limits), **options)

    def learn(self, seeds, learner=None, **kinds):
        learner = learner or self.learner()
        return learner.update(learner.init("m", V), [self.record(seed, **kinds) for seed in seeds])

    def divergence(self, profile=None, seeds=range(10_000, 10_025)):
        """KL(r‖c) over the whole vocabulary, on prompts that were not learned from."""
        values = []
        for seed in seeds:
            truth = self.truth(seed)
            log_c = truth.compressed if profile is None else log_softmax(apply(profile, truth.compressed))
            values.append((np.exp(truth.reference) * (truth.reference - log_c)).sum(-1).mean())
        return float(np.mean(values))

    def recovered(self, profile):
        """Part of what the noise leaves to win."""
        before, floor = self.divergence(), HiddenStateWorld(strength=0.0, noise=self.noise).divergence()
        return (before - self.divergence(profile)) / (before - floor)
