"""The recent growth of counters."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Self

import msgspec

from hemostat.admin.proxy_status import RecentRequests, quantile, requests_by_outcome
from hemostat.ipc.ends import FAILED, OK
from hemostat.ipc.messages import OVERHEAD_BUCKETS, Stats
from hemostat.metrics import names
from hemostat.metrics.reasons import Outcome, Unscored
from hemostat.openai.routes import CHAT, COMPLETIONS

MINUTE_SECONDS = 60.0
OVERHEAD_SECONDS = 300.0
"""The time for which the overhead of a request counts: as long as in the alert."""
LOST_SECONDS = 900.0
"""The time for which something that was lost, or not stored, counts: as long as in the alerts."""
LONG_SECONDS = 1800.0
"""The time for which rare things count, such as a rollback: as long as in the alerts."""
MAX_CHANGES = 120
"""The number of values of a counter, about, that are remembered, however often it grows."""


class Growth:
    """The growth of a counter within the last `seconds`. The counter starts at 0.

    >>> growth = Growth(60.0)
    >>> [growth.update(now, value).get() for now, value in ((0.0, 2.0), (50.0, 5.0), (70.0, 5.0), (120.0, 5.0))]
    [2.0, 5.0, 3.0, 0.0]
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._changes: deque[tuple[float, float]] = deque([(-math.inf, 0.0)])
        """The times at which the counter changed, with its new values. The first entry is its value when the window
        begins.
        """

    def update(self, now: float, value: float) -> Self:
        """Takes the counter's present value. now: monotonic seconds."""
        changes = self._changes
        if value != changes[-1][1]:
            if now - changes[-1][0] < self._seconds / MAX_CHANGES:
                changes[-1] = changes[-1][0], value
            else:
                changes.append((now, value))
        while len(changes) > 1 and changes[1][0] <= now - self._seconds:
            changes.popleft()
        return self

    def get(self) -> float:
        """Returns the growth up to the last update."""
        return max(0.0, self._changes[-1][1] - self._changes[0][1])

    def restart(self, value: float) -> None:
        """Leaves out of the growth all that the counter has grown up to this value."""
        self._changes = deque([(-math.inf, value)])


class RelayFigures(msgspec.Struct, frozen=True):
    """The recent growth of the counters of all relays."""

    requests: float = 0.0
    """The number of requests in the last minute."""
    failed: float = 0.0
    """The part of them that the upstream answered with a server error, or not at all."""
    captured: float = 0.0
    """The number of requests in the last LOST_SECONDS that were captured in a relay."""
    lost: float = 0.0
    """The part of them that did not reach the control process."""
    dropped: float = 0.0
    """The number of sampled requests in the last LOST_SECONDS that relays dropped, for whatever reason."""
    answered: float = 0.0
    """The number of requests in the last LONG_SECONDS."""
    repeated: float = 0.0
    """The part of them that was sent to the engine a second time."""
    completions: float = 0.0
    """The number of complete answers of the routes that are scored, in the last LONG_SECONDS."""

    @property
    def failed_ratio(self) -> float:
        return self.failed / self.requests if self.requests else 0.0

    @property
    def lost_ratio(self) -> float:
        return self.lost / self.captured if self.captured else 0.0

    @property
    def repeated_ratio(self) -> float:
        return self.repeated / self.answered if self.answered else 0.0

    @property
    def minute(self) -> RecentRequests:
        return RecentRequests(MINUTE_SECONDS, int(self.requests), int(self.failed))


WINDOWS = {
    **dict.fromkeys(("requests", "failed"), MINUTE_SECONDS),
    **dict.fromkeys(("captured", "lost", "dropped"), LOST_SECONDS),
    **dict.fromkeys(("answered", "repeated", "completions"), LONG_SECONDS),
}
"""Each field of `RelayFigures` -> the time for which it counts, seconds."""


class RelayGrowth:
    """The recent growth of the relays' counters. A relay that connects has counted before, unseen: nothing before then
    counts.
    """

    def __init__(self) -> None:
        self._relays = 0
        self._growth = {name: Growth(seconds) for name, seconds in WINDOWS.items()}
        self._overhead = [Growth(OVERHEAD_SECONDS) for _ in range(len(OVERHEAD_BUCKETS) + 1)]
        self._counters: Mapping[str, float] = dict.fromkeys(WINDOWS, 0.0)
        """The values at the last update."""
        self.figures = RelayFigures()
        self.overhead: list[int] = []
        """The number of requests of the last OVERHEAD_SECONDS by bucket of their overhead: `OVERHEAD_BUCKETS`, and
        above."""

    def update(self, now: float, relays: int, total: Stats) -> None:
        """Takes the relays' present counters. relays: how many have reported. total: the counters of all relays, since
        they started."""
        self._counters = _counters(total)
        buckets = [*total.overhead_buckets, *[0] * (len(self._overhead) - len(total.overhead_buckets))]
        if relays > self._relays:
            self.restart(*WINDOWS)
            for growth, value in zip(self._overhead, buckets, strict=True):
                growth.restart(value)
        self._relays = relays
        grown = {name: self._growth[name].update(now, self._counters[name]).get() for name in WINDOWS}
        self.figures = RelayFigures(**grown)
        self.overhead = [
            int(growth.update(now, value).get()) for growth, value in zip(self._overhead, buckets, strict=True)
        ]

    def restart(self, *fields: str) -> None:
        """Counts these fields of `RelayFigures` from now on."""
        for name in fields:
            self._growth[name].restart(self._counters[name])
        self.figures = msgspec.structs.replace(self.figures, **dict.fromkeys(fields, 0.0))

    @property
    def overhead_p99(self) -> float | None:
        """The upper end of the bucket that holds the 99 % quantile, seconds; None without a request."""
        return quantile(self.overhead, 0.99)


def _counters(total: Stats) -> dict[str, float]:
    """Returns the counters of all relays that `RelayFigures` shows the growth of."""
    by_outcome = requests_by_outcome(total)
    requests = float(sum(by_outcome.values()))
    shadow = total.counters.get(names.SHADOW_REQUESTS, {})
    lost = shadow.get(Unscored.LINK_FULL.labels, 0.0)
    by_route = total.counters.get(names.REQUESTS, {})
    return {
        "requests": requests,
        "failed": float(sum(by_outcome.get(outcome, 0) for outcome in FAILED)),
        "captured": shadow.get((Outcome.SHADOWED.value, ""), 0.0) + lost,
        "lost": lost,
        "dropped": sum(value for (outcome, _), value in shadow.items() if outcome == Outcome.DROPPED),
        "answered": requests,
        "repeated": sum(total.counters.get(names.REPEATED_REQUESTS, {}).values()),
        "completions": sum(by_route.get((route, OK), 0.0) for route in (CHAT, COMPLETIONS)),
    }
