"""Canaries of simulated engines whose kernels switch between modes: healthy ones are not accused, and faults are found.

The fast version of `canary_modes`.
"""

from __future__ import annotations

import numpy as np
import pytest
from tests.bench.canary_modes import FAULTS, Engine, canaries, found_after, healthy

from hemostat.canaries import engine as engine_module
from hemostat.canaries.engine import BASELINE, Reading
from hemostat.canaries.pace import HOUR_SECONDS
from hemostat_calibration import canaries as core
from hemostat_calibration.canaries import LASTING_REPLAYS, Comparison

ENGINES, HOURS = 16, 24 * 14


@pytest.mark.parametrize("modes", [True, False])
def test_healthy_engines_are_not_accused(modes: bool) -> None:
    assert healthy(ENGINES, HOURS, modes=modes) == 0


def test_a_test_without_an_allowance_for_modes_accuses_the_same_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "MODE_TOLERANCES", 0.0)
    assert healthy(ENGINES, HOURS) >= 3


def test_a_test_that_waits_for_two_hours_only_accuses_the_same_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "LASTING_REPLAYS", 2)
    assert healthy(ENGINES, HOURS) >= 3


def test_a_baseline_of_one_moment_accuses_engines_whose_modes_differ_by_more(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    engine = Engine(rng, canaries())
    engine.offsets = engine.offsets[:2] * (0.05 / np.abs(engine.offsets[0] - engine.offsets[1]).mean())
    engine.chances, engine.leaves = np.array([0.5, 0.5]), 0.5
    values = []
    for mode in (0, 1):
        engine.mode = mode
        values.append(engine.replay())
    moment = core.CanarySet(engine.sequences, np.stack([values[0]] * 4), core.Origin(""))
    assert moment.compare(values[1]).changed
    assert not moment.with_replay(values[1], core.Condition(0.0)).compare(engine.replay()).changed


@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if fault.nats >= 0.1])
def test_a_fault_is_found_at_the_first_replay_in_spite_of_modes(name: str) -> None:
    assert set(found_after(FAULTS[name], 6, 30)) == {0}


def compared(mean: float, *parts: int) -> Comparison:
    """Returns a comparison in which all of 16 sequences differ if the mean is above 0.01."""
    return Comparison(np.full(16, mean), np.full(16, 0.01), 13, mean, 0.03, parts)


def judged(*comparisons: Comparison, hours: float = 1.0) -> Reading:
    reading = Reading()
    for number, comparison in enumerate(comparisons, 1):
        reading.judge(BASELINE, comparison, [number], number * hours * HOUR_SECONDS)
    return reading


def test_two_replays_have_to_show_the_same() -> None:
    assert judged(compared(0.5), compared(0.5)).since
    assert judged(compared(0.001, 3), compared(0.001, 3, 5)).since
    assert not judged(compared(0.001, 3), compared(0.001, 5)).since
    assert judged(compared(0.001, 3), compared(0.001, 5), compared(0.001, 5)).since
    assert not judged(compared(0.5), compared(0.001, 5)).since


def test_a_difference_of_a_modes_size_counts_once_an_hour_and_only_in_a_row() -> None:
    small, near = compared(0.02), compared(0.001)
    assert not judged(*[small] * (LASTING_REPLAYS - 1)).since
    assert judged(*[small] * LASTING_REPLAYS).since
    assert not judged(*[small] * LASTING_REPLAYS, hours=0.5).since
    assert not judged(*[small] * (LASTING_REPLAYS - 1), near, small).since
    assert not judged(*[small] * LASTING_REPLAYS, near).since
    stored = judged(*[small] * (LASTING_REPLAYS - 1)).to_store()
    stored.judge(BASELINE, small, [1], LASTING_REPLAYS * HOUR_SECONDS)
    assert stored.since
