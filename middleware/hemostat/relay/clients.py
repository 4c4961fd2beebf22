"""The connections of a relay's clients, and their limits."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Iterable, Iterator
from typing import Final, Generic, Protocol, TypeVar

from hemostat.metrics import names
from hemostat.relay.counters import Counters
from hemostat.relay.limits import Limits
from hemostat.relay.shares import Holding


class Evictable(Protocol):
    """A client's connection, as far as it is counted and closed here."""

    @property
    def transport(self) -> asyncio.Transport: ...

    @property
    def holding(self) -> Holding: ...

    @property
    def evictable(self) -> bool:
        """It is True if the connection waits for a complete request."""

    @property
    def since(self) -> float:
        """The event-loop time from which it has waited."""


Connection = TypeVar("Connection", bound=Evictable)

EVICTED_SHARE: Final = 16
"""One of so many connections is closed at a time, since looking for them takes a pass over all."""


class Clients(Generic[Connection]):
    """Owns which connections are open, and how many each address has.

    Where a limit is reached, connections that wait for a complete request (idle ones among them) are closed: of the
    address that has most connections, those that have waited longest. A new one is refused only where there are none.
    """

    def __init__(self, limits: Limits, counters: Counters) -> None:
        self._limits = limits
        self._counters = counters
        self._addresses: dict[Connection, bytes] = {}
        self._numbers: dict[bytes, int] = {}
        """The number of connections by address."""
        self._none = asyncio.Event()
        self._none.set()

    def __len__(self) -> int:
        return len(self._addresses)

    def __iter__(self) -> Iterator[Connection]:
        return iter(tuple(self._addresses))

    def opened(self, connection: Connection) -> bool:
        """Notes that a client has connected. Returns False if its connection exceeds a limit and is not taken."""
        address = connection.holding.network
        number = self._numbers.get(address, 0)
        if number >= self._limits.connections_per_client:
            own = (candidate for candidate, its in self._addresses.items() if its == address)
            if not self._evict(own, number, "connections_per_client"):
                return False
        elif len(self) >= self._limits.connections and not self._evict(self._addresses, len(self), "connections"):
            return False
        self._none.clear()
        self._addresses[connection] = address
        self._numbers[address] = self._numbers.get(address, 0) + 1
        return True

    def closed(self, connection: Connection) -> None:
        """Notes that the connection is closed, or about to be."""
        address = self._addresses.pop(connection, None)
        if address is None:
            return
        self._numbers[address] -= 1
        if not self._numbers[address]:
            del self._numbers[address]
        if not self._addresses:
            self._none.set()

    async def gone(self) -> None:
        """Returns when no connection is open."""
        await self._none.wait()

    def _evict(self, candidates: Iterable[Connection], number: int, limit: str) -> bool:
        """Closes some of the candidates that wait; returns False if none waits: then a connection is refused."""
        evictable = (candidate for candidate in candidates if candidate.evictable)
        waiting = sorted(evictable, key=lambda candidate: candidate.since)
        left = self._numbers.copy()
        ranked: list[tuple[int, int]] = []
        for index, connection in enumerate(waiting):
            address = self._addresses[connection]
            left[address] -= 1
            ranked.append((-left[address], index))
        evicted = [waiting[index] for _, index in heapq.nsmallest(number // EVICTED_SHARE + 1, ranked)]
        self._counters.add(names.CLOSED_CONNECTIONS, (limit,), float(len(evicted) or 1))
        for connection in evicted:
            self.closed(connection)
            connection.transport.abort()
        return bool(evicted)
