"""Worlds of live traffic in which units depend on each other: runs, day and night, templates, drift, mixed kinds.

Each has the long-run mean that it is asked for. The time between two units is 1 s, and the cycle `CYCLE` seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from hemostat_calibration.gate.live import RUN, LiveGate, LiveRules, LiveState
from hemostat_calibration.gate.verdict import ALL, FRACTIONS, PRIOR, Outcome, Question
from hemostat_calibration.statistics.dependence import BatchMeans

CYCLE = 400.0
"""The length of the cycle, seconds, which is as many units."""
EVERY = 20
"""The number of units between two looks."""

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


def mild_day_and_night(random: np.random.Generator, units: int, mean: float) -> Floats:
    return mean + 0.2 * (day_and_night(random, units, 0.0)) + random.normal(0.0, 0.05, units)


def days(random: np.random.Generator, units: int, mean: float) -> Floats:
    """Each cycle has something of its own, and night differs from day."""
    each = np.repeat(random.normal(0.0, 0.04, units // int(CYCLE) + 2), int(CYCLE))
    begin = random.integers(int(CYCLE))
    return day_and_night(random, units, mean) + each[begin : begin + units]


def drift(random: np.random.Generator, units: int, mean: float) -> Floats:
    """A slow change to and fro, over three cycles."""
    phase = 2.0 * np.pi * (np.arange(units) / (3.0 * CYCLE) + random.random())
    return mean + 0.03 * np.sin(phase) + random.normal(0.0, 0.1, units)


def seldom(length: int) -> Draw:
    """Nothing mostly, and runs of answers that break off."""

    def draw(random: np.random.Generator, units: int, mean: float) -> Floats:
        bad = np.repeat(random.random(units // length + 1) < mean, length)[:units]
        return bad.astype(np.float64)

    return draw


def templates(random: np.random.Generator, units: int, mean: float) -> Floats:
    """Requests that are alike, and not alike enough to be one unit, come together for a while: each such group has
    something of its own."""
    groups = np.cumsum(random.random(units) < 1.0 / 30.0)
    return mean + random.normal(0.0, 0.06, units + 1)[groups] + random.normal(0.0, 0.08, units)


def mixed_kinds(random: np.random.Generator, units: int, mean: float) -> Floats:
    """The candidate is better in chats and worse in a kind that comes by day: a tenth of the requests of a night, and
    half of a day's."""
    phase = (np.arange(units) + random.integers(int(CYCLE))) % CYCLE
    by_day = random.random(units) < np.where(phase < 0.5 * CYCLE, 0.5, 0.1)
    return mean + np.where(by_day, 0.07, -0.03) + random.normal(0.0, 0.08, units)


WORLDS = [
    World("independent", independent),
    World("runs", runs),
    World("autoregression", autoregression),
    World("day and night", day_and_night),
    World("mild day and night", mild_day_and_night),
    World("days", days),
    World("drift", drift),
    World("seldom, in runs", seldom(5)),
    World("seldom, in tens", seldom(10)),
    World("templates", templates),
    World("mixed kinds", mixed_kinds),
]


RULES = LiveRules((Question("near", "farther", 0.05, 0.9),), 0.05, CYCLE, 26)
"""One question, and a margin of the only kind that decides nothing."""


@dataclass(frozen=True)
class Lives:
    """The first verdict of each life, and the unit at which it came; "" and the last unit where none did."""

    outcomes: npt.NDArray[np.str_]
    units: npt.NDArray[np.int64]

    def share(self, outcome: Outcome) -> float:
        return float((self.outcomes == outcome.value).mean())


def drawn(world: World, lives: int, units: int, mean: float, seed: int) -> Floats:
    """Returns D of each life, [lives, units]."""
    random = np.random.default_rng([seed, round(1000 * mean), WORLDS.index(world)])
    return np.clip(np.stack([world.draw(random, units, mean) for _ in range(lives)]), -1.0, 1.0)


def verdicts(values: Floats, *, dependent: bool = True, waived: bool = False) -> Lives:
    """Returns the verdicts of all lives at a time, as `LiveGate` gives them. dependent: False: as if units were
    independent, and no cycle had to be seen. waived: the cycles are."""
    lives, units = values.shape
    margin, needed = RULES.questions[0].margin, -math.log(RULES.alpha)
    passing, failing = np.zeros((2, lives, len(PRIOR)))
    batches = BatchMeans.of(lives)
    outcomes, at = np.full(lives, "", "<U9"), np.full(lives, units)
    first = RULES.needed_seconds(ALL) if dependent and not waived else 0.0
    for unit, value in enumerate(values.T):
        passing += np.log1p(FRACTIONS * ((margin - value) / (1.0 - margin))[:, None])
        failing += np.log1p(FRACTIONS * ((value - margin) / (1.0 + margin))[:, None])
        if dependent:
            batches = batches.update(value)
        if unit % EVERY < EVERY - 1 or unit < first:
            continue
        own = batches.inflation() if waived else batches.inflation_of_sums(unit + 1)
        v = own if dependent else np.ones(lives)
        known = (batches.enough() if dependent else np.ones(lives, bool)) & (outcomes == "")
        # The closed test: half of the weight is not of this mean, and has nothing to say.
        failed = known & (np.log(0.5 * np.exp(_mixed(failing, v)) + 0.48) >= needed)
        passed = known & ~failed & (_mixed(passing, np.maximum(v, RUN) if dependent else v) >= needed)
        outcomes[failed], outcomes[passed] = Outcome.FAIL.value, Outcome.PASS.value
        at[failed | passed] = unit + 1
    return Lives(outcomes, at)


def life(values: Floats, *, waived: bool = False) -> tuple[str, int]:
    """Returns the verdict of one life by the code that is landed, and the unit at which it came."""
    gate = LiveGate(LiveState(replace(RULES, waived=waived)))
    for unit, value in enumerate(values.tolist()):
        gate.update("chat", {"near": value}, now=1.0 + unit)
        if unit % EVERY == EVERY - 1:
            outcome = gate.verdict(lambda kind, units: 1.0).outcome
            if outcome is not Outcome.UNDECIDED:
                return outcome.value, unit + 1
    return "", len(values)


def _mixed(log_k: Floats, v: Floats) -> Floats:
    scaled = log_k / v[:, None]
    top = scaled.max(axis=1)
    result: Floats = top + np.log(np.exp(scaled - top[:, None]) @ PRIOR)
    return result
