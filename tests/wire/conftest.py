"""A fake engine for each module, and an interceptor in front of it."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from tests.support.fake_vllm import FakeVllm, serving
from tests.support.wire import Wire


@pytest.fixture(scope="module")
def engine() -> Iterator[tuple[FakeVllm, str]]:
    fake = FakeVllm(seed=5)
    with serving(fake) as url:
        yield fake, url


@pytest.fixture
def fake(engine: tuple[FakeVllm, str]) -> Iterator[FakeVllm]:
    """The module's engine, reset to its initial state."""
    fresh = vars(FakeVllm(seed=5))
    yield engine[0]
    vars(engine[0]).update(fresh)


@pytest.fixture
def wire(engine: tuple[FakeVllm, str], fake: FakeVllm) -> Iterator[Wire]:
    with httpx.Client(base_url=engine[1], timeout=20) as client:
        yield Wire(client)
