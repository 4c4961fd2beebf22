"""A `Bench` whose held-out records bring the exact distances that judging adapters takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tests.support.adapters import adapted_record, adapter, distances_of
from tests.support.profile_bench import JUDGED, Bench
from tests.support.world import World

from hemostat.ipc.messages import REST_KIND
from hemostat.profiles.manager import ProfileManager
from hemostat_calibration.records import TokenRecord

WORLD = World(bias=1.0)


class Judging:
    """A `Bench` whose held-out records bring the exact distances that are asked for.

    shares: of the way from the compressed model to the reference, by version.
    """

    def __init__(self, shares: Mapping[str, float], bench: Bench | None = None, **calibration: Any) -> None:
        self.bench = bench or Bench(**calibration)
        self.profiles: ProfileManager = self.bench.profiles
        self.shares = dict(shares)
        self.asked: list[tuple[str, ...]] = []
        self._next = 0

    def record(self, number: int, key: bytes, **more: Any) -> TokenRecord:
        truth, serving = WORLD.truth(number), self.profiles.serving.version
        if more.pop("treated", False) and serving is not None and serving in self.shares:
            record = adapted_record(truth, serving, self.shares[serving], prompt_key=key, **more)
        else:
            record = self.bench.record(truth, key, **more)
        versions = self.profiles.distance_versions(record)
        self.asked.append(versions)
        known = {version: share for version, share in self.shares.items() if version in versions}
        return replace(record, distances=distances_of(truth, known)) if versions else record

    def feed(self, units: int, *, lost: bool = False, **more: Any) -> int:
        """Held-out records of new units until what serves changes, at most so many: how many. lost: their distances."""
        before = dict(self.profiles.serving.selected_by_kind)
        for fed in range(1, units + 1):
            key = JUDGED[self._next]
            record = self.record(self._next, key, client=b"%d" % (self._next % 9), **more)
            self._next += 1
            self.bench.time += 1.0
            self.bench.observe(replace(record, distances={}) if lost else record)
            if self.profiles.serving.selected_by_kind != before:
                return fed
        return units

    def evidence(self, version: str, kind: str = REST_KIND) -> Any:
        candidate = next(c for c in self.profiles.trials.tested if c.version == version)
        return self.profiles.trials.evidence(candidate, kind)

    def propose(self, seed: int, tokens: int, share: float) -> str:
        made = adapter(seed, tokens=tokens)
        self.shares[made.version] = share
        assert self.profiles.proposals.propose(made, f"from {tokens} tokens", {"tokens": tokens})
        return made.version
