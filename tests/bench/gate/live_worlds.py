"""Worlds of live traffic in which units depend on each other: runs, day and night, templates, drift, mixed kinds.

Each has the long-run mean that it is asked for. The time between two units is 1 s, and the cycle `CYCLE` seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hemostat_calibration.gate.live import LiveGate, LiveRules, LiveState
from hemostat_calibration.gate.verdict import Outcome, Question

CYCLE = 400.0
"""The length of the cycle, seconds, which is as many units."""
EVERY = 20
"""The number of units between two looks."""
KINDS = ("chat", "code", "rare")

Floats = npt.NDArray[np.float64]
Draw = Callable[[np.random.Generator, int, float], Floats]


@dataclass(frozen=True)
class World:
    """draw: D of a life's units, with this long-run mean."""

    name: str
    draw: Draw


def independent(random: np.random.Generator, units: int, mean: float) -> Floats:
    return random.normal(mean, 0.1, units)


def runs(random: np.random.Generator, units: int, mean: float) -> Floats:
    """Runs of ten units that have most of their D in common."""
    common = np.repeat(random.normal(0.0, 0.15, units // 10 + 1), 10)[:units]
    return mean + common + random.normal(0.0, 0.05, units)


def autoregression(random: np.random.Generator, units: int, mean: float) -> Floats:
    values, noise = np.zeros(units), random.normal(0.0, 0.05, units)
    for unit in range(1, units):
        values[unit] = 0.9 * values[unit - 1] + noise[unit]
    return mean + values


def day_and_night(random: np.random.Generator, units: int, mean: float) -> Floats:
    """The candidate is worse by night, and a life begins at any hour."""
    phase = (np.arange(units) + random.integers(int(CYCLE))) % CYCLE
    return mean + np.where(phase < 0.5 * CYCLE, 0.1, -0.1) + random.normal(0.0, 0.08, units)


def days(random: np.random.Generator, units: int, mean: float) -> Floats:
    """Each cycle has something of its own, and night differs from day."""
    each = np.repeat(random.normal(0.0, 0.04, units // int(CYCLE) + 2), int(CYCLE))
    begin = random.integers(int(CYCLE))
    return day_and_night(random, units, mean) + each[begin : begin + units]


def drift(random: np.random.Generator, units: int, mean: float) -> Floats:
    """A slow change to and fro, over three cycles."""
    phase = 2.0 * np.pi * (np.arange(units) / (3.0 * CYCLE) + random.random())
    return mean + 0.03 * np.sin(phase) + random.normal(0.0, 0.1, units)


def seldom(random: np.random.Generator, units: int, mean: float) -> Floats:
    """Nothing mostly, and runs of answers that break off."""
    bad = np.repeat(random.random(units // 5 + 1) < mean, 5)[:units]
    return bad.astype(np.float64)


WORLDS = [
    World("independent", independent),
    World("runs", runs),
    World("autoregression", autoregression),
    World("day and night", day_and_night),
    World("days", days),
    World("drift", drift),
    World("seldom, in runs", seldom),
]


def life(
    world: World, seed: list[int], units: int, mean: float, margin: float, *, waived: bool = False
) -> tuple[str, int]:
    """Returns the outcome of one life, and the unit at which it came: the outcome is the first one, as in a gate. All
    units are of one kind, whose margin is wide."""
    random = np.random.default_rng(seed)
    values = np.clip(world.draw(random, units, mean), -1.0, 1.0)
    rules = LiveRules((Question("near", "farther", margin, 0.9),), 0.05, CYCLE, 26, waived)
    gate = LiveGate(LiveState(rules))
    for unit, value in enumerate(values.tolist()):
        gate.update("chat", {"near": value}, now=1.0 + unit)
        if unit % EVERY == EVERY - 1:
            outcome = gate.verdict(lambda kind, units: 1.0).outcome
            if outcome is not Outcome.UNDECIDED:
                return outcome.value, unit + 1
    return Outcome.UNDECIDED.value, units
