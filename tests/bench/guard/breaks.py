"""Where a curve breaks: the interval against known breaks, with heavy-tailed requests.

A world's curve is flat (or rises slowly) up to its break, then steeply, and may saturate; the break is drawn anywhere
between the second setting and the third from last. A request multiplies the whole curve by a factor of its own (Pareto,
2.5) and each setting by noise (log-normal, σ = 0.35), and has a noise floor; requests have 8 to 32 tokens. In lines, in
curves that only saturate and in flat ones there is no break to be found.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from tests.bench.guard import Row, count_row

from hemostat_calibration.thresholds.breaks import Existence, find_break
from hemostat_calibration.thresholds.curve import Curve

NAME = "breaks"
TAKES = "one minute on one core"
REQUESTS = 24
RESAMPLES = 500
BITS = np.array([0.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0])
SPARSITY = np.linspace(0.0, 0.9, 10)


@dataclass(frozen=True)
class World:
    """before: slope before the break, as a part of that after it. saturates: rises only half of the way."""

    name: str
    settings: np.ndarray
    before: float = 0.0
    saturates: bool = False
    shape: str = "break"


BROKEN = (
    World("bits", BITS),
    World("sparsity", SPARSITY),
    World("sparsity, a slow rise before", SPARSITY, before=0.2),
    World("sparsity, saturating", SPARSITY, saturates=True),
)
LINE = World("a line", SPARSITY, shape="line")
UNBROKEN = (
    LINE,
    World("saturating from the start", SPARSITY, shape="concave"),
    World("flat", SPARSITY, shape="flat"),
)


def life(rng: np.random.Generator, world: World, requests: int = REQUESTS) -> tuple[Curve, float]:
    """A curve that was measured, and where it breaks."""
    x = world.settings
    span = x[-1] - x[1]
    at = float(rng.uniform(x[1], x[-3]))
    rise = np.maximum(x - at, 0.0) + world.before * np.minimum(x, at)
    if world.saturates:
        rise = np.minimum(rise, 0.5 * (x[-1] - at))
    rise = {"break": rise, "line": x - x[0], "concave": span * (1.0 - np.exp(-6.0 * x / x[-1])), "flat": 0.0 * x}[
        world.shape
    ]
    factor = 1.0 + rng.pareto(2.5, requests)
    noise = np.exp(0.35 * rng.normal(size=(len(x), requests)))
    floor = 0.003 * rng.gamma(1.0, 1.0, (len(x), requests))
    tokens = rng.integers(8, 33, requests).astype(float)
    return Curve(x, (floor + 8.0 / span * rise[:, None] * factor * noise) * tokens, tokens), at


def counts(rng: np.random.Generator, requests: int) -> np.ndarray:
    return rng.multinomial(requests, np.full(requests, 1.0 / requests), RESAMPLES).astype(float)


def rows(lives: int, seed: int) -> Iterator[Row]:
    for world in BROKEN:
        rng = np.random.default_rng(seed)
        missed = result = 0
        for _ in range(lives):
            curve, at = life(rng, world)
            estimate = find_break(curve, counts(rng, REQUESTS))
            if estimate.existence is Existence.FOUND:
                result += 1
                missed += not estimate.low <= at <= estimate.high
        yield count_row(f"{world.name}: the interval misses the break", missed, result, 0.05)
        share = result / lives
        yield Row(f"{world.name}: breaks that are found", f"{share:.0%}", "> 75 %", share > 0.75)
    for world in UNBROKEN:
        rng = np.random.default_rng(seed)
        false = sum(
            find_break(life(rng, world)[0], np.ones((1, REQUESTS))).existence is Existence.FOUND for _ in range(lives)
        )
        yield count_row(f"{world.name}: a break is found", false, lives, 0.025)
