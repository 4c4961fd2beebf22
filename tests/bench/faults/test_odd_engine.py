"""A few seeded lives of the worlds that `make bench-faults` runs 1,000 of."""

from __future__ import annotations

import pytest
from tests.bench.guard import most

from .odd_engine import ALPHA, NULL_WORLDS, null_life, odd_life

LIVES = 12
NULL_LIVES = 4


@pytest.mark.parametrize("world", NULL_WORLDS)
def test_engines_that_do_not_differ_are_not_named(world: str) -> None:
    draw = NULL_WORLDS[world]
    assert sum(null_life(draw, seed) for seed in range(NULL_LIVES)) <= most(NULL_LIVES, ALPHA)


def test_an_engine_that_differs_is_named_first_and_alone() -> None:
    assert {odd_life("w8a8", "w4a16", 0, seed)[0] for seed in range(LIVES)} == {"engine 3"}
