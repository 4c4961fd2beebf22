"""The dependence of the requests of a group on each other: the variance inflation v̂ of the sums of its figures."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import numpy as np

from hemostat.metrics import names
from hemostat.metrics.samples import Sample
from hemostat_calibration.arrays import Floats
from hemostat_calibration.elapsed import TimeBreak, span_begins
from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.statistics.dependence import (
    MAX_CLIENTS,
    MIN_EFFECTIVE,
    BatchMeans,
    ClientBatches,
    client_row,
)

CARRIED_BY_FEW = "not enough effective requests: a few of them carry the sum"
"""The reason in place of an interval where the number of effective requests is known and a few requests have most of
the tokens; see `hemostat_calibration.statistics.confidence`."""
ALL = "all"
"""The name of all kinds of traffic together."""


@dataclass(frozen=True, slots=True)
class Cycle:
    """The cycle of the traffic, such as day and night. seconds: its length; 0: there is none. clock: returns
    seconds.
    """

    seconds: float = 0.0
    clock: Callable[[], float] = time.monotonic
    _users: WeakSet[Dependence] = field(default_factory=WeakSet, init=False, repr=False, compare=False)
    """The objects that count how much of the cycle was seen, and that are told of breaks."""

    def add(self, user: Dependence) -> None:
        """Adds an object that is told of breaks, too."""
        self._users.add(user)

    def after_break(self, time_break: TimeBreak) -> None:
        """Notes that the clock was set."""
        for user in self._users:
            user.after_break(time_break)


NO_CYCLE = Cycle()


@dataclass(frozen=True, slots=True, eq=False)
class DependenceState:
    """The state of `Dependence`: batches in time, and by client; of the first figure's mean by request; the rows of
    clients; and when its first and its last request came, seconds."""

    in_time: BatchMeans
    by_client: ClientBatches
    mean: BatchMeans
    clients: Mapping[bytes, int]
    first: float
    last: float

    def arrays(self) -> Iterator[Floats]:
        """Yields all arrays, whose shapes are fixed by the number of figures."""
        by_client = self.by_client
        yield from (self.in_time.open, self.in_time.sums, self.mean.open, self.mean.sums)
        yield from (by_client.count, by_client.total, by_client.open, by_client.batches, by_client.squares)


class Dependence:
    """The dependence of requests of one group in several figures: by batches in time, and by client for the first
    figure.

    series: the number of figures. `update` raises InvalidArgumentError for another number of them.
    """

    def __init__(self, series: int = 1, cycle: Cycle = NO_CYCLE) -> None:
        self._cycle = cycle
        self._first = self._last = cycle.clock()
        self._in_time = BatchMeans.of(series)
        self._by_client = ClientBatches.of(MAX_CLIENTS, 1)
        self._mean = BatchMeans.of(1)
        """The batch means of the first figure's mean by request, which `_by_client` is compared with."""
        self._clients: dict[bytes, int] = {}
        cycle.add(self)

    def after_break(self, time_break: TimeBreak) -> None:
        """Notes that the clock was set: a cycle that was not seen as a whole begins again, or goes on without the time
        that was lost."""
        self._first = time_break.begins(self._first, ended=self.whole)
        self._last = max(time_break.seen(self._last), self._first)

    def update(self, x: Floats, n: Floats, client: bytes = b"") -> None:
        """Adds one request now: x, n float64 [S], the sum of each figure over its tokens, and their number. client: its
        digest; where it is empty, the request counts in time only."""
        now = self._cycle.clock()
        self._first = span_begins(self._first, self._last, now) if self._in_time.units else now
        self._last = max(now, self._first)
        self._in_time = self._in_time.update(x, n)
        if client and n[0] > 0.0:
            mean = np.array([x[0] / n[0]])
            self._mean = self._mean.update(mean)
            self._by_client = self._by_client.update(np.array([client_row(self._clients, client)]), mean)

    @property
    def state(self) -> DependenceState:
        """Returns what is known, to be stored."""
        return DependenceState(self._in_time, self._by_client, self._mean, dict(self._clients), self._first, self._last)

    def restore(self, state: DependenceState) -> None:
        """Goes on from there. Raises InvalidArgumentError if it does not belong to as many figures, or is damaged."""
        fits = all(a.shape == b.shape for a, b in zip(state.arrays(), self.state.arrays(), strict=True))
        if not fits or not all(0 <= row < MAX_CLIENTS for row in state.clients.values()):
            raise InvalidArgumentError("the stored dependence of requests does not fit")
        self._in_time, self._by_client, self._mean = state.in_time, state.by_client, state.mean
        self._clients, self._first, self._last = dict(state.clients), state.first, state.last

    @property
    def whole(self) -> bool:
        """It is True if requests of a whole cycle were seen."""
        return self._last - self._first >= self._cycle.seconds

    def inflations_seen(self) -> Floats:
        """Returns v̂ of each figure, float64 [S], 1 or more, in traffic like in the hours seen, which are less than a
        cycle if `whole` is False. It is infinite if it is not known: there are too few requests, or such dependent ones
        that too few effective ones are left.
        """
        result = np.maximum(self._in_time.inflation(), self._by_client.inflation(self._mean.variance))
        unknown = ~self._in_time.enough() | (self._in_time.units < MIN_EFFECTIVE * result)
        return np.where(unknown, np.inf, result)

    def inflations(self) -> Floats:
        """Returns v̂ of each figure as `inflations_seen` does, and infinite before a whole cycle was seen."""
        result = self.inflations_seen()
        return result if self.whole else np.full_like(result, np.inf)

    def inflation(self, series: int = 0) -> float:
        """Returns v̂ of one figure; infinite before a whole cycle was seen."""
        return float(self.inflations()[series])


def told(requests: int, inflation: float) -> dict[str, Any]:
    """Returns for JSON `inflation` (v̂) and `effective_requests` (requests / v̂); None if v̂ is not known."""
    known = math.isfinite(inflation)
    return {
        "inflation": inflation if known else None,
        "effective_requests": requests / inflation if known else None,
    }


def told_of_mean(requests: int, inflation: float, *, carried_by_few: bool) -> dict[str, Any]:
    """Returns what `told` returns, for a mean per token, and `no_interval`: the reason why it has no interval although
    v̂ is known, or None. carried_by_few: True if a few requests carry the sum."""
    return told(requests, inflation) | {"no_interval": CARRIED_BY_FEW if carried_by_few else None}


def inflation_samples(kind: str, figure: str, requests: int, inflation: float) -> Iterator[Sample]:
    """Yields v̂ and the number of effective requests as metrics. If v̂ is not known, it yields 0 of these and no v̂."""
    known = math.isfinite(inflation)
    yield Sample(names.EFFECTIVE_REQUESTS, (kind, figure), requests / inflation if known else 0.0)
    if known:
        yield Sample(names.VARIANCE_INFLATION_RATIO, (kind, figure), inflation)
