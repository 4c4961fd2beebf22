"""The alarm where requests depend on each other: runs of alike ones, batches of clients, day and night.

One kind, 20 scored requests an hour. A life is its baseline, as long as that takes and a day at least
(`evidence.cycle_hours`), and a week of requests that are tested (four weeks of day and night), as they were before or
with all spreads larger by a factor of 1.2, just within the tolerance. What varies is the effect of a whole request on
the logarithm of its spread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass

import numpy as np
from tests.bench.guard import Row, count_row, median
from tests.bench.guard.alarm import (
    SETTINGS,
    SHORT,
    Array,
    difference_inflations,
    inflations,
    log_evidence,
    normal_effects,
    real,
    recent_inflations,
    simulated,
)

from hemostat_calibration.alarm.alarm import CHECK_EVERY, EFFECTIVE_SHARE
from hemostat_calibration.alarm.baseline import fit_baseline

NAME = "alarm_dependence"
TAKES = "15 minutes on one core (a fifth of the lives)"
TEST_LIVES = 0

WEEK = 7 * 24 * 20
HOUR = 20
DAY = 24 * HOUR
LEARNED = 12_000
"""Requests after which a baseline that is not complete is given up: 25 days."""
WITHIN_TOLERANCE, DOUBLED = 1.2, 2.0
FOUND_INDEPENDENT, FOUND_DEPENDENT = HOUR, 26 * HOUR
"""Requests until a doubled spread is found, median, that are allowed."""

World = Callable[[np.random.Generator, int], Array]
"""(random, number of requests) -> rows of them: level, tokens, contrast."""


def effects(draw: Callable[[np.random.Generator, int], Array]) -> World:
    return lambda rng, n: simulated(rng, n, draw(rng, n), SHORT)


def runs(length: int, size: float) -> Callable[[np.random.Generator, int], Array]:
    return lambda rng, n: np.repeat(normal_effects(rng, -(-n // length), size), length)[:n]


def autoregression(coefficient: float, size: float) -> Callable[[np.random.Generator, int], Array]:
    def draw(rng: np.random.Generator, n: int) -> Array:
        values = normal_effects(rng, n, size)
        for at in range(1, n):
            values[at] = coefficient * values[at - 1] + math.sqrt(1.0 - coefficient**2) * values[at]
        return values

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


def some_alike(length: int, share: float) -> Callable[[np.random.Generator, int], Array]:
    """Runs that are `share` of the variance."""

    def draw(rng: np.random.Generator, n: int) -> Array:
        common = np.repeat(normal_effects(rng, -(-n // length), 0.3 * math.sqrt(share)), length)[:n]
        return common + normal_effects(rng, n, 0.3 * math.sqrt(1.0 - share))

    return draw


def bursts(rng: np.random.Generator, n: int) -> Array:
    """Runs of 1 to 15 alike requests, heavy-tailed."""
    lengths = rng.integers(1, 16, n)
    return np.repeat(np.clip(0.15 * rng.standard_t(3, n), -2.0, 2.0), lengths)[:n]


WORLDS: dict[str, tuple[World, int, float]] = {
    "runs of 10, effects 0.3": (effects(runs(10, 0.3)), 1, 10.0),
    "runs of 25, effects 0.3": (effects(runs(25, 0.3)), 1, 25.0),
    "runs of 5 of real W4A16 prose": (real_runs, 1, 5.0),
    "20 clients that come with 20 requests at a time": (effects(client_batches), 1, 19.5),
    "autoregression of 0.9, effects 0.3": (effects(autoregression(0.9, 0.3)), 1, 19.0),
    "independent, effects 0.15": (effects(lambda rng, n: normal_effects(rng, n, 0.15)), 1, 1.0),
    "runs of 2, effects 0.3": (effects(runs(2, 0.3)), 1, 2.0),
    "runs of 20, effects 0.15": (effects(runs(20, 0.15)), 1, 20.0),
    "autoregression of 0.5, effects 0.3": (effects(autoregression(0.5, 0.3)), 1, 3.0),
    "runs of 10 that are half of the variance": (effects(some_alike(10, 0.5)), 1, 5.5),
    "runs of 1 to 15, heavy-tailed": (effects(bursts), 1, 10.3),
    "day and night ± 0.1": (effects(day_and_night(0.1)), 4, math.nan),
}
"""Name -> world, weeks that are tested, v of sums of effects. The rule was not made for the last six."""
BEGINNING = {"runs of 20, effects 0.3": 20, "runs of 8, effects 0.3": 8, "runs of 40, effects 0.3": 40}
"""Dependence that begins after a baseline of independent requests: the length of the runs."""
BEGINNING_WEEKS = 12
BEGINNING_ALLOWED = 0.1
"""False alarms in so many weeks. They come from the first few requests of the first runs."""
ALIKE, ALIKE_ALLOWED = 0.15, 20
"""A change after which requests are all alike: the effects before it, and the requests until it is found, median."""
STRONG_CYCLE = 0.3
"""Of the logarithm of the spread, half of the difference between day and night."""


@dataclass(frozen=True)
class Life:
    """begun: requests of the baseline; inf where it was never complete. alarm: tested ones until the alarm, or inf."""

    begun: float
    alarm: float


def begins(levels: Array, least: int) -> tuple[int, float] | None:
    """Requests of the baseline, and v̂: the same as `baseline_inflation` after each request. None: not in `levels`."""
    looks = np.arange(SETTINGS.baseline_requests, len(levels) + 1, CHECK_EVERY)
    looks = looks[looks >= least]
    v = inflations(levels, looks)
    enough = np.flatnonzero(looks / v >= EFFECTIVE_SHARE * SETTINGS.baseline_requests)
    return (int(looks[enough[0]]), float(v[enough[0]])) if len(enough) else None


def lives_of(
    world: World,
    lives: int,
    seed: int,
    tested: int,
    factor: float = 1.0,
    *,
    after: int = 0,
    dependence: bool = True,
    cycle: int = DAY,
    learned: int = LEARNED,
    learned_from: World | None = None,
    goes_on: bool = True,
) -> list[Life]:
    """factor: of the spread, after so many tested requests; alarms are counted from there. dependence: False: the rule
    before. cycle: requests that a baseline has at least. learned_from: the world of the baseline, if it is another one.
    goes_on: v̂ of recent requests counts, too."""
    result = []
    for life in range(lives):
        random = np.random.default_rng([seed, life])
        rows = world(random, learned + after + tested)
        if learned_from is not None:
            rows[:learned] = learned_from(random, learned)
        known = begins(rows[:learned, 0], cycle) if dependence else (SETTINGS.baseline_requests, 1.0)
        if known is None:
            result.append(Life(math.inf, math.inf))
            continue
        begun, v = known
        usual = fit_baseline(rows[:begun], 0.5, v)
        begins_at = begun if learned_from is None else learned
        later = rows[begins_at : begins_at + after + tested]
        later[after:, 0] += math.log(factor)
        recent = np.full(len(later), v)
        if goes_on and dependence:
            recent = np.maximum(recent, recent_inflations(later[:, 0] - usual.level))
            recent = np.maximum(recent, difference_inflations(usual, later))
        factors = usual.log_factors(later[:, 0], later[:, 1], SETTINGS.tolerance) * v / recent[:, None, None]
        over = np.flatnonzero(log_evidence(factors, recent) >= -math.log(SETTINGS.change_alpha))
        result.append(Life(begun, over[0] + 1.0 - after if len(over) else math.inf))
    return result


def cusum(world: World, lives: int, seed: int, factor: float) -> float:
    """Median requests until a CUSUM of likelihood ratios of normal levels finds the change, the oracle: it knows both
    distributions, and has the threshold with which it alarms in a hundredth of the lives in a week without a change."""
    lives = max(lives, 100)
    rows = np.stack([world(np.random.default_rng([seed, life]), WEEK)[:, 0] for life in range(lives)])
    shift, mean, variance = math.log(factor), rows.mean(), rows.var()

    def sums(levels: Array) -> Array:
        result, total = np.empty_like(levels), np.zeros(len(levels))
        for at in range(levels.shape[1]):
            total = np.maximum(total + shift * (levels[:, at] - mean - 0.5 * shift) / variance, 0.0)
            result[:, at] = total
        return result

    threshold = float(np.quantile(sums(rows).max(axis=1), 1.0 - SETTINGS.alpha, method="higher"))
    over = sums(rows[:, : 60 * HOUR] + shift) > threshold
    return median(np.where(over.any(axis=1), over.argmax(axis=1) + 1.0, math.inf).tolist())


def rows(lives: int, seed: int) -> Iterator[Row]:
    lives = max(lives // 5, 20)
    for name, (world, weeks, v) in WORLDS.items():
        told = "" if math.isnan(v) else f" (v = {v:g})"
        lived = lives_of(world, lives, seed, weeks * WEEK)
        begun = median([life.begun for life in lived])
        period = f"{weeks} week{'s' * (weeks > 1)} after a baseline of {begun:.0f} requests (median)"
        yield count_row(f"no change, {name}{told}, {period}", alarms(lived), lives, SETTINGS.alpha)
        within = lives_of(world, lives, seed + 3, weeks * WEEK, WITHIN_TOLERANCE)
        case = f"the spread grows by {WITHIN_TOLERANCE}, within the tolerance, {name}"
        yield count_row(case, alarms(within), lives, SETTINGS.alpha)
        yield found_row(name, world, lives, seed, FOUND_INDEPENDENT if v == 1.0 else FOUND_DEPENDENT)
    yield from beginning_rows(max(lives // 5, 20), seed)
    yield alike_row(lives, seed)
    cycle = effects(day_and_night(STRONG_CYCLE))
    lived = lives_of(cycle, lives, seed, 4 * WEEK)
    begun = median([life.begun for life in lived])
    told = f"{begun:.0f} requests (median)" if math.isfinite(begun) else f"more than {LEARNED} requests"
    case = f"no change, day and night ± {STRONG_CYCLE}, four weeks after a baseline of {told}"
    yield count_row(case, alarms(lived), lives, SETTINGS.alpha)
    lived = lives_of(cycle, lives, seed, 4 * WEEK, cycle=0)
    begun, alarmed = (sum(math.isfinite(value) for value in part) for part in zip(*map(astuple, lived), strict=True))
    yield Row(
        f"the same ± {STRONG_CYCLE}, no cycle is set: alarms; baselines that were complete, in flat hours",
        f"{alarmed} and {begun} of {lives}",
        "for comparison: a cycle that is longer than the baseline is not covered",
        True,
    )


def beginning(length: int, lives: int, seed: int, weeks: int, *, goes_on: bool = True) -> list[Life]:
    """Requests are independent during the baseline, and come in runs of alike ones afterwards."""
    independent, later = effects(lambda rng, n: normal_effects(rng, n, 0.3)), effects(runs(length, 0.3))
    return lives_of(later, lives, seed, weeks * WEEK, learned=3 * DAY, learned_from=independent, goes_on=goes_on)


def beginning_rows(lives: int, seed: int) -> Iterator[Row]:
    for name, length in BEGINNING.items():
        case = f"no change, independent during the baseline, then {name}, {BEGINNING_WEEKS} weeks"
        yield count_row(case, alarms(beginning(length, lives, seed, BEGINNING_WEEKS)), lives, BEGINNING_ALLOWED)
        before = alarms(beginning(length, lives, seed, BEGINNING_WEEKS, goes_on=False))
        text = "for comparison: v̂ of the baseline alone"
        yield Row(f"the same, v̂ of the baseline alone, {name}: alarms", f"{before} of {lives}", text, True)


def alike_row(lives: int, seed: int) -> Row:
    """Returns how soon a doubled spread is found if requests hardly differ any more: v̂ must not hide it."""
    before, later = effects(lambda rng, n: normal_effects(rng, n, ALIKE)), effects(lambda _, n: np.zeros(n))
    lived = lives_of(later, lives, seed, 20 * HOUR, DOUBLED, learned=3 * DAY, learned_from=before)
    found = median([life.alarm for life in lived])
    case = f"the spread doubles, effects {ALIKE} before and none afterwards: median requests until the alarm"
    return Row(case, f"{found:.0f}", f"<= {ALIKE_ALLOWED}", bool(found <= ALIKE_ALLOWED))


def alarms(lived: list[Life]) -> int:
    return sum(math.isfinite(life.alarm) for life in lived)


def found_row(name: str, world: World, lives: int, seed: int, allowed: int) -> Row:
    """How soon a doubled spread is found."""
    at_once, later = (
        median([life.alarm for life in lives_of(world, max(lives, 40), seed + 1, 60 * HOUR, DOUBLED, after=after)])
        for after in (0, WEEK)
    )
    best = cusum(world, lives, seed + 2, DOUBLED)
    return Row(
        f"the spread doubles, {name}: median requests until the alarm",
        f"{at_once:.0f}, after a quiet week {later:.0f}; CUSUM of the same false alarms {best:.0f}, "
        f"ratio {later / best:.1f}",
        f"<= {allowed}",
        max(at_once, later) <= allowed,
    )
