"""The canaries of the control process without what takes long."""

from __future__ import annotations

import math

import pytest

from hemostat.canaries import client, short, texts
from hemostat_calibration import canary_cause


@pytest.fixture
def without_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    """A set whose text is too short for them: they are many requests."""
    monkeypatch.setattr(canary_cause, "MIN_TEXT", 10_000)


@pytest.fixture(autouse=True)
def without_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """No short sequences where a test is not about them: tests count requests."""
    monkeypatch.setattr(short, "SHORT_SECONDS", math.inf)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "ANSWER_TOKENS", 4)
    monkeypatch.setattr(texts, "FREE_TEXTS", 0)
    monkeypatch.setattr("hemostat.canaries.keeper.TICK_SECONDS", 3600.0)
