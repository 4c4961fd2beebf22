"""Traffic that builds of an adapter are made of and tested in.

Every build gains the same of the total variation, 0.08 in the mean of a unit, in all kinds. Units pass the whole judge
(`ProfileManager.update`). 30 % of the requests are held out, as by default.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from tests.bench.guard.adapters import RECORD, distances
from tests.bench.guard.traffic import draw_clients, normal
from tests.support.adapters import adapter
from tests.support.evidence import evidence
from tests.support.profile_bench import FRACTION, JUDGED, Bench

from hemostat.config.schema import Adapter
from hemostat.ipc.messages import REST_KIND
from hemostat_calibration.profiles.adapter import ADAPTER
from hemostat_calibration.profiles.profile import IDENTITY

GAIN = 0.08
GROWTH = 2.0
"""`adapters.live.client` makes the next build from so many times as many tokens."""
STARVED = 3.0
"""A build that would be promoted is starved if it takes so many times the median time of one that is never
replaced."""


class Traffic:
    """One life: requests, the builds that they lead to, and what is tested and promoted."""

    def __init__(
        self,
        rng: np.random.Generator,
        tokens: int,
        kinds: int,
        gains: tuple[float, ...] = (GAIN,),
        *,
        cycle_hours: float = 0.0,
        seconds: float = 1.0,
    ) -> None:
        """kinds: the n-th has a share in proportion to 1/n. gains: of the first builds, the last one of all others.
        seconds: between two requests."""
        self.bench = Bench(adapter=Adapter(), cycle_hours=cycle_hours)
        self._seconds = seconds
        self.requests = 0
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
        self.bench.time += self._seconds
        self.requests = n + 1
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
        assert self._propose()
        self._next = int(GROWTH * self._known)

    def _propose(self) -> bool:
        """Makes a build, and returns True if it is accepted."""
        made = adapter(self._made, tokens=self._known)
        self._gain_of[made.version] = self._gains[min(self._made, len(self._gains) - 1)]
        self._made += 1
        return self.profiles.proposals.propose(made, "", {"tokens": self._known})

    @property
    def builds(self) -> int:
        return self._made
