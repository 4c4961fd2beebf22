"""Notices clients that have disconnected while nothing is read from them.

The event loop sees a disconnect only by reading. It does not read while reading is paused, or after the client has shut
down its sending side: then it is unknown whether the client still waits for its response or is gone. So the state of
the TCP connection is checked at intervals, and where that is inconclusive, the client is probed: a closed socket
answers any byte with a reset.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Final, Protocol

CHECK_SECONDS: Final = 0.1
"""The time between two checks."""
RESET_SECONDS: Final = 0.02
"""The time from a probe to the check for the reset that it may have caused."""

_TCP_CLOSE: Final = 7
_TCP_CLOSE_WAIT: Final = 8
_HAS_TCP_INFO: Final = hasattr(socket, "TCP_INFO")
"""It is True on Linux only. Elsewhere such a disconnect is noticed when the next bytes are sent to the client."""


class Watched(Protocol):
    """A client's connection, as the watcher sees it."""

    transport: asyncio.Transport

    @property
    def unread(self) -> bool:
        """It is True if nothing is read from the client, which may still expect a response."""

    @property
    def eof(self) -> bool:
        """It is True if the client has shut down its sending side."""

    def probe(self) -> bool:
        """Sends bytes without a meaning, if that is possible here. Returns False if there is no response in progress,
        or it has been probed before."""


class DisconnectWatcher:
    """Aborts the transport of one client's connection when the client has disconnected. Owns the timer."""

    __slots__ = ("_connection", "_loop", "_timer")

    def __init__(self, loop: asyncio.AbstractEventLoop, connection: Watched) -> None:
        self._loop = loop
        self._connection = connection
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Checks at intervals, as long as the connection is unread."""
        if self._timer is None and _HAS_TCP_INFO:
            self._timer = self._loop.call_later(0.0 if self._connection.eof else CHECK_SECONDS, self._check)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _check(self) -> None:
        self._timer = None
        connection = self._connection
        if not connection.unread:
            return
        state = connection.transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
        if state == _TCP_CLOSE:
            connection.transport.abort()
            return
        probed = state == _TCP_CLOSE_WAIT and connection.probe()
        self._timer = self._loop.call_later(RESET_SECONDS if probed else CHECK_SECONDS, self._check)
