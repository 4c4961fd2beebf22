"""The worlds of live traffic, with fewer lives than `make bench-gate`."""

from __future__ import annotations

import pytest
from tests.bench.gate.live_worlds import CYCLE, WORLDS, World, drawn, life, verdicts

from hemostat_calibration.gate.verdict import Outcome


@pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.name)
def test_neither_error_is_frequent_where_the_mean_is_the_margin(world: World) -> None:
    """100 lives: 13 errors of either kind have a probability below 0.002 at alpha 0.05."""
    values = drawn(world, 100, 2400, 0.05, seed=3)
    found = verdicts(values)
    assert found.share(Outcome.PASS) <= 0.12
    assert found.share(Outcome.FAIL) <= 0.12
    assert (found.units[found.outcomes != ""] > 2 * CYCLE).all()
    if world.name not in {"independent", "mild day and night", "mixed kinds"}:
        before = verdicts(values, dependent=False)
        assert before.share(Outcome.PASS) + before.share(Outcome.FAIL) > 0.5


@pytest.mark.parametrize("name", ["independent", "runs", "mild day and night", "seldom, in runs"])
def test_equal_candidates_pass_and_bad_ones_fail(name: str) -> None:
    world = next(world for world in WORLDS if world.name == name)
    assert verdicts(drawn(world, 40, 3200, 0.0, seed=4)).share(Outcome.PASS) > 0.7
    assert verdicts(drawn(world, 40, 3200, 0.1, seed=4)).share(Outcome.FAIL) > 0.5


@pytest.mark.parametrize("name", ["independent", "runs", "autoregression", "seldom, in runs", "seldom, in tens"])
def test_neither_error_is_frequent_without_cycles(name: str) -> None:
    world = next(world for world in WORLDS if world.name == name)
    found = verdicts(drawn(world, 100, 2400, 0.05, seed=5), waived=True)
    assert found.share(Outcome.PASS) <= 0.12
    assert found.share(Outcome.FAIL) <= 0.12


@pytest.mark.parametrize("waived", [False, True])
def test_the_benchmark_simulates_the_gate_that_is_landed(*, waived: bool) -> None:
    values = drawn(WORLDS[1], 3, 1500, 0.0, seed=2)
    found = verdicts(values, waived=waived)
    expected = list(zip(found.outcomes.tolist(), found.units.tolist(), strict=True))
    assert [life(one, waived=waived) for one in values] == expected
