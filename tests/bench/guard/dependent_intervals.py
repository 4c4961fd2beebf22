"""Coverage of the asymptotic interval where requests depend on each other, of the mean in the long run.

Streams of requests of 5 to 60 tokens whose mean divergence is log-normal (a deviation of 0.6 of the logarithm), with
effects that repeat, follow an autoregression or go through a cycle of a day. v̂ is the one of the status, by batches
in time. 20 scored requests an hour: a cycle of 24 h are 480. What has to be covered is the mean by token in the long
run, at every look at which there is an interval; where there is none, the status says "not enough effective requests".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
from tests.bench.guard import Row
from tests.bench.guard.intervals import least_covered
from tests.support.interval_worlds import running

from hemostat_calibration.statistics import confidence
from hemostat_calibration.statistics.dependence import BatchMeans

NAME = "dependent_intervals"
TAKES = "1 minute on one core"

DAY = 480
REQUESTS = 4 * DAY
LOOKS = np.unique(np.concatenate([np.arange(48, DAY, 8), np.geomspace(DAY, REQUESTS, 40).astype(int)]))
SPREAD = 0.6
AT_A_TIME = 250

Array = npt.NDArray[np.float64]
Effects = Callable[[np.random.Generator, int], Array]
"""(random, streams) -> [`REQUESTS`, streams], of variance 1."""


def independent(rng: np.random.Generator, streams: int) -> Array:
    return rng.standard_normal((REQUESTS, streams))


def runs(length: int) -> Effects:
    return lambda rng, streams: np.repeat(rng.standard_normal((REQUESTS // length + 1, streams)), length, 0)[:REQUESTS]


def autoregression(coefficient: float) -> Effects:
    def effects(rng: np.random.Generator, streams: int) -> Array:
        result = rng.standard_normal((REQUESTS, streams))
        for at in range(1, REQUESTS):
            result[at] = coefficient * result[at - 1] + math.sqrt(1.0 - coefficient**2) * result[at]
        return result

    return effects


def day_and_night(rng: np.random.Generator, streams: int) -> Array:
    """Half of the variance is the hour's."""
    hour = 2.0 * math.pi * (np.arange(REQUESTS)[:, None] / DAY + rng.random(streams))
    return np.sin(hour) + math.sqrt(0.5) * rng.standard_normal((REQUESTS, streams))


WORLDS: dict[str, tuple[Effects, int, bool]] = {
    "independent": (independent, 0, True),
    "runs of 5": (runs(5), 0, True),
    "runs of 5, a cycle of a day": (runs(5), DAY, True),
    "runs of 25": (runs(25), 0, False),
    "runs of 25, a cycle of a day": (runs(25), DAY, True),
    "autoregression of 0.9, a cycle of a day": (autoregression(0.9), DAY, True),
    "day and night": (day_and_night, 0, False),
    "day and night, a cycle of a day": (day_and_night, DAY, True),
}
"""Effects, the requests that a cycle takes (0: none is set), and whether the interval has to cover."""


def true_mean(effects: Effects) -> float:
    """Over all hours, and all effects."""
    if effects is not day_and_night:
        return 0.1 * math.exp(0.5 * SPREAD**2)
    hours = np.sin(2.0 * math.pi * np.arange(1000) / 1000)
    return 0.1 * float(np.exp(SPREAD * hours).mean()) * math.exp(0.25 * SPREAD**2)


def covered(effects: Effects, cycle: int, rng: np.random.Generator, streams: int) -> tuple[Array, Array, Array, Array]:
    """Of each stream: covered with v̂, and by the rule that takes requests for independent; the first look with an
    interval, inf where there is none; effective requests at the end."""
    n = rng.integers(5, 61, (REQUESTS, streams)).astype(np.float64)
    x = n * 0.1 * np.exp(SPREAD * effects(rng, streams)) * rng.gamma(10.0, 0.1, n.shape)
    means, v = BatchMeans.of(streams), np.full((len(LOOKS), streams), np.inf)
    for at in range(REQUESTS):
        means = means.update(x[at], n[at])
        if at + 1 in LOOKS and at + 1 >= cycle:
            v[np.searchsorted(LOOKS, at + 1)] = np.where(means.enough(), means.inflation(), np.inf)
    moments, true = running(x.T, n.T, LOOKS), true_mean(effects)
    mean = moments[1] / moments[2]
    held = []
    for inflation in (v.T, np.ones_like(v.T)):
        below, above = confidence.reach(*moments, 0.05, inflation)
        held.append(((mean - below <= true) & (true <= mean + above)).all(axis=1).astype(np.float64))
    told = np.isfinite(v.T)
    first = np.where(told.any(axis=1), LOOKS[told.argmax(axis=1)], np.inf)
    return held[0], held[1], first, REQUESTS / v[-1]


def rows(lives: int, seed: int) -> Iterator[Row]:
    for number, (name, (effects, cycle, must)) in enumerate(WORLDS.items()):
        sizes = [min(AT_A_TIME, lives - first) for first in range(0, lives, AT_A_TIME)]
        parts = [
            covered(effects, cycle, np.random.default_rng([seed, 81, number, at]), s) for at, s in enumerate(sizes)
        ]
        held, before, first, effective = (np.concatenate(part) for part in zip(*parts, strict=True))
        least = least_covered(lives, 0.93)
        yield Row(
            f"ci95, {name}: covers the mean in the long run at every look",
            f"{held.sum():.0f} of {lives}, first given after {np.median(first):.0f} requests, at the end "
            f"{np.median(effective):.0f} of {REQUESTS} are effective; were they independent {before.sum():.0f}",
            f">= {least} of {lives}" if must else "for comparison: no cycle is set, and too little was seen",
            bool(held.sum() >= least) or not must,
        )
