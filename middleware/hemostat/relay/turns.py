"""Limits how long one client may hold a relay's event loop: its turns.

A turn is one pass of the event loop. What a client makes the relay do in a turn is counted in bytes. Beyond TURN_BYTES
the rest waits for a later turn, and until then nothing more is read from the connection. In each turn one waiting
connection of a client goes on, and connections of at most MAX_NETWORKS clients do. So a flood takes a bounded part of
each pass, however many bytes and connections it has, and the whole loop only if nobody else needs it.

A client is a network here (see `client_identity`): anybody can invent credentials.
"""

from __future__ import annotations

import asyncio
from itertools import islice
from typing import Final, Protocol

TURN_BYTES: Final = 64 * 1024
"""The bytes of one client that are read, or searched for the end of a head, in one turn."""
MAX_OWN_ANSWERS: Final = 8
"""The number of answers of the relay's own that one connection gets in a turn."""
ANSWER_BYTES: Final = TURN_BYTES // MAX_OWN_ANSWERS
"""The number of bytes that an answer of the relay's own counts for."""
MAX_NETWORKS: Final = 8
"""The number of networks whose connections go on in one turn."""


class Waiting(Protocol):
    """A connection that may have to wait for its turn."""

    def take_turn(self) -> None:
        """Goes on, and waits again if there is more to do."""


class Turns:
    """Owns what each network has used of the present turn, and which connections wait for the next one."""

    __slots__ = ("_loop", "_scheduled", "_used", "_waiting")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._scheduled = False
        self._used: dict[bytes, int] = {}
        self._waiting: dict[bytes, dict[Waiting, None]] = {}
        """The waiting connections by network, the network first that has waited for longest; the same for each
        network's connections."""

    def spend(self, network: bytes, size: int) -> bool:
        """Counts work of so many bytes. Returns True if the network has used up its turn."""
        used = self._used.get(network, 0) + size
        self._used[network] = used
        self._schedule()
        return used >= TURN_BYTES

    def wait(self, network: bytes, connection: Waiting) -> None:
        """Calls the connection's `take_turn` in a later turn."""
        self._waiting.setdefault(network, {})[connection] = None
        self._schedule()

    def forget(self, network: bytes, connection: Waiting) -> None:
        """Forgets a connection that is closed."""
        waiting = self._waiting.get(network)
        if waiting is not None:
            waiting.pop(connection, None)
            if not waiting:
                del self._waiting[network]

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._begin)

    def _begin(self) -> None:
        """Begins a new turn."""
        self._scheduled = False
        self._used.clear()
        for network in list(islice(self._waiting, MAX_NETWORKS)):
            waiting = self._waiting.pop(network)
            connection = next(iter(waiting))
            del waiting[connection]
            if waiting:
                self._waiting[network] = waiting  # at the end
            connection.take_turn()
        if self._waiting:
            self._schedule()
