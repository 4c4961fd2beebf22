"""Measures what short canaries say of simulated engines whose kernels switch between modes, and how soon they state a
fault: `python -m tests.bench.canary_short --years 100`. It needs no vLLM.

The engines with their modes and their noise come from `tests.bench.canary_modes`. The judgement is made by the code
that serves: `ShortWatch`, and `excesses` for all sequences of an hour at once. Each hour has a pass of 30 sequences
every five minutes; the modes and the load change by the hour. In the first day a pass of an hour without a suspicion is
added to the baseline, as the control process does.

--years: of healthy engines. --engines: of engines with each fault, which begins at a random moment between two
sequences, so many hours after the baseline was taken as --settled says; the seconds until it is stated, without the
time of the engine's answers.
"""

from __future__ import annotations

import argparse
import json
import sys

import numpy as np
from tests.bench.canary_modes import FAULTS, HOUR, YEAR_HOURS, Engine, Fault

from hemostat.canaries.short import SHORT_SECONDS
from hemostat_calibration.arrays import Floats, Indices
from hemostat_calibration.canaries import DAY_REPLAYS, REPLAYS, Canary, CanarySet, Condition, Origin
from hemostat_calibration.canary_short import (
    SHORT_ANSWER,
    SHORT_PROMPT,
    SHORT_ROUNDS,
    SHORT_SEQUENCES,
    ShortWatch,
    excesses,
)

ROWS = SHORT_ROUNDS * REPLAYS
SCORED = SHORT_PROMPT + SHORT_ANSWER - 1
PER_HOUR = round(HOUR / SHORT_SECONDS)
MAX_SECONDS = 600.0
SHORT_FAULTS = {
    "half of the sequences by 0.1 nats": Fault(0.1, 0.5),
    "half of the sequences by 0.2 nats": Fault(0.2, 0.5),
    "half of the sequences by 0.5 nats": Fault(0.5, 0.5),
    **{name: fault for name, fault in FAULTS.items() if not fault.depth},
}


def short_canaries() -> tuple[Canary, ...]:
    each = Canary("", np.zeros(SHORT_PROMPT, np.int32), np.zeros(SHORT_ANSWER, np.int32))
    return (each,) * SHORT_SEQUENCES


class ShortEngine(Engine):
    """A simulated engine that is asked for short sequences."""

    def __init__(self, rng: np.random.Generator, sequences: tuple[Canary, ...], *, modes: bool = True) -> None:
        super().__init__(rng, sequences, modes=modes)
        self.taken = CanarySet(sequences, np.stack([self.replay() for _ in range(ROWS)]), Origin(""))
        self.watch = ShortWatch()

    def part(self, sequence: int, replays: int = 1) -> Floats:
        """Returns replays of one sequence, float64 [replays, T], in the present hour."""
        part = slice(sequence * SCORED, (sequence + 1) * SCORED)
        load = 1.0 + 0.4 * np.sin(2.0 * np.pi * self.hour / 24.0)
        noise = self.rng.standard_t(3, (replays, SCORED)) * (self.noise * load / np.sqrt(3.0))
        values: Floats = self.offsets[self.mode][part] + noise + self.fault[part]
        return values

    def next_hour(self) -> bool:
        """Asks for all sequences of an hour. Returns True if a change is stated."""
        self.hour += 1
        if self.rng.random() < self.leaves:
            self.mode = self._drawn_mode()
        passes = PER_HOUR // SHORT_SEQUENCES
        suspicious = []
        values = [self.part(sequence, passes) for sequence in range(SHORT_SEQUENCES)]
        for sequence, each in enumerate(values):
            found = np.flatnonzero(excesses(self.taken, sequence, each) > 0.0)
            suspicious += [(int(n), sequence) for n in found]
        for n, sequence in sorted(suspicious):
            if self.confirmed(sequence, values[sequence][n], self.hour * HOUR):
                return True
        if not suspicious and len(self.taken.baseline) < ROWS + DAY_REPLAYS:
            row = np.concatenate([each[0] for each in values])
            self.taken = self.taken.with_replay(row, Condition(self.hour * HOUR))
        return False

    def confirmed(self, sequence: int, first: Floats, now: float) -> bool:
        """Asks again for a sequence that is suspicious, and for all. Returns True if a change is stated."""
        if not self.watch.confirmed(self.taken, sequence, first, self.part(sequence)[0], now):
            return False
        return self.watch.whole(self.taken, self.replay(), now)


def healthy(engines: int, hours: int, seed: int = 0, *, modes: bool = True) -> tuple[int, int]:
    """Returns the number of healthy engines that are ever stated to have changed, and of whole replays."""
    sequences, stated, wholes = short_canaries(), 0, 0
    for n in range(engines):
        engine = ShortEngine(np.random.default_rng((seed, n)), sequences, modes=modes)
        before = 0
        for _ in range(hours):
            found = engine.next_hour()
            wholes += sum(at == engine.hour * HOUR for at in engine.watch.state.wholes)
            before += found
            if found:
                break
        stated += before > 0
    return stated, wholes


def seconds_until_stated(fault: Fault, engines: int, settled: int, seed: int = 1, *, modes: bool = True) -> list[float]:
    """Returns for each engine the seconds from a fault until it is stated; infinite after MAX_SECONDS."""
    sequences, result = short_canaries(), []
    for n in range(engines):
        rng = np.random.default_rng((seed, n))
        engine = ShortEngine(rng, sequences, modes=modes)
        for _ in range(settled):
            engine.next_hour()
        engine.fault = fault.values(rng, sequences)
        engine.hour += 1
        at, order = rng.uniform(0.0, SHORT_SECONDS), drawn(rng)
        order = order[int(rng.integers(len(order))) :]
        found = np.inf
        while at < MAX_SECONDS and np.isinf(found):
            order = order if len(order) else drawn(rng)
            sequence, order = int(order[0]), order[1:]
            first = engine.part(sequence)[0]
            if engine.watch.suspects(engine.taken, sequence, first):
                found = at if engine.confirmed(sequence, first, engine.hour * HOUR + at) else np.inf
            at += SHORT_SECONDS
        result.append(found)
    return result


def drawn(rng: np.random.Generator) -> Indices:
    order: Indices = rng.permutation(SHORT_SEQUENCES)
    return order


def main() -> None:
    parser = argparse.ArgumentParser(description="what short canaries say of engines with modes")
    parser.add_argument("--years", type=int, default=0, help="engine-years of healthy engines")
    parser.add_argument("--engines", type=int, default=0, help="engines with each fault")
    parser.add_argument("--settled", type=int, default=30, help="hours before the fault")
    parser.add_argument("--seed", type=int, default=0, help="another seed, for pieces of a longer run")
    arguments = parser.parse_args()
    if arguments.years:
        stated, wholes = healthy(arguments.years, YEAR_HOURS, arguments.seed)
        row = {"healthy engine-years": arguments.years, "stated to have changed": stated, "whole replays": wholes}
        sys.stdout.write(json.dumps(row) + "\n")
    for name, fault in SHORT_FAULTS.items() if arguments.engines else ():
        seconds = np.array(seconds_until_stated(fault, arguments.engines, arguments.settled))
        row = {
            "fault": name,
            "engines": len(seconds),
            "within 60 s": int((seconds <= 60.0).sum()),
            "within 600 s": int(np.isfinite(seconds).sum()),
            "median seconds": float(np.median(seconds)),
        }
        sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
