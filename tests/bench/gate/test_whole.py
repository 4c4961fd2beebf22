"""The whole gate in simulated worlds, with fewer lives than the benchmark."""

from __future__ import annotations

import pytest
from tests.bench.gate.whole import WORLDS, drawn, life, required, verdicts

from hemostat_calibration.gate.verdict import Outcome


@pytest.mark.parametrize("world", WORLDS)
def test_neither_error_is_frequent(world: str) -> None:
    """100 lives: 13 errors have a probability below 0.002 at alpha 0.05."""
    found = verdicts(drawn(world, 100, 1200, seed=7))
    wrong = Outcome.PASS if world == "one" else Outcome.FAIL
    assert found.share(wrong) <= 0.12
    if world == "equal":
        assert found.share(Outcome.PASS) > 0.5


@pytest.mark.parametrize("world", WORLDS)
def test_the_benchmark_simulates_the_gate_that_is_landed(world: str) -> None:
    lives = drawn(world, 4, 400, seed=11)
    found = verdicts(lives)
    expected = list(zip(found.outcomes.tolist(), found.prompts.tolist(), strict=True))
    assert [life(*one) for one in zip(lives.kinds, lives.excess, strict=True)] == expected


def test_the_smallest_kind_has_to_pass_in_some_questions_only() -> None:
    small = [number for number, kind in required(600) if kind == "rare"]
    assert 0 < len(small) < 9
