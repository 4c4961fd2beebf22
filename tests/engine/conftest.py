"""Profiles, a core without a thread, and a real HTTP server, for the engine's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from hemostat_calibration.profiles.contextual import NO_KL_LIMIT, contextual_profile
from hemostat_calibration.profiles.profile import CalibrationProfile, temperature_bias

V = 40


def make_profile(
    seed: int = 0, vocab_size: int = V, temperature: float = 0.8, clamp: float = 4.0
) -> CalibrationProfile:
    bias = np.random.default_rng(seed).normal(0.0, 2.0, vocab_size)
    return temperature_bias("", vocab_size, temperature, bias, clamp, {"seed": str(seed)})


def make_contextual(
    seed: int = 0,
    vocab_size: int = V,
    *,
    anchors: int = 12,
    features: int = 9,
    rank: int = 3,
    hidden: int = 5,
    clamp: float = 4.0,
    kl_limit: float = NO_KL_LIMIT,
    scale: float = 1.0,
) -> CalibrationProfile:
    """Shifts of about `scale` nats for logits that spread by about 4."""
    rng = np.random.default_rng(seed)
    middle = hidden + 1 if hidden else 0
    read = 0.25 / np.sqrt(features)
    root = rng.normal(0.0, 1.0, (rank, rank))
    return contextual_profile(
        model="",
        anchors=rng.permutation(vocab_size)[:anchors],
        linear=rng.normal(0.0, read, (rank, features)),
        offset=rng.normal(0.0, 0.3, rank),
        up=rng.normal(0.0, scale / np.sqrt(rank), (vocab_size, rank)),
        clamp_nats=clamp,
        hidden=rng.normal(0.0, read, (hidden, features)),
        hidden_offset=rng.normal(0.0, 0.3, hidden),
        middle=rng.normal(0.0, 1.0 / np.sqrt(max(hidden, 1)), (middle, hidden)),
        middle_offset=rng.normal(0.0, 0.3, middle),
        out=rng.normal(0.0, 1.0 / np.sqrt(max(middle, 1)), (rank, middle)),
        fisher=root @ root.T / rank,
        kl_limit=kl_limit,
        metadata={"seed": str(seed)},
    )


@pytest.fixture(autouse=True)
def no_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """The developer's own environment must not reach the plugin."""
    for name in ("HEMOSTAT_ADMIN_URL", "HEMOSTAT_ADMIN_TOKEN", "HEMOSTAT_PROFILE_DIR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def make_core() -> Iterator[Callable[..., Any]]:
    """Cores whose agent talks to nobody: profiles are put by the test."""
    torch = pytest.importorskip("torch")
    from hemostat_engine.agent import Settings
    from hemostat_engine.core import Core, Ranks

    cores = []

    def make(vocab_size: int = V, tapping: bool = False, ranks: Ranks | None = None) -> Core:
        core = Core(
            device=torch.device("cpu"),
            vocab_size=vocab_size,
            runner="v1",
            vllm_version="test",
            boot_id="boot",
            ranks=ranks or Ranks(),
            # A port that refuses, so that what is tapped stays in the queue.
            settings=Settings(admin_url="http://127.0.0.1:9") if tapping else Settings(),
        )
        core.agent.stop()
        cores.append(core)
        return core

    yield make
    for core in cores:
        core.agent.stop()
