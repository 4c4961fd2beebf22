"""Evidence of several replicas, judged by the one that leads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support import valkey
from tests.support.replicas import requests_until_promoted
from tests.support.valkey import Valkey
from tests.support.world import World

STRONGLY_BIASED = World(bias=0.9)


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    with valkey.running(tmp_path_factory.mktemp("valkey")) as one:
        yield one


async def test_four_replicas_prove_about_as_fast_as_one_with_all_the_traffic(
    shared_server: Valkey, tmp_path: Path
) -> None:
    """It took four times as many requests where the leader judged by its own part."""
    alone = await requests_until_promoted("", tmp_path / "one", 1, STRONGLY_BIASED, 0)
    together = await requests_until_promoted(shared_server.url, tmp_path / "four", 4, STRONGLY_BIASED, 0)
    print(alone, together)
    assert alone > 100
    assert together <= 1.15 * alone
