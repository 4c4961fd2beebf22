"""Measures what canaries say of simulated engines whose kernels switch between modes, and which faults they find there:
`python -m tests.bench.canary_modes --years 1000`. It needs no vLLM.

A mode has another offset at each token, the same in all replays that are made in it. Two modes differ by 0.01 to 0.03
nats a token in the mean: by one constant, or by a size of its own at each token. A mode lasts for one to four hours in
the mean. The replays of an hour also differ by noise with heavy tails (Student's t, 3 degrees of freedom), whose size
follows the load over the day by ± 40 %. The judgement is made by the code that serves: `CanarySet.compare` and
`Reading.judge`.

--years: of healthy engines, each replayed every hour, and again at once where a replay is too far away. The first
replays are of one moment; the ones of the first day are added to the baseline, as the control process does.
--engines: of engines with each fault; the hours until it is stated, at most MAX_HOURS (0: at the first replay and its
repetition).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hemostat.canaries.engine import BASELINE, Reading
from hemostat_calibration.arrays import Floats
from hemostat_calibration.canaries import DAY_REPLAYS, REPLAYS, Canary, CanarySet, Condition, Origin, parts_of

LENGTHS = (*([14] * 33), 560)
"""The numbers of tokens of the sequences: short ones, so that a year takes a second."""
ANSWER = 4
HOUR = 3600.0
YEAR_HOURS = 24 * 365
MAX_HOURS = 24 * 8
SETTLED_HOURS = 48
NATS = 0.5
"""The size of a fault that not all sequences show."""


def canaries(lengths: tuple[int, ...] = LENGTHS) -> tuple[Canary, ...]:
    return tuple(Canary("", np.zeros(n - ANSWER, np.int32), np.zeros(ANSWER, np.int32)) for n in lengths)


class Engine:
    """A simulated engine. modes: False for an engine that has only one. sequences: shared by all engines of a run."""

    def __init__(self, rng: np.random.Generator, sequences: tuple[Canary, ...], *, modes: bool = True) -> None:
        self.rng, self.sequences = rng, sequences
        self.size = sum(canary.scored for canary in sequences)
        self.noise = rng.uniform(0.0, 0.02)
        self.fault = np.zeros(self.size)
        self.hour = 0
        count = int(rng.integers(2, 6)) if modes else 1
        if rng.random() < 0.5:
            self.offsets = rng.permutation(np.linspace(0.0, 0.03, count))[:, np.newaxis] + np.zeros(self.size)
        else:
            sizes = rng.uniform(0.01, 0.03, (count, 1)) / np.sqrt(2.0)
            self.offsets = rng.normal(0.0, np.sqrt(np.pi / 2.0), (count, self.size)) * sizes
        self.chances = rng.dirichlet(np.ones(count))
        self.leaves = 1.0 - np.exp(-1.0 / rng.uniform(1.0, 4.0))
        self.mode = self._drawn_mode()
        self.taken = CanarySet(sequences, np.stack([self.replay() for _ in range(REPLAYS)]), Origin(""))
        self.reading = Reading()

    def _drawn_mode(self) -> int:
        return int(self.rng.choice(len(self.chances), p=self.chances))

    def replay(self) -> Floats:
        load = 1.0 + 0.4 * np.sin(2.0 * np.pi * self.hour / 24.0)
        noise: Floats = self.rng.standard_t(3, self.size) * (self.noise * load / np.sqrt(3.0))
        return self.offsets[self.mode] + noise + self.fault

    def next_hour(self) -> bool:
        """Replays and judges. Returns True while a change is stated."""
        self.hour += 1
        if self.rng.random() < self.leaves:
            self.mode = self._drawn_mode()
        values = self._judged()
        if self.reading.awaited:
            values = self._judged()
        quiet = not self.reading.suspected and not self.reading.since
        if quiet and len(self.taken.baseline) < REPLAYS + DAY_REPLAYS:
            self.taken = self.taken.with_replay(values, Condition(self.hour * HOUR))
        return bool(self.reading.since)

    def _judged(self) -> Floats:
        values = self.replay()
        self.reading.number += 1
        self.reading.judge(BASELINE, self.taken.compare(values), [self.reading.number], self.hour * HOUR)
        return values


def healthy(engines: int, hours: int, seed: int = 0, *, modes: bool = True) -> int:
    """Returns the number of healthy engines that are ever stated to have changed within so many hours."""
    sequences, stated = canaries(), 0
    for n in range(engines):
        engine = Engine(np.random.default_rng((seed, n)), sequences, modes=modes)
        stated += any(engine.next_hour() for _ in range(hours))
    return stated


@dataclass(frozen=True, slots=True)
class Fault:
    """A change of log-probabilities. nats: of each token that it concerns. share: of the sequences; 0: of a single one.
    depth: the least context of the tokens that it concerns."""

    nats: float
    share: float = 1.0
    depth: int = 0

    def values(self, rng: np.random.Generator, sequences: tuple[Canary, ...]) -> Floats:
        hit = set(rng.choice(len(sequences), max(round(self.share * len(sequences)), 1), replace=False).tolist())
        pieces = []
        for n, canary in enumerate(sequences):
            signs = rng.choice([-self.nats, self.nats], canary.scored)
            pieces.append(signs * (np.arange(canary.scored) >= self.depth) * (n in hit))
        return np.concatenate(pieces)


FAULTS = {
    "all tokens by 0.02 nats": Fault(0.02),
    "all tokens by 0.05 nats": Fault(0.05),
    "all tokens by 0.1 nats": Fault(0.1),
    "a quarter of the sequences by 0.5 nats": Fault(NATS, 0.25),
    "one sequence by 0.5 nats": Fault(NATS, 0.0),
    "tokens behind a context of 512 by 0.5 nats": Fault(NATS, 1.0, 512),
}


def found_after(fault: Fault, engines: int, settled: int, seed: int = 1, *, modes: bool = True) -> Iterator[int | None]:
    """Yields for each engine the hours after which its fault is stated; None if it is not within MAX_HOURS.

    settled: the number of hours before the fault.
    """
    sequences = canaries()
    for n in range(engines):
        engine = Engine(np.random.default_rng((seed, n)), sequences, modes=modes)
        for _ in range(settled):
            engine.next_hour()
        engine.fault = fault.values(engine.rng, sequences)
        yield next((hour for hour in range(MAX_HOURS) if engine.next_hour()), None)


def main() -> None:
    parser = argparse.ArgumentParser(description="what canaries say of engines with modes")
    parser.add_argument("--years", type=int, default=0, help="engine-years of healthy engines")
    parser.add_argument("--engines", type=int, default=0, help="engines with each fault")
    parser.add_argument("--seed", type=int, default=0, help="another seed, for pieces of a longer run")
    arguments = parser.parse_args()
    assert parts_of(LENGTHS[-1] - 1)[-1].start == 512
    if arguments.years:
        for modes in (True, False) if not arguments.seed else (True,):
            stated = healthy(arguments.years, YEAR_HOURS, arguments.seed, modes=modes)
            row = {"healthy engine-years": arguments.years, "modes": modes, "stated to have changed": stated}
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()
    for modes in (True, False) if arguments.engines else ():
        for name, fault in FAULTS.items():
            hours = list(found_after(fault, arguments.engines, SETTLED_HOURS, modes=modes))
            found = [hour for hour in hours if hour is not None]
            row = {
                "fault": name,
                "modes": modes,
                "engines": len(hours),
                "at once": found.count(0),
                "within eight days": len(found),
            }
            sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
