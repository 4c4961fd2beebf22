"""The mix of kinds: is it still what it was? Information about the traffic, never an alarm.

Counts of requests by kind: of a baseline, then of the window since. The evidence against "one and the same mix" is
universal inference (Wasserman, Ramdas & Balakrishnan, 2020): the probability of both counts under two Dirichlet(1/2)
mixtures, divided by the largest that one common mix gives them. Its expected value is at most 1 at every time under
that hypothesis, for independent requests and given the baseline's kinds, so by Ville's inequality it reaches 1/α within
a window with a probability of at most α.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

OTHER = ""
"""Stands for all kinds that the baseline has not seen."""


@dataclass(frozen=True, slots=True, eq=False)
class Workload:
    """size: requests of the baseline and of each window. baseline, window: requests by kind. windows: begun so far.
    previous: the last complete window.

    >>> mix = Workload(size=40)
    >>> for kind in ["a", "b"] * 20 + ["b"] * 30:
    ...     mix = mix.update(kind)
    >>> mix.distance, mix.log_evidence > 2.0
    (0.5, True)
    """

    size: int
    baseline: Mapping[str, int] = field(default_factory=dict)
    window: Mapping[str, int] = field(default_factory=dict)
    previous: Mapping[str, int] = field(default_factory=dict)
    windows: int = 0

    @property
    def complete(self) -> bool:
        """Whether the baseline is."""
        return sum(self.baseline.values()) >= self.size

    def update(self, kind: str) -> Workload:
        """Add one request."""
        if not self.complete:
            return replace(self, baseline=_plus(self.baseline, kind))
        kind = kind if kind in self.baseline else OTHER
        if self.windows and sum(self.window.values()) < self.size:
            return replace(self, window=_plus(self.window, kind))
        return replace(self, previous=self.window, window={kind: 1}, windows=self.windows + 1)

    def share(self, kind: str) -> float:
        """Of the requests of the baseline; 0 before it is complete."""
        return self.baseline.get(kind, 0) / self.size if self.complete else 0.0

    @property
    def distance(self) -> float | None:
        """Total variation between the mix of the baseline and that of the window, the previous one while this one is
        less than half full; None before there is one."""
        counts = self.window if sum(self.window.values()) >= self.size / 2 or not self.previous else self.previous
        total = sum(counts.values())
        if not self.complete or not total:
            return None
        kinds = self.baseline.keys() | counts.keys()
        return sum(abs(self.share(kind) - counts.get(kind, 0) / total) for kind in kinds) / 2

    @property
    def log_evidence(self) -> float:
        """ln of the evidence of this window that the mix is another one."""
        return self._log_evidence(self.window)

    def changed(self, alpha: float) -> bool:
        """Whether the mix of this window, or of the last one, is proven to be another; wrong for a part of at most
        alpha of the windows."""
        return any(self._log_evidence(counts) >= -math.log(alpha) for counts in (self.window, self.previous))

    def _log_evidence(self, window: Mapping[str, int]) -> float:
        if not self.complete or not window:
            return 0.0
        kinds = [*self.baseline, OTHER]
        both = {kind: self.baseline.get(kind, 0) + window.get(kind, 0) for kind in kinds}
        total = sum(both.values())
        largest = sum(count * math.log(count / total) for count in both.values() if count)
        return _log_mixture(self.baseline, kinds) + _log_mixture(window, kinds) - largest


def _plus(counts: Mapping[str, int], kind: str) -> dict[str, int]:
    return {**counts, kind: counts.get(kind, 0) + 1}


def _log_mixture(counts: Mapping[str, int], kinds: list[str]) -> float:
    """ln of the probability of a sequence with these counts under Dirichlet(1/2, …) over `kinds`."""
    terms = sum(math.lgamma(counts.get(kind, 0) + 0.5) - math.lgamma(0.5) for kind in kinds)
    return terms + math.lgamma(len(kinds) / 2) - math.lgamma(sum(counts.values()) + len(kinds) / 2)
