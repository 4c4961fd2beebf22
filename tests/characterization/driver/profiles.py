"""Profiles that tests begin with, and what they do."""

from __future__ import annotations

import hashlib
from functools import cache

import numpy as np
from tests.characterization.worlds import Array, Truth, V, World
from tests.support.oracle import shift
from tests.support.temperature_bias import temperature_bias

from hemostat_calibration.profiles.contextual import contextual_profile, probe_profile
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_calibration.statistics.split import held_out

MODEL = "m"
HELD_OUT = 0.3
"""`calibration.held_out_fraction`."""
TOP_K = 20
"""Candidates of a record that is fed to `Life`."""
ANCHORS = np.arange(6, dtype=np.int32)
CLAMP = 2.0
BIASED = World(bias=1.2)
"""A large error: proofs are short."""
TOKENS = 24
"""Of a record that is fed to `Life`."""


@cache
def keys(*, judged: bool) -> tuple[bytes, ...]:
    """Prompt keys of the held-out side, or of the side that is learned from."""
    return tuple(key for key in (b"%d" % n for n in range(10_000)) if held_out(key, HELD_OUT) is judged)


def helpful(seed: int = 0, world: World = BIASED, model: str = MODEL) -> CalibrationProfile:
    """Takes back what a world adds, but for a little noise."""
    noise = 0.1 * np.random.default_rng(seed).normal(size=V)
    return temperature_bias(model, V, 1.0, noise - world.bias, CLAMP)


def partial(part: float) -> CalibrationProfile:
    """Takes back that part of what the biased world adds."""
    return temperature_bias(MODEL, V, 1.0, -part * BIASED.bias, CLAMP)


def harmful(seed: int = 5, vocabulary: int = V) -> CalibrationProfile:
    return temperature_bias(MODEL, vocabulary, 1.0, np.random.default_rng(seed).normal(0, 0.8, vocabulary), CLAMP)


def tempered(temperature: float) -> CalibrationProfile:
    return temperature_bias(MODEL, V, temperature, -BIASED.bias, CLAMP)


def contextual(part: float = 1.0, first_anchor: int = 0) -> CalibrationProfile:
    """Takes back `part` of what the biased world adds, in any context."""
    return contextual_profile(
        model=MODEL,
        anchors=ANCHORS + first_anchor,
        linear=np.zeros((1, 2)),
        offset=np.ones(1),
        up=-part * BIASED.bias[:, None],
        clamp_nats=CLAMP,
    )


def reading(seed: int = 0) -> CalibrationProfile:
    """A contextual profile that does read its anchors, with a trust region."""
    rng = np.random.default_rng(seed)
    return contextual_profile(
        model=MODEL,
        anchors=ANCHORS,
        linear=0.05 * rng.normal(size=(2, 4)),
        offset=np.array([1.0, 0.1]),
        up=np.column_stack([-BIASED.bias, 0.1 * rng.normal(size=V)]),
        clamp_nats=CLAMP,
        fisher=np.eye(2),
        kl_limit=1.0,
    )


def learners_probe(count: int = len(ANCHORS)) -> CalibrationProfile:
    """What a contextual learner asks engines to hold."""
    return probe_profile(MODEL, V, ANCHORS[:count], 1.0)


def effect(profile: CalibrationProfile, truth: Truth) -> tuple[Array, Array]:
    """E_r[Δz], as the reference gives it, and log E_c[e^Δz], as the engine does; [T], nats."""
    delta = shift(profile, truth.compressed)
    return (np.exp(truth.reference) * delta).sum(-1), np.log(np.exp(truth.compressed + delta).sum(-1))


def sha256(data: bytes) -> str:
    """Its first 24 digits: golden files are read by people."""
    return hashlib.sha256(data).hexdigest()[:24]
