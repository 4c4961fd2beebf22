"""A clock that is set opens no gate, in worlds in which that would lead to wrong decisions."""

import pytest
from tests.bench.guard import clock_jumps as worlds

LIVES = 5


@pytest.mark.parametrize("world", worlds.WORLDS)
def test_a_clock_that_is_set_decides_nothing(world: str) -> None:
    assert worlds.count(world, LIVES, 0, believed=True) == LIVES, "the world can fail"
    assert worlds.count(world, LIVES, 0, believed=False) == 0
