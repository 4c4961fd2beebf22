"""How much counters have grown lately."""

from __future__ import annotations

import math
from collections import deque

from hemostat.admin.proxy_status import requests_by_outcome
from hemostat.ipc.ends import FAILED
from hemostat.ipc.messages import Stats
from hemostat.metrics import names
from hemostat.metrics.reasons import Outcome, Unscored

MINUTE_SECONDS = 60.0
LOST_SECONDS = 900.0
"""How long something that was lost, or not stored, counts: as long as in the alerts."""


class Growth:
    """How much a counter has grown within the last `seconds`. It starts at 0.

    >>> growth = Growth(60.0)
    >>> [growth.look(now, value) for now, value in ((0.0, 2.0), (50.0, 5.0), (70.0, 5.0), (120.0, 5.0))]
    [2.0, 5.0, 3.0, 0.0]
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._changes: deque[tuple[float, float]] = deque([(-math.inf, 0.0)])
        """When it got which value. The first one is its value when the time begins."""

    def look(self, now: float, value: float) -> float:
        """The growth up to now. now: monotonic seconds."""
        changes = self._changes
        if value != changes[-1][1]:
            changes.append((now, value))
        while len(changes) > 1 and changes[1][0] <= now - self._seconds:
            changes.popleft()
        return max(0.0, value - changes[0][1])

    def restart(self, value: float) -> None:
        """What it has grown up to this value does not count."""
        self._changes = deque([(-math.inf, value)])


class RelayGrowth:
    """What relays have counted lately. One that connects has counted before, unseen: nothing before then counts."""

    def __init__(self) -> None:
        self._relays = 0
        self._requests, self._failed = Growth(MINUTE_SECONDS), Growth(MINUTE_SECONDS)
        self._captured, self._lost = Growth(LOST_SECONDS), Growth(LOST_SECONDS)
        self.requests = 0.0
        """In the last minute."""
        self.failed = 0.0
        """Of them, those that the upstream answered with a server error, or not at all."""
        self.captured = 0.0
        """Requests in the last LOST_SECONDS that were captured in a relay."""
        self.lost = 0.0
        """Of them, those that did not reach the control process."""

    def look(self, now: float, relays: int, total: Stats) -> None:
        """Update the figures. relays: how many have reported. total: of all relays, since they started."""
        by_outcome = requests_by_outcome(total)
        shadow = total.counters.get(names.SHADOW_REQUESTS, {})
        lost = shadow.get(Unscored.LINK_FULL.labels, 0.0)
        counters = (
            (self._requests, float(sum(by_outcome.values()))),
            (self._failed, float(sum(by_outcome.get(outcome, 0) for outcome in FAILED))),
            (self._captured, shadow.get((Outcome.SHADOWED.value, ""), 0.0) + lost),
            (self._lost, lost),
        )
        if relays > self._relays:
            for growth, value in counters:
                growth.restart(value)
        self._relays = relays
        self.requests, self.failed, self.captured, self.lost = (growth.look(now, value) for growth, value in counters)

    @property
    def failed_ratio(self) -> float:
        return self.failed / self.requests if self.requests else 0.0

    @property
    def lost_ratio(self) -> float:
        return self.lost / self.captured if self.captured else 0.0
