"""Small profiles for the tests of the engine plugin, which can apply the tests' family where this is imported."""

from __future__ import annotations

import numpy as np
from tests.support import torch_temperature_bias  # noqa: F401 - the engine can apply the family then
from tests.support.temperature_bias import temperature_bias

from hemostat_calibration.profiles.contextual import NO_KL_LIMIT, contextual_profile
from hemostat_calibration.profiles.profile import CalibrationProfile

VOCAB_SIZE = 40


def make_profile(
    seed: int = 0, vocab_size: int = VOCAB_SIZE, temperature: float = 0.8, clamp: float = 4.0
) -> CalibrationProfile:
    bias = np.random.default_rng(seed).normal(0.0, 2.0, vocab_size)
    return temperature_bias("", vocab_size, temperature, bias, clamp, {"seed": str(seed)})


def make_contextual(
    seed: int = 0,
    vocab_size: int = VOCAB_SIZE,
    *,
    anchors: int = 12,
    features: int = 9,
    rank: int = 3,
    clamp: float = 4.0,
    kl_limit: float = NO_KL_LIMIT,
    scale: float = 1.0,
) -> CalibrationProfile:
    """Shifts of about `scale` nats for logits that spread by about 4."""
    rng = np.random.default_rng(seed)
    read = 0.25 / np.sqrt(features)
    root = rng.normal(0.0, 1.0, (rank, rank))
    return contextual_profile(
        model="",
        anchors=rng.permutation(vocab_size)[:anchors],
        linear=rng.normal(0.0, read, (rank, features)),
        offset=rng.normal(0.0, 0.3, rank),
        up=rng.normal(0.0, scale / np.sqrt(rank), (vocab_size, rank)),
        clamp_nats=clamp,
        fisher=root @ root.T / rank,
        kl_limit=kl_limit,
        metadata={"seed": str(seed)},
    )
