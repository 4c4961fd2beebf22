"""Builds of an adapter that follow each other while one is tested: is a good one ever promoted?

The learner makes a build whenever twice as many tokens are known as at the last one (four times, while a build is under
test, and never more than 500,000 tokens later). With long answers that is sooner than a proof takes: a rule that tests
the newest build, and ends the test that runs, never comes to an end.

Every build gains the same of the total variation, 0.08 in the mean of a unit, in all kinds. Units pass the whole judge
(`ProfileManager.update`). 30 % of the requests are held out, as by default.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from tests.bench.guard import Row, median
from tests.bench.guard.adapters import RECORD, distances
from tests.bench.guard.traffic import draw_clients, normal
from tests.support.adapters import adapter
from tests.support.evidence import evidence
from tests.support.profile_bench import FRACTION, JUDGED, Bench

from hemostat.config.schema import Adapter
from hemostat.ipc.messages import REST_KIND
from hemostat_calibration.profiles.adapter import ADAPTER
from hemostat_calibration.profiles.profile import IDENTITY

NAME = "starvation"
TAKES = "8 minutes on one core (12 lives at most)"
TEST_LIVES = 2

MOST_LIVES = 12
GAIN = 0.08
GROWTH = 2.0
"""`adapters.live.client` makes the next build from so many times as many tokens."""
CASES = ((40, 1, 1_000), (600, 1, 600), (3_000, 1, 800), (600, 12, 2_500), (3_000, 12, 2_500))
"""Tokens of a request, kinds, and the median requests until a first promotion that are allowed."""

OFFERED = ((40, 1), (3_000, 1), (600, 12))
"""Tokens of a request, and kinds."""
EVERY = (1, 30, 300)
"""Held-out requests between two builds: more builds than requests, some during each test, some tests for each build."""
STARVED = 3.0
"""A build that would be promoted is starved if it takes so many times the median time of one that is never
replaced."""


class Traffic:
    """One life: requests, the builds that they lead to, and what is tested and promoted."""

    def __init__(self, rng: np.random.Generator, tokens: int, kinds: int, gains: tuple[float, ...] = (GAIN,)) -> None:
        """kinds: the n-th has a share in proportion to 1/n. gains: of the first builds, the last one of all others."""
        self.bench = Bench(adapter=Adapter())
        self.profiles = self.bench.profiles
        self._rng, self._tokens, self._gains = rng, tokens, gains
        shares = 1.0 / np.arange(1.0, kinds + 1.0)
        self._shares = shares / shares.sum()
        self.kinds = [f"kind {n}" for n in range(kinds)] if kinds > 1 else [REST_KIND]
        self._known, self._next, self._made, self._judged = 0, Adapter().min_tokens, 0, 0
        self._gain_of: dict[str, float] = {}
        self.promoted: dict[str, int] = {}
        """By kind, the request of the first promotion."""

    def run(self, requests: int, *, every_kind: bool = False) -> None:
        """Until a first kind is served, or all are, and at most so many requests."""
        n_kinds = len(self.kinds)
        kinds = self._rng.choice(n_kinds, requests, p=self._shares).tolist()
        clients, held_out = draw_clients(self._rng, requests), self._rng.random(requests) < FRACTION
        noise, divergence = normal(self._rng, 0.0, requests), self._rng.normal(0.4, 0.1, requests)
        for n in range(requests):
            self._request(n, self.kinds[kinds[n]], clients[n], bool(held_out[n]), noise[n], divergence[n])
            if len(self.promoted) >= (n_kinds if every_kind else 1):
                return

    def _request(self, n: int, kind: str, client: bytes, held_out: bool, noise: float, divergence: float) -> None:
        self.bench.time += 1.0
        kind = self.profiles.kinds.update(kind)
        if not held_out:
            place = kind if kind in self.profiles.serving.kinds else REST_KIND
            self.profiles.trials.update_dependence(place, client, np.full(2, divergence), self.bench.time)
            self._known += self._tokens
            self._build()
            return
        record = replace(RECORD, prompt_key=JUDGED[self._judged], client=client, kind=kind)
        self._judged += 1
        versions = self.profiles.distance_versions(record)
        gains = {version: noise + self._gain_of[version] if version != IDENTITY else 0.0 for version in versions}
        measured = {
            version: distances(min(max(0.5 - gain, 0.0), 1.0), 0.5 if gain else 1.0) for version, gain in gains.items()
        }
        record = replace(record, distances=measured)
        self.profiles.update(evidence(record, divergences=np.full(2, divergence)))
        for name, state in self.profiles.serving.kinds.items():
            if state.version is not None:
                self.promoted.setdefault(name, n + 1)

    def _build(self) -> None:
        proposals = self.profiles.proposals
        if self._known < self._next or not proposals.accepts(ADAPTER, self._known):
            return
        made = adapter(self._made, tokens=self._known)
        self._gain_of[made.version] = self._gains[min(self._made, len(self._gains) - 1)]
        self._made += 1
        assert proposals.propose(made, "", {"tokens": self._known})
        self._next = int(GROWTH * self._known)

    @property
    def builds(self) -> int:
        return self._made


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
        made = adapter(self._made, tokens=self._known)
        self._gain_of[made.version] = GAIN
        self._made += 1
        self.bench.profiles.proposals.propose(made, "", {"tokens": self._known})
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
    lives = min(lives, MOST_LIVES)
    for tokens, kinds, allowed in CASES:
        result = lives_of(lives, seed, tokens, kinds, 20_000)
        middle = median([first(traffic) for traffic in result])
        count, builds = sum(bool(traffic.promoted) for traffic in result), median([float(t.builds) for t in result])
        plural = "s" if kinds > 1 else ""
        yield Row(
            f"gain 0.08, requests of {tokens} tokens, {kinds} kind{plural}: promoted",
            f"{count} of {lives}, after {middle:.0f} requests in the median, {builds:.0f} builds",
            f"all, median <= {allowed}",
            count == lives and middle <= allowed,
        )
    for tokens, kinds in OFFERED:
        never = [first(traffic) for traffic in offered(lives, seed, tokens, kinds, None)]
        limit = STARVED * median(never)
        for every in EVERY:
            result = offered(lives, seed, tokens, kinds, every)
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
    ended = useless_first(lives, seed)
    yield Row(
        "the first build gains nothing, the later ones 0.08: held-out requests until the first one is given up",
        f"{median(ended):.0f}; at most {max(ended):.0f}",
        "<= 500, and a later one is promoted",
        max(ended) <= 500.0,
    )
