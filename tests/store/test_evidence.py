"""Evidence of several replicas, judged by the one that leads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support import valkey
from tests.support.profile_bench import BIASED
from tests.support.replicas import Replicas, replicas
from tests.support.valkey import Valkey

KEYS = [b"%d" % n for n in range(20_000)]


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    with valkey.running(tmp_path_factory.mktemp("valkey")) as one:
        yield one


async def until_promoted(ones: Replicas, seed: int) -> int:
    """Scored requests of the deployment until a profile serves."""
    for n, key in enumerate(KEYS[seed * 2000 :]):
        ones.score(n, BIASED.truth(seed * 2000 + n), key)
        if n % 4 == 3:
            await ones.turn()
        if ones.promoted:
            break
    return ones.scored


@pytest.mark.parametrize("seed", [0, 1])
async def test_four_replicas_prove_about_as_fast_as_one_with_all_the_traffic(
    seed: int, shared_server: Valkey, tmp_path: Path
) -> None:
    async with replicas("", tmp_path / "one", 1) as one:
        alone = await until_promoted(one, seed)
    async with replicas(shared_server.url, tmp_path / "four", 4) as four:
        together = await until_promoted(four, seed)
        print(alone, together, four.leader.evidence.status())
        assert alone > 50
    assert together <= 1.15 * alone + 8
