"""The outlier engine: how often one is named that is none, and how soon one that is.

Simulated lives of the test that decides in production (`hemostat_calibration.alarm.outlier_engine`), with four engines
where nothing else is said. Null worlds: every engine serves the same model, and whatever else may differ does. Real
figures: `guard/alarm_levels.csv`, levels of requests to a real vLLM, drawn with replacement.

Each life is kept in build/bench/outlier_engine/, in a folder for the present behaviour of the test, so that a run that
is stopped goes on. `python -m tests.bench.faults.outlier_engine --lives 0:250 --processes 1` runs a part of the lives
of each case, and prints the rows of all that are kept.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tests.bench.guard import median, most
from tests.bench.guard.alarm import real

from hemostat_calibration.alarm.outlier_engine import COHORT, FIRST_COHORT, OutlierTest, Unit, init, readings, update
from hemostat_calibration.alarm.serialization import load_engines, save_engines

from . import Row

NAME = "outlier_engine"
TAKES = "about 15 minutes of CPU time"

LIVES = 1000
ODD_LIVES = 200
"""Of each case in which an engine differs."""
ALPHA = 0.01
NULL_UNITS = 400
"""Requests of a life in which no engine differs."""
MAX_TOKENS = 1000
"""Of its own, within which an engine that differs is to be named."""

RESULTS = Path(__file__).resolve().parents[3] / "build" / "bench" / "outlier_engine"

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


def named(state: OutlierTest) -> list[str]:
    return [reading.engine for reading in readings(state) if reading.raised is not None]


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
    """Which engine is named first, and after how many tokens of its own since it began to differ."""
    draw, rng, state, tokens = real_draw(odd, others, begins), np.random.default_rng(seed), init(ALPHA), 0
    for n in range(begins + 2000):
        stratum, drawn = draw(rng, n)
        state = update(state, stratum, drawn)
        if drawn.engine == "engine 3" and n >= begins:
            tokens += drawn.tokens
        if result := named(state):
            return ", ".join(result), tokens
    return "", math.inf


# --- bounds: tests that know what the test has to learn ------------------------------------------------------------

Gain = Callable[[str, Unit, bool], float]
"""Growth of the evidence by one unit, in nats: of its stratum, and whether it is of the engine that differs."""


def densities(odd: str, others: str) -> Callable[[str, float], tuple[float, float]]:
    """Of a figure by its stratum, from both models: normal, with the mean and the variance of the real levels."""
    levels = real()
    moments = {
        form: [(levels[model][form][:, 0].mean(), levels[model][form][:, 0].std()) for model in (odd, others)]
        for form in levels[others].keys() & levels[odd].keys()
    }

    def found(stratum: str, figure: float) -> tuple[float, float]:
        own, other = (math.exp(-(((figure - mean) / spread) ** 2) / 2.0) / spread for mean, spread in moments[stratum])
        return max(own, 1e-300), max(other, 1e-300)

    return found


def knows_figures(odd: str, others: str) -> Gain:
    """The likelihood-ratio test of the engine's figures."""
    density = densities(odd, others)

    def gain(stratum: str, drawn: Unit, is_own: bool) -> float:
        own, other = density(stratum, drawn.figure)
        return math.log(own / other) if is_own else 0.0

    return gain


def knows_labels(odd: str, others: str) -> Gain:
    """The likelihood-ratio test of labels, given the figures: no test grows faster that holds for traffic that drifts
    as it likes."""
    density, share = densities(odd, others), 0.25

    def gain(stratum: str, drawn: Unit, is_own: bool) -> float:
        own, other = density(stratum, drawn.figure)
        return math.log((own if is_own else other) / (share * own + (1.0 - share) * other))

    return gain


def knows_threshold(odd: str, others: str) -> Gain:
    """The bets on labels of the test, with the threshold and the engine's share given instead of learned: it knows how
    many figures before lie below the threshold, and into which gap the next one falls, but not, of the threshold's own
    gap, on which side."""
    levels, share, noise = real(), 0.25, 1e-3
    before: dict[str, list[float]] = {}

    def gain(stratum: str, drawn: Unit, is_own: bool) -> float:
        threshold = (levels[odd][stratum][:, 0].max() + levels[others][stratum][:, 0].min()) / 2.0
        figures = before.setdefault(stratum, [])
        below, place = sum(figure < threshold for figure in figures), sum(figure < drawn.figure for figure in figures)
        lower, higher = (place <= below) / (below + 1), (place >= below) / (len(figures) - below + 1)
        own, other = ((1.0 - wrong) * lower + wrong * higher for wrong in (noise, 1.0 - noise))
        figures.append(drawn.figure)
        return math.log((own if is_own else other) / (share * own + (1.0 - share) * other))

    return gain


BOUNDS: dict[str, Callable[[str, str], Gain]] = {
    "knows the figures of both models": knows_figures,
    "knows them, and bets on labels only": knows_labels,
    "knows the threshold among the ranks": knows_threshold,
}


def bound_life(bound: Callable[[str, str], Gain], odd: str, others: str, seed: int) -> float:
    """Tokens of its own, until the evidence reaches what a first test of four engines needs."""
    draw, gain, rng = real_draw(odd, others, 0), bound(odd, others), np.random.default_rng(seed)
    evidence, tokens = 0.0, 0
    target = -math.log(ALPHA * FIRST_COHORT / COHORT)
    for n in range(2000):
        stratum, drawn = draw(rng, n)
        is_own = drawn.engine == "engine 3"
        evidence, tokens = evidence + gain(stratum, drawn, is_own), tokens + drawn.tokens * is_own
        if evidence >= target:
            return tokens
    return math.inf


