"""A few seeded lives of the worlds that `make bench-faults` runs 1,000 of."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.bench.guard import most

from .outlier_engine import (
    ALPHA,
    MAX_TOKENS,
    NULL_WORLDS,
    Case,
    bound_life,
    knows_figures,
    knows_labels,
    knows_threshold,
    null_life,
    odd_life,
)

LIVES = 12
NULL_LIVES = 4


@pytest.mark.parametrize("world", NULL_WORLDS)
def test_engines_that_do_not_differ_are_not_named(world: str) -> None:
    draw = NULL_WORLDS[world]
    assert sum(null_life(draw, seed) for seed in range(NULL_LIVES)) <= most(NULL_LIVES, ALPHA)


def test_an_engine_that_differs_is_named_first_alone_and_soon() -> None:
    lived = [odd_life("w8a8", "w4a16", 0, seed) for seed in range(LIVES)]
    assert {engine for engine, _ in lived} == {"engine 3"}
    assert sum(tokens <= MAX_TOKENS for _, tokens in lived) >= 0.75 * LIVES
    # A test that knows more is sooner. (In sum: not in every life, as bets differ.)
    known = [
        sum(bound_life(bound, "w8a8", "w4a16", seed) for seed in range(LIVES))
        for bound in (knows_figures, knows_labels, knows_threshold)
    ]
    assert known == sorted(known)
    assert known[-1] < sum(tokens for _, tokens in lived)


def test_lives_that_are_kept_are_not_lived_again(tmp_path: Path) -> None:
    lived: list[int] = []

    def life(seed: int) -> tuple[str, float]:
        lived.append(seed)
        if lived == [0, 1, 2]:
            raise InterruptedError
        return ("engine 3", float("inf")) if seed else ("", 12.0)

    case = Case("case", life, lives=3)
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(InterruptedError):
            case.run(tmp_path, range(100), pool)
        assert case.kept(tmp_path) == {0: ("", 12.0), 1: ("engine 3", float("inf"))}
        case.run(tmp_path, range(100), pool)
    assert sorted(case.kept(tmp_path)) == [0, 1, 2]
    assert lived == [0, 1, 2, 2]
