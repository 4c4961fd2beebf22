"""A connection after `101 Switching Protocols`: bytes are passed in both directions, unread."""

from __future__ import annotations

import asyncio


class Tunnel:
    """Joins the transports of a client and an upstream. Owns which of the two directions have ended."""

    __slots__ = ("_client_ended", "_upstream_ended", "client", "upstream")

    def __init__(self, client: asyncio.Transport, upstream: asyncio.Transport) -> None:
        self.client = client
        self.upstream = upstream
        self._client_ended = False
        self._upstream_ended = False

    def from_client(self, data: bytes) -> None:
        self.upstream.write(data)

    def from_upstream(self, data: bytes) -> None:
        self.client.write(data)

    def client_ended(self) -> bool:
        """Is told that the client has shut down its sending side. Returns True if its transport stays open for the
        other direction."""
        self._client_ended = True
        return _half_close(self.upstream) and not self._upstream_ended

    def upstream_ended(self) -> bool:
        """Is told that the upstream has shut down its sending side. Returns True if its transport stays open for the
        other direction."""
        self._upstream_ended = True
        if self._client_ended or not _half_close(self.client):
            self.client.close()
        return not self._client_ended and self.upstream.can_write_eof()


def _half_close(transport: asyncio.Transport) -> bool:
    """Shuts down the sending side; closes instead if that is impossible (TLS). Returns True if the other direction
    stays open."""
    if transport.is_closing():
        return False
    if transport.can_write_eof():
        transport.write_eof()
        return True
    transport.close()
    return False
