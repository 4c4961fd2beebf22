"""The mix of kinds: is it still what it was? Information about the traffic, never an alarm.

Counts of requests by kind: of a baseline, then of one window after the other, each of `size` requests or more that span
a `cycle` of the traffic, so that a night is not compared with a day. The evidence against "one and the same mix" is
universal inference (Wasserman, Ramdas & Balakrishnan, 2020): the probability of both counts under two Dirichlet(1/2)
mixtures, divided by the largest that one common mix gives them. Its expected value is at most 1 under that hypothesis,
given the baseline's kinds, so it reaches 1/α in a window with a probability of at most α, for requests whose kinds are
drawn independently of each other, with probabilities that may follow the cycle. A batch of requests of one kind is not
counted as fewer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from hemostat_calibration.elapsed import TimeBreak, span_begins

OTHER = ""
"""The name that stands for all kinds that the baseline has not seen."""


@dataclass(frozen=True, slots=True, eq=False)
class Workload:
    """The counts of requests by kind: the baseline, and windows after it.

    size: the least number of requests in the baseline and in each window. cycle: the least time in seconds that each of
    them spans. baseline, window: requests by kind. previous: the last complete window. windows: the number of windows
    begun so far. since: the time of the first request in what is being counted. last: the time of the last one, in
    seconds.

    >>> mix = Workload(size=40)
    >>> for kind in ["a", "b"] * 20 + ["b"] * 41:
    ...     mix = mix.update(kind)
    >>> mix.distance, mix.changed(0.01)
    (0.5, True)
    """

    size: int
    cycle: float = 0.0
    baseline: Mapping[str, int] = field(default_factory=dict)
    window: Mapping[str, int] = field(default_factory=dict)
    previous: Mapping[str, int] = field(default_factory=dict)
    windows: int = 0
    since: float = 0.0
    last: float = 0.0

    @property
    def complete(self) -> bool:
        """It is True if the baseline is complete."""
        return self.windows > 0 or self._is_whole(self.baseline)

    def update(self, kind: str, now: float = 0.0) -> Workload:
        """Returns the state with one more request. now: seconds, of any clock that does not go back."""
        if not self.complete:
            since = span_begins(self.since, self.last, now) if self.baseline else now
            return replace(self, baseline=_plus(self.baseline, kind), since=since, last=now)
        kind = kind if kind in self.baseline else OTHER
        if self.windows and not self._is_whole(self.window):
            since = span_begins(self.since, self.last, now)
            return replace(self, window=_plus(self.window, kind), since=since, last=now)
        return replace(self, previous=self.window, window={kind: 1}, windows=self.windows + 1, since=now, last=now)

    def after_break(self, time_break: TimeBreak) -> Workload:
        """Returns the same after the time was set: what is being counted spans the same time if that is a cycle, and
        otherwise the break says from when on it counts."""
        since = time_break.begins(self.since, ended=self.last - self.since >= self.cycle)
        return replace(self, since=since, last=max(time_break.seen(self.last), since))

    def _is_whole(self, counts: Mapping[str, int]) -> bool:
        """Returns True if what is being counted has enough requests and spans a cycle."""
        return sum(counts.values()) >= self.size and self.last - self.since >= self.cycle

    def share(self, kind: str) -> float:
        """Returns the kind's share of the requests in the baseline; 0 before it is complete."""
        return self.baseline.get(kind, 0) / max(sum(self.baseline.values()), 1) if self.complete else 0.0

    @property
    def _judged(self) -> Mapping[str, int]:
        """The last window that is complete."""
        return self.window if self.windows and self._is_whole(self.window) else self.previous

    @property
    def distance(self) -> float | None:
        """The total variation between the mix of the baseline and the mix of the last complete window; None before
        there is one.
        """
        counts, total = self._judged, sum(self._judged.values())
        if not total:
            return None
        kinds = self.baseline.keys() | counts.keys()
        return sum(abs(self.share(kind) - counts.get(kind, 0) / total) for kind in kinds) / 2

    def changed(self, alpha: float) -> bool:
        """Returns True if it is proven that the mix of the last complete window is another one. It is wrong for at most
        the part alpha of the windows.
        """
        return self._log_evidence(self._judged) >= -math.log(alpha)

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
    """Returns ln of the probability of a sequence with these counts under Dirichlet(1/2, …) over `kinds`."""
    terms = sum(math.lgamma(counts.get(kind, 0) + 0.5) - math.lgamma(0.5) for kind in kinds)
    return terms + math.lgamma(len(kinds) / 2) - math.lgamma(sum(counts.values()) + len(kinds) / 2)
