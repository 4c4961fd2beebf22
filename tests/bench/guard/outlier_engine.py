"""Engines that do not differ, behind routing that knows the traffic: the test of the outlier engine counts only
requests whose engine was drawn at random.

Four engines, 300 scored requests; figures are log-normal, with a factor of their own for each run, template or client.
Each world is lived twice: with engines as that routing chooses them, which the test once counted, and with engines that
are drawn at random, as Hemostat does. That other requests never reach the test: `tests/control/test_engines.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from tests.bench.guard import Row, count_row

from hemostat_calibration.alarm.outlier_engine import Unit, init, readings, update
from hemostat_calibration.arrays import Floats

NAME = "outlier_engine"
TAKES = "4 minutes on one core (a tenth of the lives)"
TEST_LIVES = 30

ALPHA = 0.01
ENGINES, UNITS = 4, 300

World = Callable[[np.random.Generator], tuple[np.ndarray, Floats]]
"""-> the engine that a router or a client chooses for each request, and ln of its figure."""


def runs(rng: np.random.Generator) -> tuple[np.ndarray, Floats]:
    """Runs of 5 alike requests, each on one engine: cache-aware routing."""
    engines = np.repeat(rng.integers(0, ENGINES, UNITS // 5), 5)
    return engines, np.repeat(rng.normal(0.0, 1.0, UNITS // 5), 5) + rng.normal(0.0, 0.3, UNITS)


def template(rng: np.random.Generator) -> tuple[np.ndarray, Floats]:
    """A template of 30 % of the traffic, whose figures are half as large, on one engine."""
    alike = rng.random(UNITS) < 0.3
    engines = np.where(alike, 0, rng.integers(0, ENGINES, UNITS))
    return engines, np.where(alike, -0.7, 0.0) + rng.normal(0.0, 0.5, UNITS)


def pinned(rng: np.random.Generator) -> tuple[np.ndarray, Floats]:
    """20 clients, each on an engine of its own, with figures of its own (a factor of 2.2)."""
    clients = rng.integers(0, 20, UNITS)
    return rng.integers(0, ENGINES, 20)[clients], rng.normal(0.0, 0.8, 20)[clients] + rng.normal(0.0, 0.5, UNITS)


WORLDS: dict[str, World] = {
    "runs of 5 on one engine": runs,
    "a template of 30 % on one engine": template,
    "clients pinned": pinned,
}


def rows(lives: int, seed: int) -> Iterator[Row]:
    lives = max(lives // 10, 1)
    for number, (name, world) in enumerate(WORLDS.items()):
        before = drawn = 0
        for life in range(lives):
            rng = np.random.default_rng([seed, 37, number, life])
            engines, figures = world(rng)
            before += named(engines, figures)
            drawn += named(rng.integers(0, ENGINES, UNITS), figures)
        yield Row(
            f"{name}, all requests counted: an engine named",
            f"{before} of {lives}",
            "for comparison: the rule before",
            True,
        )
        yield count_row(f"{name}, engines of scored requests drawn at random: an engine named", drawn, lives, ALPHA)


def named(engines: np.ndarray, figures: Floats) -> bool:
    """Whether any engine is ever named."""
    state = init(ALPHA)
    for engine, figure in zip(engines.tolist(), figures.tolist(), strict=True):
        state = update(state, "chat", Unit(f"engine {engine}", float(np.exp(figure)), 60))
        if any(reading.raised is not None for reading in readings(state)):
            return True
    return False
