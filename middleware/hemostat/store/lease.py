"""Whether this replica is the leader."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

from hemostat.metrics import names
from hemostat.metrics.samples import Sample


class Lease:
    """Whether this replica leads, by its own monotonic clock; without a shared store it always does.

    is_last_leader: no other replica is known to have led since this one did. Such a replica goes on watching what
    serves, and may roll it back, also when its lease has expired because the store does not answer.
    """

    def __init__(self, *, shared: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until = -math.inf if shared else math.inf
        self.is_last_leader = not shared
        self.term = 0
        """Grows whenever another replica is found to have led."""
        self.on_lost: list[Callable[[], None]] = []
        """Called when this replica, which led last, finds that another one has led since."""

    @property
    def leads(self) -> bool:
        return self._clock() < self._until

    def samples(self) -> Iterator[Sample]:
        yield Sample(names.REPLICA_LEADS, (), float(self.leads))

    def grant(self, until: float) -> None:
        self._until, self.is_last_leader = until, True

    def lose(self) -> None:
        led_last = self.is_last_leader
        self._until, self.is_last_leader = -math.inf, False
        self.term += 1
        if led_last:
            for call in self.on_lost:
                call()
