"""The alarm where requests depend on each other: runs of alike ones, batches of clients, day and night.

One kind, 20 scored requests an hour. A life is its baseline, as long as that takes and a day at least
(`evidence.cycle_hours`), and a week of requests that are tested (four weeks of day and night). What varies is the
effect of a whole request on the logarithm of its spread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass

import numpy as np
from tests.bench.guard import Row, count_row, median
from tests.bench.guard.alarm import SETTINGS, SHORT, Array, log_evidence, normal_effects, real, simulated

from hemostat_calibration.alarm.alarm import MAX_LEARNING, baseline_inflation
from hemostat_calibration.alarm.baseline import fit_baseline
from hemostat_calibration.statistics.dependence import BatchMeans

NAME = "alarm_dependence"
TAKES = "3 minutes on one core (a tenth of the lives)"
TEST_LIVES = 0

WEEK = 7 * 24 * 20
LIVES_AT_A_TIME = 100
HOUR = 20
DAY = 24 * HOUR
FOUND = {"independent, effects 0.15": HOUR, "runs of 10, effects 0.3": 26 * HOUR}
"""World -> requests until a doubled spread is found, median, that are allowed."""

World = Callable[[np.random.Generator, int], Array]
"""(random, number of requests) -> rows of them: level, tokens, contrast."""


def effects(draw: Callable[[np.random.Generator, int], Array]) -> World:
    return lambda rng, n: simulated(rng, n, draw(rng, n), SHORT)


def runs(length: int, size: float) -> Callable[[np.random.Generator, int], Array]:
    return lambda rng, n: np.repeat(normal_effects(rng, -(-n // length), size), length)[:n]


def autoregression(coefficient: float, size: float) -> Callable[[np.random.Generator, int], Array]:
    def draw(rng: np.random.Generator, n: int) -> Array:
        found = normal_effects(rng, n, size)
        for at in range(1, n):
            found[at] = coefficient * found[at - 1] + math.sqrt(1.0 - coefficient**2) * found[at]
        return found

    return draw


def client_batches(rng: np.random.Generator, n: int) -> Array:
    """20 clients that differ, each of which comes with 20 requests at a time."""
    clients = normal_effects(rng, 20, 0.3)
    return np.repeat(clients[rng.integers(0, 20, -(-n // 20))], 20)[:n] + normal_effects(rng, n, 0.05)


def day_and_night(size: float) -> Callable[[np.random.Generator, int], Array]:
    def draw(rng: np.random.Generator, n: int) -> Array:
        hour = 2.0 * math.pi * (np.arange(n) / DAY + rng.random())
        return size * np.sin(hour) + normal_effects(rng, n, 0.15)

    return draw


def real_runs(rng: np.random.Generator, n: int) -> Array:
    pool = real()["w4a16"]["prose"]
    rows: Array = np.repeat(pool[rng.integers(0, len(pool), -(-n // 5))], 5, axis=0)[:n]
    return rows


WORLDS: dict[str, tuple[World, int]] = {
    "runs of 10, effects 0.3": (effects(runs(10, 0.3)), 1),
    "runs of 25, effects 0.3": (effects(runs(25, 0.3)), 1),
    "runs of 5 of real W4A16 prose": (real_runs, 1),
    "20 clients that come with 20 requests at a time": (effects(client_batches), 1),
    "autoregression of 0.9, effects 0.3": (effects(autoregression(0.9, 0.3)), 1),
    "independent, effects 0.15": (effects(lambda rng, n: normal_effects(rng, n, 0.15)), 1),
}
"""Name -> world, weeks that are tested."""
CYCLES = (0.1, 0.3)
"""Of the logarithm of the spread, half of the difference between day and night."""


@dataclass(frozen=True)
class Life:
    """begun: requests of the baseline; inf where it was never complete. alarm: tested ones until the alarm, or inf."""

    begun: float
    alarm: float


def inflations(levels: Array, least: int) -> Array:
    """v̂ with which the baseline of each life would be complete after each request: levels [R, L] -> [R, L]. least:
    requests of a cycle."""
    found, means = np.full(levels.shape, np.inf), BatchMeans.of(levels.shape[1])
    one = BatchMeans.of(1)
    for at, row in enumerate(levels[:MAX_LEARNING]):
        means = means.update(row)
        for life in range(levels.shape[1]):
            parts = BatchMeans(means.units, one.open, means.sums[:, :, [life]])
            if means.units >= least and means.units % 10 == 0 and np.isinf(found[:, life]).all():
                found[at, life] = baseline_inflation(parts, parts, SETTINGS.baseline_requests)
        if not np.isinf(found).all(axis=0).any():
            break
    return found


def lives_of(
    world: World,
    lives: int,
    seed: int,
    tested: int,
    factor: float = 1.0,
    *,
    dependence: bool = True,
    cycle: int = DAY,
) -> list[Life]:
    """factor: of the spread, from the first tested request on. dependence: False: the rule before. cycle: requests that
    a baseline has at least."""
    found = []
    for first in range(0, lives, LIVES_AT_A_TIME):
        count = min(LIVES_AT_A_TIME, lives - first)
        drawn = (np.random.default_rng([seed, first, life]) for life in range(count))
        rows = np.stack([world(rng, MAX_LEARNING + tested) for rng in drawn])
        known = inflations(rows[:, :, 0].T, max(cycle, SETTINGS.baseline_requests)) if dependence else None
        for life in range(count):
            begun, v = SETTINGS.baseline_requests, 1.0
            if known is not None:
                complete = np.flatnonzero(np.isfinite(known[:, life]))
                if not len(complete):
                    found.append(Life(math.inf, math.inf))
                    continue
                begun, v = int(complete[0]) + 1, float(known[complete[0], life])
            usual = fit_baseline(rows[life, :begun], SETTINGS.half_share / 2.0, v)
            later = rows[life, begun : begun + tested]
            factors = usual.log_factors(later[:, 0] + math.log(factor), later[:, 1], SETTINGS.tolerance)
            over = np.flatnonzero(log_evidence(factors, v) >= math.log(2.0 / SETTINGS.half_share))
            found.append(Life(begun, over[0] + 1.0 if len(over) else math.inf))
    return found


def cusum(world: World, lives: int, seed: int, factor: float) -> float:
    """Median requests until a CUSUM of likelihood ratios of normal levels finds the change, the oracle: it knows both
    distributions, and has the threshold with which it alarms in a hundredth of the lives in a week without a change."""
    lives = max(lives, 100)
    rows = np.stack([world(np.random.default_rng([seed, life]), WEEK)[:, 0] for life in range(lives)])
    shift, mean, variance = math.log(factor), rows.mean(), rows.var()

    def sums(levels: Array) -> Array:
        found, total = np.empty_like(levels), np.zeros(len(levels))
        for at in range(levels.shape[1]):
            total = np.maximum(total + shift * (levels[:, at] - mean - 0.5 * shift) / variance, 0.0)
            found[:, at] = total
        return found

    threshold = float(np.quantile(sums(rows).max(axis=1), 1.0 - SETTINGS.alpha, method="higher"))
    over = sums(rows[:, : 60 * HOUR] + shift) > threshold
    return median(np.where(over.any(axis=1), over.argmax(axis=1) + 1.0, math.inf).tolist())


def rows(lives: int, seed: int) -> Iterator[Row]:
    lives = max(lives // 10, 10)
    for name, (world, weeks) in WORLDS.items():
        found = lives_of(world, lives, seed, weeks * WEEK)
        begun = median([life.begun for life in found])
        case = f"no change, {name}, {weeks} week{'s' * (weeks > 1)} after a baseline of {begun:.0f} requests (median)"
        yield count_row(case, sum(math.isfinite(life.alarm) for life in found), lives, SETTINGS.alpha)
        doubled = [life.alarm for life in lives_of(world, max(lives // 4, 20), seed + 1, 60 * HOUR, 2.0)]
        allowed = FOUND.get(name, math.inf)
        limit = f"<= {allowed}" if math.isfinite(allowed) else "reported"
        middle = median(doubled)
        told = f"{middle:.0f}" if math.isfinite(middle) else "not in three days"
        best = cusum(world, lives, seed + 2, 2.0)
        beside = f"{told}; CUSUM of the same false alarms {best:.0f}, ratio {middle / best:.1f}"
        yield Row(f"the spread doubles, {name}: median requests", beside, limit, middle <= allowed)
    for size in CYCLES:
        found = lives_of(effects(day_and_night(size)), lives, seed, 4 * WEEK)
        begun = median([life.begun for life in found])
        told = f"{begun:.0f} requests (median)" if math.isfinite(begun) else f"more than {MAX_LEARNING} requests"
        case = f"no change, day and night ± {size}, four weeks after a baseline of {told}"
        yield count_row(case, sum(math.isfinite(life.alarm) for life in found), lives, SETTINGS.alpha)
    found = lives_of(effects(day_and_night(CYCLES[-1])), lives, seed, 4 * WEEK, cycle=0)
    begun, alarmed = (sum(math.isfinite(value) for value in part) for part in zip(*map(astuple, found), strict=True))
    yield Row(
        f"the same ± {CYCLES[-1]}, no cycle is set: alarms; baselines that were complete, in flat hours",
        f"{alarmed} and {begun} of {lives}",
        "for comparison: a cycle that is longer than the baseline is not covered",
        True,
    )
