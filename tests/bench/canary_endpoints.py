"""Measures what canaries say of simulated endpoints that are known by their API alone:
`python -m tests.bench.canary_endpoints --endpoints 200`. It needs no server. The judgement is made by the code that
serves: `hemostat_calibration.canary_endpoint`.

A prompt has a distribution over 30 tokens, of which an answer lists 20. Log-probabilities differ from answer to answer
by noise with heavy tails (Student's t, 3 degrees of freedom). Each answer comes from one of one to four kinds of
engines, whose offsets differ by 0.01 to 0.03 nats a token. At some endpoints a few answers of a hundred are of
another kind, farther away by far: as many when the set is taken as later.

A vendor may have habits: it caches answers for some hours, rounds log-probabilities, or answers some requests with
another version of the model.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hemostat_calibration.arrays import Floats
from hemostat_calibration.canary_endpoint import (
    PASSES,
    EndpointSet,
    EndpointVerdict,
    FirstToken,
    is_suspicious,
    judge_endpoint,
    take_endpoint,
)

PROMPTS, TOKENS, LISTED = 50, 30, 20
NAMES = tuple(f"t{n}" for n in range(TOKENS))


@dataclass
class Vendor:
    """A simulated endpoint. Fields may be set at any time.

    share: of the answers that come from the other version, which differs by `nats` a token in the mean.
    cached_hours: the time for which an answer is repeated; 0: none is. decimals: of rounded values; None: not rounded.
    """

    rng: np.random.Generator
    prompts: int = PROMPTS
    nats: float = 0.5
    share: float = 0.0
    cached_hours: float = 0.0
    decimals: int | None = None
    deviant: float = 0.0
    """The share of answers that are of another kind, whatever the version."""
    noise: float | None = None
    hour: float = 0.0
    _cache: dict[int, tuple[float, FirstToken]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rng, size = self.rng, (self.prompts, TOKENS)
        self.noise = rng.uniform(0.0, 0.03) if self.noise is None else self.noise
        self.logits = 2.0 * rng.standard_normal(size)
        kinds = int(rng.integers(1, 5))
        self.kinds = rng.normal(0.0, np.sqrt(np.pi / 2.0), (kinds, *size)) * rng.uniform(0.01, 0.03) / np.sqrt(2.0)
        self.other = rng.normal(0.0, np.sqrt(np.pi / 2.0), size)
        self.strange = 0.3 * rng.standard_normal(size)

    def answer(self, prompt: int) -> FirstToken:
        at, kept = self._cache.get(prompt, (-np.inf, None))
        if kept is not None and self.hour - at < self.cached_hours:
            return kept
        made = self._made(prompt)
        self._cache[prompt] = self.hour, made
        return made

    def _made(self, prompt: int) -> FirstToken:
        rng = self.rng
        logits = self.logits[prompt] + self.kinds[rng.integers(len(self.kinds)), prompt]
        logits = logits + rng.standard_t(3, TOKENS) * (self.noise or 0.0) / np.sqrt(3.0)
        if rng.random() < self.share:
            logits = logits + self.nats * self.other[prompt]
        if rng.random() < self.deviant:
            logits = logits + self.strange[prompt]
        values: Floats = logits - np.log(np.exp(logits).sum())
        token = NAMES[int((values + rng.gumbel(size=TOKENS)).argmax())]
        shown = values if self.decimals is None else values.round(self.decimals)
        best = np.argsort(-values)[:LISTED].tolist()
        return FirstToken(token, {NAMES[n]: float(shown[n]) for n in best})

    def passes(self, count: int) -> list[list[FirstToken]]:
        return [[self.answer(prompt) for prompt in range(self.prompts)] for _ in range(count)]

    def take(self) -> EndpointSet:
        names = tuple(f"prompt {n}" for n in range(self.prompts))
        return take_endpoint(names, self.passes(PASSES), "simulated", listed=LISTED)

    def judged(self, taken: EndpointSet) -> EndpointVerdict:
        made: Sequence[Sequence[FirstToken]] = self.passes(2)
        if is_suspicious(taken, made):
            made = [*made, *self.passes(PASSES)]
        return judge_endpoint(taken, made)


def healthy(endpoints: int, replays: int, seed: int = 0) -> Iterator[EndpointVerdict]:
    """Yields the verdicts on endpoints that do not change: a third of them with a few answers of another kind."""
    for n in range(endpoints):
        rng = np.random.default_rng((seed, n))
        vendor = Vendor(rng, deviant=0.0 if n % 3 else float(rng.uniform(0.005, 0.05)))
        taken = vendor.take()
        for _ in range(replays):
            vendor.hour += 1.0
            yield vendor.judged(taken)


HABITS: dict[str, dict[str, Any]] = {
    "none": {},
    "caches for a day": {"cached_hours": 24.0},
    "caches for ever": {"cached_hours": np.inf},
    "rounds to 4 decimals": {"decimals": 4},
    "rounds to 1 decimal": {"decimals": 1},
    "half of the answers from another version": {"share": 0.5},
    "a tenth of the answers from another version": {"share": 0.1},
}


def verdicts(habit: str, endpoints: int, nats: float = 0.0, seed: int = 1) -> Iterator[tuple[EndpointVerdict, Vendor]]:
    """Yields the verdicts on vendors with a habit, two days after the set was taken. nats: the mean difference of all
    log-probabilities then; 0.0: nothing has changed."""
    for n in range(endpoints):
        vendor = Vendor(np.random.default_rng((seed, n)), **HABITS[habit])
        taken = vendor.take()
        vendor.hour += 48.0
        if nats:
            changed = nats * np.random.default_rng((seed, n, 1)).normal(0.0, np.sqrt(np.pi / 2.0), vendor.logits.shape)
            vendor.logits = vendor.logits + changed
        yield vendor.judged(taken), vendor


def main() -> None:
    parser = argparse.ArgumentParser(description="what canaries say of endpoints that are known by their API alone")
    parser.add_argument("--endpoints", type=int, default=0, help="endpoints with each habit")
    parser.add_argument("--healthy", type=int, default=0, help="endpoints that do not change, 100 replays each")
    parser.add_argument("--seed", type=int, default=0, help="another seed, for pieces of a longer run")
    arguments = parser.parse_args()
    if arguments.healthy:
        counts = Counter(verdict.outcome.value for verdict in healthy(arguments.healthy, 100, arguments.seed))
        sys.stdout.write(json.dumps({"endpoints": arguments.healthy, **counts}) + "\n")
    for habit in HABITS if arguments.endpoints else ():
        for nats in (0.0, 0.03, 0.05, 0.1, 0.5):
            found = [verdict for verdict, _ in verdicts(habit, arguments.endpoints, nats, arguments.seed + 1)]
            row = {"habit": habit, "nats": nats, **Counter(verdict.outcome.value for verdict in found)}
            row["named"] = sum(bool(verdict.reasons) for verdict in found)
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
