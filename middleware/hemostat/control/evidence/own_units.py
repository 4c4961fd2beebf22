"""Units that the leader has counted itself, until the store has the states that they went into.

Where another replica comes to lead (the store did not answer for longer than the lease), that one goes on from what the
store has: the units that are missing there are sent to it like those of any follower.
"""

from __future__ import annotations

from collections import deque

from hemostat.control.evidence.outbox import MAX_BYTES, MAX_UNITS, next_batch
from hemostat.control.evidence.positions import Positions
from hemostat.store.protocol import StreamEntry


class OwnUnits:
    """name: of this process. positions: advanced with each unit."""

    def __init__(self, name: str, positions: Positions) -> None:
        self._name = name
        self._taken = 0
        """How often units were taken. Each time numbers begin at 1 again, under another name: those that were taken are
        counted later than what this replica counts where it leads again."""
        self._positions = positions
        self._units: deque[bytes] = deque()
        self._bytes = 0
        self._last = 0
        """Number of the newest unit."""

    @property
    def _sender(self) -> str:
        return f"{self._name} {self._taken}"

    def count(self, unit: bytes) -> None:
        """The leader is about to count a unit of its own, here encoded. Beyond what an outbox may hold the oldest is
        dropped."""
        self._last += 1
        self._positions.advance(self._sender, self._last)
        self._units.append(unit)
        self._bytes += len(unit)
        while len(self._units) > MAX_UNITS or self._bytes > MAX_BYTES:
            self._drop_oldest()

    def forget(self, persisted: Positions) -> None:
        """Those that the store's states have in them."""
        while self._units and self._last - len(self._units) < persisted.last(self._sender):
            self._drop_oldest()

    def take(self) -> list[StreamEntry]:
        """Remove all, as batches to be sent."""
        batches = []
        while self._units:
            batches.append(next_batch(self._sender, self._last - len(self._units) + 1, self._units))
        self._bytes = self._last = 0
        self._taken += 1
        return batches

    def _drop_oldest(self) -> None:
        self._bytes -= len(self._units.popleft())
