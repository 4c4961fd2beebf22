"""A candidate that is good in the mean, and bad in a small kind: requests until it fails.

Requests are independent. The kind has `SHARE` of them, and D is 0.25 ± 0.08 there, where 0.15 is allowed; the mean over
all requests is 0. What decides is the test of one distance in this kind, with its weight among all means.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hemostat.gate.unit import KIND_WEIGHTS
from hemostat_calibration.gate.live import LiveGate, LiveRules, LiveState
from hemostat_calibration.gate.verdict import Gate, Outcome, Question

SHARE, BAD, SPREAD = 0.03, 0.25, 0.08
REQUESTS = 6000
DISTANCES = ("stable_tokens", "own_answers")
OUTCOMES = ("errors", "loops", "cut", "longer", "shorter", "sharper", "flatter")
LIVE = (*DISTANCES, "bad_answers")

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Found:
    """The number of requests until each life's candidate fails; infinite if it does not."""

    requests: Floats

    def within(self, requests: int) -> float:
        return float((self.requests <= requests).mean())


def drawn(count: int, seed: int = 1) -> list[tuple[npt.NDArray[np.bool_], Floats]]:
    """Returns for each life which requests are of the small kind, and D of all of them."""
    made = []
    for life in range(count):
        random = np.random.default_rng([seed, life])
        small = random.random(REQUESTS) < SHARE
        mean = np.where(small, BAD, -BAD * SHARE / (1.0 - SHARE))
        made.append((small, np.clip(random.normal(mean, SPREAD), -1.0, 1.0)))
    return made


def offline(count: int, kind_weights: dict[str, float]) -> Found:
    """Returns when `hemostat gate` fails the candidate, whose own answers are as bad. kind_weights: as for `Gate`."""
    questions = [Question(name, name, 0.05, 0.15) for name in (*DISTANCES, *OUTCOMES)]
    planned = {"chat": round((1.0 - SHARE) * REQUESTS), "small": round(SHARE * REQUESTS)}
    requests = []
    for small, values in drawn(count):
        gate = Gate(questions, planned, 0.05, dict.fromkeys(OUTCOMES, planned), kind_weights)
        found = math.inf
        for number, value in enumerate(values.tolist()):
            gate.update("small" if small[number] else "chat", dict.fromkeys(DISTANCES, value))
            if small[number] and gate.verdict().outcome is Outcome.FAIL:
                found = number + 1.0
                break
        requests.append(found)
    return Found(np.array(requests))


def live(count: int, own_answers: float = 0.2) -> Found:
    """Returns when the live gate fails the candidate where no cycle is waited for. own_answers: the fraction of the
    requests that the candidate answers by itself, too."""
    rules = LiveRules(tuple(Question(name, name, 0.05, 0.15) for name in LIVE), 0.05, 0.0, 28)
    requests = []
    for life, (small, values) in enumerate(drawn(count)):
        random = np.random.default_rng([2, life])
        gate = LiveGate(LiveState(rules))
        found = math.inf
        for number, value in enumerate(values.tolist()):
            own = {"own_answers": value, "bad_answers": 0.0} if random.random() < own_answers else {}
            gate.update("small" if small[number] else "chat", {"stable_tokens": value} | own, 1.0 + number)
            if small[number] and gate.verdict(lambda kind, units: 1.0).outcome is Outcome.FAIL:
                found = number + 1.0
                break
        requests.append(found)
    return Found(np.array(requests))


def log_optimal(count: int) -> Found:
    """Returns when a bet on this kind alone fails the candidate, which knows the distribution and depends on nothing
    else: nothing that has the same range and alpha is faster."""
    requests = []
    for small, values in drawn(count):
        numbers = np.flatnonzero(small)
        growth = np.log1p(0.999 * (values[numbers] - 0.15) / 1.15).cumsum() >= math.log(20.0)
        requests.append(numbers[growth.argmax()] + 1.0 if growth.any() else math.inf)
    return Found(np.array(requests))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lives", type=int, default=100)
    count = parser.parse_args().lives
    ways: dict[str, Callable[[int], Found]] = {
        "log-optimal": log_optimal,
        "offline": lambda lives: offline(lives, KIND_WEIGHTS),
        "offline, all questions alike": lambda lives: offline(lives, {}),
        "live, without cycles": live,
    }
    for name, way in ways.items():
        found = way(count)
        print(
            f"{name:32}median {np.median(found.requests):6.0f} requests; within 3,000 {found.within(3000):.2f}, within "
            f"{REQUESTS:,} {found.within(REQUESTS):.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
