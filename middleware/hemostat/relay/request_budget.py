"""What the requests that are not complete, or that wait, may take of one relay: memory and upstream connections."""

from __future__ import annotations

from typing import Final, Protocol

UPLOAD_SHARE: Final = 4
"""One of so many upstream connections may wait for the rest of a request's body."""


class Collecting(Protocol):
    """An exchange that collects its request's body."""

    def give_way(self) -> None:
        """Answer the client with 503 and keep nothing of the request."""


class RequestBudget:
    """Owns how many bytes of requests all exchanges of a relay keep, and how many of them send an incomplete body.

    A body that is collected counts, and so does a request that waits for a connection or is kept to be sent once more.
    If they exceed the limit, the bodies that have been collected for longest give way: most bodies are complete within
    milliseconds, and a client that sends slowly on purpose hurts only itself. Where that is not enough, a request that
    would have to wait is refused.
    """

    __slots__ = ("_collecting", "_limit", "_max_uploads", "_uploads", "held_bytes")

    def __init__(self, limit: int, max_connections: int) -> None:
        """limit: in bytes. max_connections: to the upstream."""
        self.held_bytes = 0
        self._limit = limit
        self._max_uploads = max(1, max_connections // UPLOAD_SHARE)
        self._uploads = 0
        self._collecting: dict[Collecting, None] = {}
        """Oldest first."""

    @property
    def scarce(self) -> bool:
        """Half of the bytes are in use: what is not needed is not kept."""
        return 2 * self.held_bytes > self._limit

    def spares(self, size: int) -> bool:
        """Three quarters are left free with `size` bytes more: a copy that is seldom needed makes nothing scarce."""
        return 4 * (self.held_bytes + size) <= self._limit

    def begin_collecting(self, exchange: Collecting) -> None:
        self._collecting[exchange] = None

    def end_collecting(self, exchange: Collecting) -> None:
        self._collecting.pop(exchange, None)

    def enforce(self) -> bool:
        """Keep to the limit; `give_way` of any exchange that collects may be called. False: too much is in use still,
        by requests that are complete."""
        while self.held_bytes > self._limit and self._collecting:
            exchange = next(iter(self._collecting))
            del self._collecting[exchange]
            exchange.give_way()
        return self.held_bytes <= self._limit

    def begin_upload(self) -> bool:
        """True if one more exchange may send a body that is not complete; `end_upload` has to follow."""
        if self._uploads >= self._max_uploads:
            return False
        self._uploads += 1
        return True

    def end_upload(self) -> None:
        self._uploads -= 1