# --- lives that are kept, and rows ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Case:
    """slug: name of its file. life: seed -> engines that are named, and tokens of its own until then (0 in a null
    world). lives: that are wanted."""

    slug: str
    life: Callable[[int], tuple[str, float]]
    lives: int

    def kept(self, folder: Path) -> dict[int, tuple[str, float]]:
        """By seed."""
        path = folder / f"{self.slug}.csv"
        if not path.exists():
            return {}
        with path.open(encoding="utf-8", newline="") as file:
            return {int(seed): (engines, float(tokens)) for seed, engines, tokens in csv.reader(file)}

    def run(self, folder: Path, seeds: Sequence[int], pool: Executor) -> None:
        """Those of the seeds that are not kept yet."""
        kept = self.kept(folder)
        missing = [seed for seed in seeds if seed < self.lives and seed not in kept]
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{self.slug}.csv").open("a", encoding="utf-8", newline="") as file:
            for seed, lived in zip(missing, pool.map(self.life, missing), strict=True):
                csv.writer(file).writerow((seed, *lived))
                file.flush()
                if seed % 50 == 49:
                    print(f"{self.slug}: {seed + 1} of {self.lives}", file=sys.stderr, flush=True)


def _null(world: str, seed: int) -> tuple[str, float]:
    return ("some" if null_life(NULL_WORLDS[world], seed) else ""), 0.0


def _slug(text: str) -> str:
    return text.replace(",", "").replace(" ", "-")


NULL_CASES = {world: Case(_slug(world), partial(_null, world), LIVES) for world in NULL_WORLDS}
ODD_CASES = {
    (odd, others, begins): Case(f"{odd}-among-{others}-{begins}", partial(odd_life, odd, others, begins), ODD_LIVES)
    for odd, others, begins in (("w8a8", "w4a16", 0), ("prune10", "w4a16", 0), ("w8a8", "w4a16", 2000))
}


def results() -> Path:
    """The folder for the present behaviour: its name is a digest of the evidence in two short lives."""
    evidence = []
    for draw in (drift, real_draw("w8a8", "w4a16", 60)):
        rng, state = np.random.default_rng(0), init(ALPHA)
        for n in range(100):
            state = update(state, *draw(rng, n))
            evidence += [f"{reading.log_evidence:.6f}" for reading in readings(state)]
    return RESULTS / hashlib.sha256(" ".join(evidence).encode()).hexdigest()[:12]


def run(first: int, last: int, processes: int) -> None:
    """Lives with these seeds, of each case. An interruption loses what is in progress."""
    folder = results()
    with ProcessPoolExecutor(processes) as pool:
        for case in (*ODD_CASES.values(), *NULL_CASES.values()):
            case.run(folder, range(first, last), pool)


def kept_rows() -> Iterator[Row]:
    """Of the lives that are kept."""
    folder = results()
    for world, case in NULL_CASES.items():
        lived = case.kept(folder)
        count, limit = sum(bool(engines) for engines, _ in lived.values()), most(len(lived), ALPHA)
        text = f"{count} of {len(lived)}"
        yield Row(f"no engine differs: {world}", "", text, f"<= {limit} of {len(lived)}", count <= limit)
    for (odd, others, begins), case in ODD_CASES.items():
        if not (lived := case.kept(folder)):
            continue
        right = sum(engines == "engine 3" for engines, _ in lived.values()) / len(lived)
        name = f"{odd} among {others}" + (f", after {begins} requests like the others" if begins else "")
        yield Row(f"{name}: named, and no other", "", f"{right:.0%} of {len(lived)}", ">= 97 %", right >= 0.97)
        tokens = [tokens for _, tokens in lived.values()]
        # A late change also pays for the restarts before it, and waits for the next one.
        wanted = 0.95 if not begins else 0.5
        limit_text = f">= {wanted:.0%} within {MAX_TOKENS}"
        yield Row(f"{name}: own tokens until it is named", "", _summary(tokens), limit_text, _within(tokens) >= wanted)
    for name, bound in BOUNDS.items():
        tokens = [bound_life(bound, "w8a8", "w4a16", seed) for seed in range(ODD_LIVES)]
        yield Row(f"w8a8 among w4a16, a test that {name}: own tokens", "", _summary(tokens), "a bound", True)


def _within(tokens: Sequence[float]) -> float:
    return sum(token <= MAX_TOKENS for token in tokens) / len(tokens)


def _summary(tokens: Sequence[float]) -> str:
    return f"median {median(list(tokens)):.0f}, {_within(tokens):.1%} of {len(tokens)} within {MAX_TOKENS}"


def rows() -> Iterator[Row]:
    run(0, LIVES, os.cpu_count() or 1)
    yield from kept_rows()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lives", default=f"0:{LIVES}", help="first and last seed, the last one not included")
    parser.add_argument("--processes", type=int, default=1)
    arguments = parser.parse_args()
    first, last = map(int, arguments.lives.split(":"))
    run(first, last, arguments.processes)
    for row in kept_rows():
        print(f"{row.case}: {row.measured} ({row.limit})")


if __name__ == "__main__":
    main()
