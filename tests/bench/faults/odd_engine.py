"""The engine that is not like the others: how often one is named that is, and how soon one that is not.

Simulated lives of the test that decides in production (`hemostat_calibration.alarm.odd_engine`), with four engines
where nothing else is said. Null worlds: every engine serves the same model, and whatever else may differ does. Real
figures: `guard/alarm_levels.csv`, levels of requests to a real vLLM, drawn with replacement.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np
from tests.bench.guard import most
from tests.bench.guard.alarm import real

from hemostat_calibration.alarm.odd_engine import OddEngines, Unit, init, readings, update
from hemostat_calibration.alarm.serialization import load_engines, save_engines

from . import Row

NAME = "odd_engine"
TAKES = "20 minutes"

LIVES = 1000
ALPHA = 0.01
NULL_UNITS = 400
"""Requests of a life in which no engine differs."""
MAX_TOKENS = 1000
"""Of its own, within which an engine that differs is to be named."""

Draw = Callable[[np.random.Generator, int], tuple[str, Unit]]
"""The n-th unit of a life, and its stratum."""


def unit(rng: np.random.Generator, engine: int, level: float, spread: float = 0.8) -> Unit:
    """A heavy tail, and noise that depends on the length of the answer, which is anything from 4 to 500 tokens."""
    tokens = int(np.clip(rng.lognormal(4.0, 1.0), 4, 500))
    noise = spread * rng.standard_t(2) + 3.0 * rng.standard_normal() / math.sqrt(tokens)
    return Unit(f"engine {engine}", math.exp(min(level + noise, 50.0)), tokens)


def hashed(rng: np.random.Generator, n: int) -> tuple[str, Unit]:
    return "chat", unit(rng, int(rng.integers(4)), -0.5)


def two_engines(rng: np.random.Generator, n: int) -> tuple[str, Unit]:
    return "chat", unit(rng, int(rng.integers(2)), -0.5)


def other_mixes(rng: np.random.Generator, n: int) -> tuple[str, Unit]:
    """Two kinds whose figures differ by a factor of 20; every engine gets another mix of them."""
    engine = int(rng.integers(4))
    chat = rng.random() < (0.95, 0.7, 0.3, 0.05)[engine]
    return ("chat", unit(rng, engine, -0.5)) if chat else ("code", unit(rng, engine, -3.5))


def drift(rng: np.random.Generator, n: int) -> tuple[str, Unit]:
    """Traffic whose figures grow and shrink by a factor of 50, fast; a hash chooses the engine."""
    return "chat", unit(rng, int(rng.integers(4)), 2.0 * math.sin(n / 10.0), spread=0.2)


def unequal_times(rng: np.random.Generator, n: int) -> tuple[str, Unit]:
    """One engine gets nearly all requests, in turns; the traffic stays what it is."""
    favoured = n // 40 % 4
    engine = favoured if rng.random() < 0.9 else int(rng.integers(4))
    return "chat", unit(rng, engine, -0.5)


def repeated_figures(rng: np.random.Generator, n: int) -> tuple[str, Unit]:
    """Most requests have the same figure (one token, decided): ties."""
    figure = 0.0 if rng.random() < 0.8 else float(rng.integers(1, 3))
    return "chat", Unit(f"engine {rng.integers(4)}", figure, 1)


NULL_WORLDS: dict[str, Draw] = {
    "heavy tails, unequal lengths": hashed,
    "two engines": two_engines,
    "another mix of kinds at every engine": other_mixes,
    "traffic that drifts": drift,
    "one engine after the other gets most requests": unequal_times,
    "equal figures": repeated_figures,
}


def null_life(draw: Draw, seed: int, restarts: bool = True) -> bool:
    """Whether any engine is named. The state is stored and read again now and then."""
    rng, state = np.random.default_rng(seed), init(ALPHA)
    for n in range(NULL_UNITS):
        state = update(state, *draw(rng, n))
        if restarts and n % 97 == 96:
            state = load_engines(save_engines(state), ALPHA)
    return bool(named(state))


def named(state: OddEngines) -> list[str]:
    return [one.engine for one in readings(state) if one.raised is not None]


def real_draw(odd: str, others: str, begins: int) -> Draw:
    """Levels of `others` at three engines; at the fourth those of `odd`, from unit `begins` on."""
    levels = real()
    forms = sorted(levels[others].keys() & levels[odd].keys())

    def draw(rng: np.random.Generator, n: int) -> tuple[str, Unit]:
        engine, form = int(rng.integers(4)), forms[int(rng.integers(len(forms)))]
        rows = levels[odd if engine == 3 and n >= begins else others][form]
        level, tokens, _ = rows[int(rng.integers(len(rows)))]
        return form, Unit(f"engine {engine}", float(level), int(tokens))

    return draw


def odd_life(odd: str, others: str, begins: int, seed: int) -> tuple[str, float]:
    """Which engine is named first, and after how many requests and tokens of its own since it began to differ."""
    draw, rng, state, own, tokens = real_draw(odd, others, begins), np.random.default_rng(seed), init(ALPHA), 0, 0
    for n in range(begins + 2000):
        stratum, one = draw(rng, n)
        state = update(state, stratum, one)
        if one.engine == "engine 3" and n >= begins:
            own, tokens = own + 1, tokens + one.tokens
        if found := named(state):
            return ", ".join(found), tokens
    return "", math.inf


def rows(lives: int = LIVES) -> Iterator[Row]:
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for case, draw in NULL_WORLDS.items():
            found = sum(pool.map(partial(null_life, draw), range(lives), chunksize=20))
            limit = most(lives, ALPHA)
            yield Row(f"no engine differs: {case}", "", f"{found} of {lives}", f"<= {limit} of {lives}", found <= limit)
        for odd, others, begins in (("w8a8", "w4a16", 0), ("w8a8", "w4a16", 2000), ("prune10", "w4a16", 0)):
            lived = list(pool.map(partial(odd_life, odd, others, begins), range(lives // 5), chunksize=10))
            right = sum(name == "engine 3" for name, _ in lived)
            within = sum(tokens <= MAX_TOKENS for _, tokens in lived)
            middle = sorted(tokens for _, tokens in lived)[len(lived) // 2]
            case = f"{odd} among {others}" + (f", after {begins} requests like the others" if begins else "")
            yield Row(
                f"{case}: named, and no other", "", f"{right} of {len(lived)}", ">= 97 %", right >= 0.97 * len(lived)
            )
            text = f"median {middle:.0f}, {within / len(lived):.0%} within {MAX_TOKENS}"
            # Of late changes: funding anew costs 2 log k, and the window in which one comes is half over.
            limit = MAX_TOKENS if not begins else 2 * MAX_TOKENS
            yield Row(f"{case}: own tokens until it is named", "", text, f"median <= {limit}", middle <= limit)
