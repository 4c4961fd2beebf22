"""A bounded pool of connections to one engine."""

from __future__ import annotations

import asyncio
import logging
import math
import ssl
from collections import OrderedDict, deque
from typing import Final

from hemostat.ipc.origin import Origin
from hemostat.relay.upstreams.connection import Receiver, UpstreamConnection

CONNECT_SECONDS: Final = 10.0
IDLE_SECONDS: Final = 4.0
"""The time after which idle connections are closed. It is before uvicorn closes them (after 5 s in vLLM), so that a
request is seldom sent on one that is being closed.
"""

DISTRUST_SECONDS: Final = 60.0

log = logging.getLogger("hemostat.relay")


class Pool:
    """Owns at most `limit` connections to one engine; requests beyond that wait in order of arrival.

    context: for TLS. queue_seconds: the longest time that a request may wait.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        origin: Origin,
        limit: int,
        context: ssl.SSLContext | None = None,
        queue_seconds: float = math.inf,
    ) -> None:
        self._loop = loop
        self._origin = origin
        self._limit = limit
        self._context = context
        self._queue_seconds = queue_seconds
        self._idle: deque[UpstreamConnection] = deque()
        """The idle connections, oldest first. Connections are taken from the other end, so that the ones that are not
        needed expire.
        """
        self._waiters: OrderedDict[Receiver, float] = OrderedDict()
        """The waiting receivers in the order in which they are served -> the time when each began to wait (event-loop
        time).
        """
        self._connecting: set[asyncio.Task[None]] = set()
        self._distrusted_until = 0.0
        """The event-loop time until which no connection is reused."""
        self._open: set[UpstreamConnection] = set()

    @property
    def size(self) -> int:
        """The number of connections that are open or being opened."""
        return len(self._open) + len(self._connecting)

    @property
    def waiting(self) -> int:
        """The number of requests that wait for a connection."""
        return len(self._waiters)

    def acquire(self, receiver: Receiver) -> UpstreamConnection | None:
        """Returns a connection now; or None, and `connection_ready` or `connection_failed` is called later."""
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                return connection
        self._waiters[receiver] = self._loop.time()
        self._grow()
        return None

    def cancel(self, receiver: Receiver) -> None:
        """Notes that the receiver no longer waits."""
        del self._waiters[receiver]

    def offer(self, connection: UpstreamConnection) -> None:
        """Gives a connection that can take a request to the request that has waited longest, else keeps it idle:
        whether anything has arrived on it is asked when it is acquired."""
        if not connection.idle:
            return
        if self._waiters:
            self._waiters.popitem(last=False)[0].connection_ready(connection)
        else:
            connection.idle_since = self._loop.time()
            self._idle.append(connection)

    @property
    def trusted(self) -> bool:
        """See `connection.ConnectionOwner`."""
        return self._distrusted_until == 0.0 or self._loop.time() > self._distrusted_until

    def sent_stray_bytes(self) -> None:
        """Gives every request a connection of its own for some time: responses could be taken for other requests'."""
        if self.trusted:
            log.warning(
                "the engine %s sends bytes behind its responses; for %.0f s no connection to it is reused",
                self._origin.name,
                DISTRUST_SECONDS,
            )
        self._distrusted_until = self._loop.time() + DISTRUST_SECONDS
        self.close_idle()

    def lost(self, connection: UpstreamConnection) -> None:
        """Notes that a connection is closed."""
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        self._grow()

    def sweep(self, now: float) -> None:
        """Closes connections that have been idle for too long, and ends waits that are. now: event-loop time."""
        while self._idle and now - self._idle[0].idle_since > IDLE_SECONDS:
            self._idle.popleft().close()
        for receiver in [waiter for waiter, since in self._waiters.items() if now - since > self._queue_seconds]:
            if self._waiters.pop(receiver, None) is not None:
                receiver.wait_expired()

    def close_idle(self) -> None:
        """Closes the connections that carry no request."""
        while self._idle:
            self._idle.pop().abort()

    def close(self) -> None:
        """Closes all connections at once."""
        for task in self._connecting:
            task.cancel()
        for connection in self._open:
            connection.transport.abort()

    def _grow(self) -> None:
        while len(self._connecting) < len(self._waiters) and self.size < self._limit:
            task = self._loop.create_task(self._connect())
            self._connecting.add(task)

    async def _connect(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        failure: OSError | None = None
        origin = self._origin
        connection = UpstreamConnection(self)
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await self._loop.create_connection(
                    lambda: connection,
                    origin.address,
                    origin.port,
                    ssl=self._context,
                    server_hostname=origin.host if self._context else None,
                )
        except OSError as error:  # TimeoutError and ssl.SSLError are OSErrors
            failure = error
        self._connecting.discard(task)
        if failure is None and connection.closed:
            failure = ConnectionResetError("closed immediately after it was opened")
        if failure is None:
            self._open.add(connection)
            self.offer(connection)
        elif self._waiters:
            self._waiters.popitem(last=False)[0].connection_failed(failure)
            self._grow()
