"""Coverage of the asymptotic interval of a mean per token where a few long answers have many of the tokens.

2,000 requests with answers of several lengths, whose mean divergence is log-normal (a deviation of 0.6 of the
logarithm), times one factor for all long ones. Runs are of alike requests, or of long ones alone. v̂ is the one of the
status, by batches in time. What has to be covered is the mean per token in the long run.

`ci95_seen` is judged at every look from 48 requests on, `ci95` from 480 on: a day of 20 scored requests an hour. A look
without an interval covers, and how many lives have one is a part of the row. An interval cannot know of long answers
that have not come yet. So the lives are counted twice: over all looks, and over the looks at which one had come. Only
the second number has a limit, and when ordinary answers have their first interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
from tests.bench.guard import Row
from tests.bench.guard.intervals import least_covered
from tests.support.interval_worlds import running

from hemostat_calibration.statistics import confidence
from hemostat_calibration.statistics.dependence import BatchMeans

NAME = "long_answers"
TAKES = "1 minute on one core"

REQUESTS = 2000
DAY = 480
HORIZONS = (64, 200, 500, 2000)
LOOKS = np.unique([*range(48, DAY, 8), *HORIZONS, *np.geomspace(DAY, REQUESTS, 40).astype(int)])
SPREAD = 0.6
AT_A_TIME = 250

Array = npt.NDArray[np.float64]
Lengths = Callable[[np.random.Generator, tuple[int, int]], Array]


def uniform(least: int, most: int) -> Lengths:
    return lambda rng, shape: rng.integers(least, most + 1, shape).astype(np.float64)


def exponential(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
    return np.ceil(rng.exponential(100.0, shape))


def lognormal(deviation: float) -> Lengths:
    """deviation: of the logarithm. At most `shadow.max_tokens`."""
    return lambda rng, shape: np.clip(np.round(80.0 * np.exp(deviation * rng.standard_normal(shape))), 1.0, 4096.0)


CHAT = uniform(20, 300)


@dataclass(frozen=True)
class World:
    """lengths: of ordinary answers. share: of requests with an answer of `tokens`, whose divergence is `factor` times
    as large. run: so many alike requests in succession; only the long ones where `long_only`. first: the most requests
    until an ordinary life has an interval, as a median. must: its coverage has a limit."""

    lengths: Lengths
    share: float = 0.0
    tokens: int = 0
    factor: float = 1.0
    run: int = 1
    long_only: bool = False
    first: float = math.inf
    must: bool = True

    @property
    def mean(self) -> float:
        """Returns the mean divergence per token in the long run."""
        usual = float(self.lengths(np.random.default_rng(1), (1000, 1000)).mean())
        long, others = self.share * self.tokens, (1.0 - self.share) * usual
        return 0.1 * math.exp(0.5 * SPREAD**2) * (self.factor * long + others) / (long + others)

    def streams(self, rng: np.random.Generator, streams: int) -> tuple[Array, Array, npt.NDArray[np.bool_]]:
        """Returns x, n and if the answer is long, [`REQUESTS`, streams] each."""
        shape = (REQUESTS, streams)
        runs = (REQUESTS // self.run + 1, streams)
        long = np.repeat(rng.random(runs) < self.share, self.run, 0)[:REQUESTS]
        effect = np.repeat(rng.standard_normal(runs), self.run, 0)[:REQUESTS]
        if self.long_only:
            effect = np.where(long, effect, rng.standard_normal(shape))
        n = np.where(long, float(self.tokens), self.lengths(rng, shape))
        mean = 0.1 * np.exp(SPREAD * effect) * rng.gamma(10.0, 0.1, shape) * np.where(long, self.factor, 1.0)
        return mean * n, n, long


WORLDS: dict[str, World] = {
    "answers of 1 to 256 tokens": World(uniform(1, 256), first=64),
    "answers of 20 to 300 tokens": World(CHAT, first=64),
    "answers of 20 to 300 tokens, runs of 5": World(CHAT, run=5, first=80),
    "log-normal lengths, 0.6": World(lognormal(0.6), first=80),
    "log-normal lengths, 1.0": World(lognormal(1.0), first=200),
    "exponential lengths": World(exponential, first=120),
    "0.5 % of 4,000 tokens, divergence × 4": World(CHAT, 0.005, 4000, 4.0),
    "0.5 % of 4,000 tokens, × 4, runs of 5": World(CHAT, 0.005, 4000, 4.0, run=5),
    "0.5 % of 4,000 tokens, × 4, the long ones in runs of 5": World(CHAT, 0.005, 4000, 4.0, run=5, long_only=True),
    "0.5 % of 4,000 tokens, × 2": World(CHAT, 0.005, 4000, 2.0),
    "0.5 % of 4,000 tokens, × 1": World(CHAT, 0.005, 4000, 1.0),
    "0.5 % of 4,000 tokens, × 1, runs of 5": World(CHAT, 0.005, 4000, 1.0, run=5),
    "0.5 % of 4,000 tokens, × 0.25": World(CHAT, 0.005, 4000, 0.25),
    "0.5 % of 4,000 tokens among 20 to 60, × 4": World(uniform(20, 60), 0.005, 4000, 4.0),
    "2 % of 1,000 tokens, × 1": World(CHAT, 0.02, 1000, 1.0),
    "2 % of 1,000 tokens, × 4": World(CHAT, 0.02, 1000, 4.0, must=False),
    "2 % of 1,000 tokens, × 4, runs of 5": World(CHAT, 0.02, 1000, 4.0, run=5, must=False),
}


@dataclass(frozen=True)
class Lives:
    """given, covered, met: bool [L, `LOOKS`], if there is an interval, if it covers the mean or there is none, and if
    a long answer has come."""

    given: npt.NDArray[np.bool_]
    covered: npt.NDArray[np.bool_]
    met: npt.NDArray[np.bool_]

    def held(self, since: int = 0, *, once_met: bool = False) -> int:
        """Returns how many lives are covered at every look from so many requests on. once_met: only the looks at which
        a long answer had come."""
        good = self.covered | (since > LOOKS)
        return int((good | ~self.met if once_met else good).all(axis=1).sum())

    @property
    def first(self) -> float:
        """Returns the median number of requests until there is an interval, inf where most lives have none."""
        at = np.where(self.given.any(axis=1), LOOKS[self.given.argmax(axis=1)], np.inf)
        return float(np.median(at))

    def at(self, requests: int) -> str:
        """Returns how many of the given intervals cover at one look."""
        look = int(np.searchsorted(LOOKS, requests))
        given = self.given[:, look]
        return f"{(self.covered[:, look] & given).sum()} of {given.sum()}"


def lives_of(world: World, lives: int, rng: np.random.Generator, *, limit: bool = True) -> Lives:
    """limit: False: intervals are given however few requests carry the tokens."""
    parts = [_simulate(world, rng, min(AT_A_TIME, lives - first), limit=limit) for first in range(0, lives, AT_A_TIME)]
    return Lives(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def _simulate(
    world: World, rng: np.random.Generator, streams: int, *, limit: bool
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    x, n, long = world.streams(rng, streams)
    means, v = BatchMeans.of(streams), np.full((streams, len(LOOKS)), np.inf)
    for at in range(REQUESTS):
        means = means.update(x[at], n[at])
        if at + 1 in LOOKS:
            v[:, np.searchsorted(LOOKS, at + 1)] = np.where(means.enough(), means.inflation(), np.inf)
    moments, true = running(x.T, n.T, LOOKS), world.mean
    with patch.object(confidence, "MIN_CARRYING", confidence.MIN_CARRYING if limit else 0.0):
        below, above = confidence.reach(*moments, 0.05, v)
    mean = moments[1] / moments[2]
    covered = (mean - below <= true) & (true <= mean + above)
    return np.isfinite(below), covered, long.cumsum(axis=0)[LOOKS - 1].T > 0


def rows(lives: int, seed: int) -> Iterator[Row]:
    for number, (name, world) in enumerate(WORLDS.items()):
        result = lives_of(world, lives, np.random.default_rng([seed, 83, number]))
        before = lives_of(world, lives, np.random.default_rng([seed, 83, number]), limit=False)
        least = least_covered(lives, 0.93)
        shown = ", ".join(f"{result.at(n)} at {n}" for n in HORIZONS)
        once = result.held(once_met=True) if world.share else result.held()
        met = f" ({once} once a long answer had come)" if world.share else ""
        median = f", first interval at most after {world.first:.0f}" if math.isfinite(world.first) else ""
        yield Row(
            f"{name}: ci95_seen covers the mean at every look",
            f"{result.held()} of {lives}{met}, ci95 {result.held(DAY)}; without the limit {before.held()} and "
            f"{before.held(DAY)}; first given after {result.first:.0f} requests; covered of those given: {shown}",
            f">= {least} of {lives}{' once met' if world.share else ''}{median}" if world.must else "for comparison",
            (once >= least and result.first <= world.first) or not world.must,
        )
