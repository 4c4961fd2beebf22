"""Cores without a thread for the tests of the engine plugin."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.support.engine_profiles import VOCAB_SIZE

from hemostat_engine import secrets


@pytest.fixture(autouse=True)
def no_profile_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the settings of the developer's environment."""
    for name in ("HEMOSTAT_ADMIN_URL", "HEMOSTAT_ENGINE_TOKEN", "HEMOSTAT_PROFILE_DIR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def all_signed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every request's keys are taken for the control process's, but in the tests of who may use them."""
    if request.module.__name__.rpartition(".")[2] not in {"test_signed_keys", "test_passive", "test_checksums"}:
        monkeypatch.setattr(secrets.Secrets, "signed", lambda *_: True)


@pytest.fixture
def make_core() -> Iterator[Callable[..., Any]]:
    """Makes cores whose agent does not run: the test puts the profiles."""
    torch = pytest.importorskip("torch")
    from hemostat_engine.agent import Identity
    from hemostat_engine.core import Core, Ranks
    from hemostat_engine.masks import GrammarMasks
    from hemostat_engine.settings import Settings

    cores = []

    def make(vocab_size: int = VOCAB_SIZE, tapping: bool = False, ranks: Ranks | None = None) -> Core:
        core = Core(
            device=torch.device("cpu"),
            identity=Identity("boot", 0, 1, vocab_size, "v1", "test"),
            ranks=ranks or Ranks(),
            masks=GrammarMasks(watched=True),
            # A port that refuses connections, so that taps stay in the queue.
            settings=Settings(admin_url="http://127.0.0.1:9") if tapping else Settings(),
        )
        core.agent.stop()
        cores.append(core)
        return core

    yield make
    for core in cores:
        core.agent.stop()
