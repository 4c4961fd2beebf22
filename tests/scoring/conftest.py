"""The scorer's bench, for the tests of the scorer."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from tests.support.scorer_bench import Bench, running

from hemostat.scoring import intake, reference_call


@pytest.fixture
def quick_scorer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "TAP_POLL_SECONDS", 0.002)
    monkeypatch.setattr(reference_call, "MAX_SCORE_SECONDS", 0.4)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    made = Bench()
    async with running(made):
        yield made
