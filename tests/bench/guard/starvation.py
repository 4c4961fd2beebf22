"""Builds of an adapter that follow each other while one is tested: is a good one ever promoted?

The learner makes a build whenever twice as many tokens are known as at the last one (four times, while a build is under
test, and never more than 500,000 tokens later). With long answers that is sooner than a proof takes: a rule that tests
the newest build, and ends the test that runs, never comes to an end.

The traffic is in `builds`, and lives with builds at any rate are in `starvation_rates`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from tests.bench.guard import ROOT, Row, median
from tests.bench.guard.builds import GAIN, STARVED, Traffic
from tests.bench.guard.starvation_rates import rate_rows

NAME = "starvation"
TAKES = "20 minutes on one core (of the worlds with given rates 12 lives at most)"
TEST_LIVES = 2

MOST_LIVES = 12
CASES = ((40, 1, 1_000), (600, 1, 600), (3_000, 1, 800), (600, 12, 2_500), (3_000, 12, 2_500))
"""Tokens of a request, kinds, and the median requests until a first promotion that are allowed."""

OFFERED = ((40, 1), (3_000, 1), (600, 12))
"""Tokens of a request, and kinds."""
EVERY = (1, 30, 300)
"""Held-out requests between two builds: more builds than requests, some during each test, some tests for each build."""
LIVES_FILE = ROOT / "build" / "bench" / "starvation.jsonl"
"""The lives with builds at any rate that are over."""


class Offered(Traffic):
    """The same, with a build every so many requests, whatever the learner's own rule says of how many tokens are
    enough for another one: builds that are faster, or slower, than any traffic and any learner make them.

    every: requests between two builds; None: there is no second one.
    """

    def __init__(self, rng: np.random.Generator, tokens: int, kinds: int, every: int | None) -> None:
        super().__init__(rng, tokens, kinds)
        self._every, self._due = every, 0

    def _build(self) -> None:
        if self._known < self._next or (self._made and (self._every is None or self._judged < self._due)):
            return
        self._propose()
        self._due = self._judged + (self._every or 0)


def offered(lives: int, seed: int, tokens: int, kinds: int, every: int | None) -> list[Offered]:
    """Lives until a first promotion, with the same requests whatever `every` is."""
    result = []
    for life in range(lives):
        traffic = Offered(np.random.default_rng([seed, tokens, kinds, life]), tokens, kinds, every)
        traffic.run(20_000)
        result.append(traffic)
    return result


def lives_of(lives: int, seed: int, tokens: int, kinds: int, requests: int, **more: bool) -> list[Traffic]:
    result = []
    for life in range(lives):
        traffic = Traffic(np.random.default_rng([seed, tokens, kinds, life]), tokens, kinds)
        traffic.run(requests, **more)
        result.append(traffic)
    return result


def first(traffic: Traffic) -> float:
    """The request of the first promotion; inf where there is none."""
    return float(min(traffic.promoted.values(), default=math.inf))


def useless_first(lives: int, seed: int) -> list[float]:
    """Units of the test that ends, where the first build gains nothing and a newer one waits, until it does."""
    result = []
    for life in range(lives):
        traffic = Traffic(np.random.default_rng([seed, 7, life]), 600, 1, (0.0, GAIN))
        traffic.run(8_000)
        dropped = [event for event in traffic.profiles.events.newest_first() if event["decision"] == "drop"]
        ended = [event["evidence"]["units"] for event in dropped if event["reason"] == "unproven"]
        result.append(float(ended[-1]) if ended and traffic.promoted else math.inf)
    return result


def rows(lives: int, seed: int) -> Iterator[Row]:
    few = min(lives, MOST_LIVES)
    for tokens, kinds, allowed in CASES:
        result = lives_of(few, seed, tokens, kinds, 20_000)
        middle = median([first(traffic) for traffic in result])
        count, builds = sum(bool(traffic.promoted) for traffic in result), median([float(t.builds) for t in result])
        plural = "s" if kinds > 1 else ""
        yield Row(
            f"gain 0.08, requests of {tokens} tokens, {kinds} kind{plural}: promoted",
            f"{count} of {few}, after {middle:.0f} requests in the median, {builds:.0f} builds",
            f"all, median <= {allowed}",
            count == few and middle <= allowed,
        )
    for tokens, kinds in OFFERED:
        never = [first(traffic) for traffic in offered(few, seed, tokens, kinds, None)]
        limit = STARVED * median(never)
        for every in EVERY:
            result = offered(few, seed, tokens, kinds, every)
            later = [first(traffic) - alone for traffic, alone in zip(result, never, strict=True)]
            builds = median([float(traffic.builds) for traffic in result])
            plural = "s" if kinds > 1 else ""
            yield Row(
                f"gain 0.08, requests of {tokens} tokens, {kinds} kind{plural}, a build every {every} held-out "
                "requests: promoted later than without a second build",
                f"by at most {max(later):.0f} requests, {builds:.0f} builds in the median; median {median(never):.0f}",
                f"<= 3 times the median, which is {limit:.0f}",
                max(later) <= limit - median(never),
            )
    ended = useless_first(few, seed)
    yield Row(
        "the first build gains nothing, the later ones 0.08: held-out requests until the first one is given up",
        f"{median(ended):.0f}; at most {max(ended):.0f}",
        "<= 500, and a later one is promoted",
        max(ended) <= 500.0,
    )
    # So few lives as tests have are not worth a file.
    yield from rate_rows(lives, seed, LIVES_FILE if lives > MOST_LIVES else None)
