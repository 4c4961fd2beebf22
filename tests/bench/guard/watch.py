"""What serves is watched in windows, whatever restarts there are."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from tests.bench.guard import Row, count_row, median
from tests.bench.guard.traffic import WIDTH, Floats, decided, draw_clients, normal, units

from hemostat_calibration.guard.decisions import Reason
from hemostat_calibration.guard.guard import MIN_WINDOW, Guard

NAME = "watch"
TAKES = "2 minutes on one core"
TEST_LIVES = 24

WATCH = "serving"
WINDOW = 1000
RESTART_EVERY = 900


def rows(lives: int, seed: int) -> Iterator[Row]:
    yield from useless(lives, np.random.default_rng([seed, 21]))
    yield good(lives, np.random.default_rng([seed, 22]))
    yield turning(lives, np.random.default_rng([seed, 23]))
    yield turned(lives, np.random.default_rng([seed, 24]))


def serve(rng: np.random.Generator, gains: Floats, keep: bool = True) -> tuple[int, int, Reason | None]:
    """Units met until it is taken back, or all; those that counted in its last window; why. The process restarts after
    every `RESTART_EVERY` units.

    keep: whether a restart goes on from the saved state; else its windows begin anew, as they once did.
    """
    guard = Guard()
    guard.begin_watch(WATCH, "A", WIDTH, WINDOW)
    for at, unit in enumerate(units(rng, ["A"] * len(gains), gains), start=1):
        if (decision := decided(guard, WATCH, unit)) is not None:
            return at, guard.evidence(WATCH, "A").units, decision.reason
        if at % RESTART_EVERY == 0:
            guard = Guard.load(guard.save(), 0.05, 0.25)
            if not keep:
                guard.begin_watch(WATCH, "A", WIDTH, WINDOW)
    return len(gains), guard.evidence(WATCH, "A").units, None


def useless(lives: int, rng: np.random.Generator) -> Iterator[Row]:
    result = [serve(rng, normal(rng, 0.0, WINDOW + 20)) for _ in range(lives)]
    ended = [counted for _, counted, reason in result if reason is Reason.UNSUPPORTED]
    yield count_row(
        f"gain 0, restarts every {RESTART_EVERY}: outlasts its window",
        sum(r is None for _, _, r in result),
        lives,
        0.05,
    )
    yield Row(
        "the same: taken back after so many units",
        f"{min(ended, default=0)} to {max(ended, default=0)}",
        f"{WINDOW}",
        set(ended) == {WINDOW},
    )


def good(lives: int, rng: np.random.Generator) -> Row:
    lost = sum(serve(rng, normal(rng, 0.08, 2 * WINDOW + 20))[2] is not None for _ in range(lives))
    return count_row("gain 0.08, restarts: taken back in two windows", lost, lives, 0.05)


def turning(lives: int, rng: np.random.Generator) -> Row:
    """A gain of 0.08 for 1,400 units, to the middle of its second window, then a loss of 0.1."""
    needed = []
    for _ in range(lives):
        at, _, reason = serve(rng, np.concatenate([normal(rng, 0.08, 1400), normal(rng, -0.1, 1000)]))
        needed.append(float(at - 1400) if reason is not None else np.inf)
    case = "gain 0.08, then a loss of 0.1: median units until it is taken back"
    return Row(case, median(needed), "<= 300", median(needed) <= 300)


def turned(lives: int, rng: np.random.Generator) -> Row:
    """A gain of 0.27 for 300 units, then a loss of 0.1, of a kind whose v̂ was estimated from 1,000 units."""
    needed = []
    for _ in range(lives):
        guard = Guard()
        for figure, client in zip(normal(rng, 0.0, 1000), draw_clients(rng, 1000), strict=True):
            guard.update_dependence("A", client, float(figure))
        guard.begin_watch(WATCH, "A", WIDTH, window=MIN_WINDOW)
        stream = units(rng, ["A"] * 1300, np.concatenate([normal(rng, 0.27, 300), normal(rng, -0.1, 1000)]))
        needed.append(next((at - 299.0 for at, unit in enumerate(stream) if decided(guard, WATCH, unit)), np.inf))
    case = "gain 0.27 for 300 units, then a loss of 0.1: median units until it is taken back"
    return Row(case, median(needed), "<= 200", 0.0 < median(needed) <= 200)
