"""The relay's connections to the upstream server: one response at a time each, kept alive in a bounded pool."""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from time import perf_counter
from typing import TYPE_CHECKING, cast

from hemostat.relay.http import (
    CHUNKED,
    UNTIL_CLOSE,
    BadResponse,
    ChunkedReader,
    Origin,
    ResponseHead,
    parse_response,
)

if TYPE_CHECKING:
    from hemostat.relay.server import ClientProtocol

MAX_HEAD = 256 * 1024
CONNECT_SECONDS = 10.0
IDLE_SECONDS = 4.0
"""Idle connections are closed before uvicorn closes them (5 s in vLLM), so that a request seldom meets a dying one."""


class UpstreamProtocol(asyncio.Protocol):
    """One connection. Reads the framing of responses, and nothing else of them."""

    __slots__ = (
        "_buffer",
        "_chunks",
        "_head",
        "_left",
        "_payload_only",
        "_reading_paused",
        "client",
        "closed",
        "eof",
        "idle_since",
        "pool",
        "reused",
        "transport",
    )

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.transport: asyncio.Transport = cast("asyncio.Transport", None)
        self.client: ClientProtocol | None = None
        self.reused = False
        """True from the second request on: the upstream may have been about to close it."""
        self.idle_since = 0.0
        self.closed = False
        self.eof = False
        self._buffer = b""
        self._head: ResponseHead | None = None
        self._left = 0
        self._chunks = ChunkedReader()
        self._payload_only = False
        self._reading_paused = False

    # The client's side calls these.

    def assign(self, client: ClientProtocol) -> None:
        self.client = client
        self._head = None
        if client.paused:
            self.pause()

    def pause(self) -> None:
        """The client is slow: leave the rest with the upstream."""
        if not self._reading_paused and not self.closed:
            self._reading_paused = True
            self.transport.pause_reading()

    def resume(self) -> None:
        if self._reading_paused and not self.closed:
            self._reading_paused = False
            self.transport.resume_reading()

    def abandon(self) -> None:
        """Nobody waits for the answer any more: close at once, which is what makes the engine abort."""
        self.client = None
        self.closed = True
        self.transport.abort()

    @property
    def between_chunks(self) -> bool:
        """True while a chunked response stands where a chunk's size comes next."""
        return self._head is not None and self._head.length == CHUNKED and self._chunks.between_chunks

    # The event loop calls these.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        client = self.client
        if client is None:
            # Bytes that nobody asked for: whatever they are, the next request's answer they are not.
            self.closed = True
            self.transport.abort()
            return
        if client.tunnel:
            client.transport.write(data)
            return
        if self._head is not None:
            self._body(client, self._head, data)
            return
        received = perf_counter()
        try:
            head, rest = self._read_head(client, data)
        except BadResponse as error:
            self._broken(client, str(error))
            return
        if head is None:
            return
        if head.status == 101:
            if rest:
                client.transport.write(rest)
            return
        self._head = head
        self._left = head.length
        self._payload_only = client.response_started(head, received)
        self._body(client, head, rest)

    def _read_head(self, client: ClientProtocol, data: bytes) -> tuple[ResponseHead | None, bytes]:
        """The final head and what came after it; None while it is incomplete. Interim ones are handed on."""
        if self._buffer:
            data = self._buffer + data
            self._buffer = b""
        while True:
            end = data.find(b"\r\n\r\n")
            if end < 0 or end > MAX_HEAD:
                if len(data) > MAX_HEAD:
                    raise BadResponse("the response head is too long")
                if data.count(b"\n") != data.count(b"\r\n"):
                    raise BadResponse("the response head contains LF alone")
                self._buffer = data
                return None, b""
            head = parse_response(data[:end], to_head=client.head_request)
            data = data[end + 4 :]
            if head.status >= 200:
                return head, data
            if head.status == 101:
                if not head.upgrade or not client.upgrade_wanted:
                    raise BadResponse("the upstream switches protocols unasked")
                client.upgraded(head)
                return head, data
            client.interim(head)
            if not data:
                return None, b""

    def _body(self, client: ClientProtocol, head: ResponseHead, data: bytes) -> None:
        length = head.length
        if length >= 0:
            size = len(data)
            if size < self._left:
                self._left -= size
                client.response_data(data)
            else:
                excess = size > self._left
                client.response_data(data[: self._left] if excess else data)
                self._complete(client, reusable=head.keep_alive and not excess)
        elif length == CHUNKED:
            out: list[bytes] | None = [] if self._payload_only else None
            try:
                used = self._chunks.feed(data, out)
            except ValueError as error:
                self._broken(client, str(error))
                return
            excess = 0 <= used < len(data)
            if out is not None:
                client.response_data(b"".join(out))
            else:
                client.response_data(data[:used] if excess else data)
            if used >= 0:
                self._complete(client, reusable=head.keep_alive and not excess)
        else:
            client.response_data(data)

    def _complete(self, client: ClientProtocol, *, reusable: bool) -> None:
        if self.client is not client:
            return  # the client's transport broke while it was written to
        self.client = None
        if reusable and client.body_done and not self.eof:
            self.resume()
            self.reused = True
            self.pool.offer(self)
        else:
            self.closed = True
            self.transport.abort()
        client.response_end()

    def _broken(self, client: ClientProtocol, reason: str) -> None:
        self.abandon()
        client.response_broken(f"the upstream's response is malformed: {reason}")

    def pause_writing(self) -> None:
        if self.client is not None:
            self.client.hold()

    def resume_writing(self) -> None:
        if self.client is not None:
            self.client.unhold()

    def eof_received(self) -> bool:
        self.eof = True
        client = self.client
        if client is None:
            self.closed = True
            return False
        if client.tunnel:
            client.tunnel_eof()
            return not client.eof and self.transport.can_write_eof()
        if self._head is not None and self._head.length == UNTIL_CLOSE:
            self._complete(client, reusable=False)
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self.pool.lost(self)
        client, self.client = self.client, None
        if client is None:
            return
        if client.tunnel:
            client.transport.close()
        elif self._head is None and not self._buffer and self.reused and client.retry():
            pass
        else:
            client.response_broken("the upstream closed the connection before its response was complete")


class Pool:
    """At most `limit` connections to one upstream; clients beyond that wait in order of arrival."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, origin: Origin, limit: int, context: ssl.SSLContext | None = None
    ) -> None:
        self._loop = loop
        self._origin = origin
        self._limit = limit
        self._context = context
        self._idle: deque[UpstreamProtocol] = deque()
        """Oldest first; taken from the other end, so that what is not needed grows old and is closed."""
        self._waiters: deque[ClientProtocol] = deque()
        self._connecting: set[asyncio.Task[None]] = set()
        self._open: set[UpstreamProtocol] = set()

    @property
    def size(self) -> int:
        """Connections that are open or being opened."""
        return len(self._open) + len(self._connecting)

    @property
    def waiting(self) -> int:
        return len(self._waiters)

    def acquire(self, client: ClientProtocol) -> UpstreamProtocol | None:
        """A connection now, or None: then `client.upstream_ready` or `client.upstream_failed` is called later."""
        while self._idle:
            connection = self._idle.pop()
            if not connection.closed and not connection.transport.is_closing():
                return connection
        self._waiters.append(client)
        self._grow()
        return None

    def retry(self, client: ClientProtocol) -> None:
        """A new connection, first in the queue. What lies idle is as old as the one that has just failed: drop it."""
        while self._idle:
            connection = self._idle.pop()
            connection.closed = True
            connection.transport.abort()
        self._waiters.appendleft(client)
        self._grow()

    def cancel(self, client: ClientProtocol) -> None:
        self._waiters.remove(client)

    def offer(self, connection: UpstreamProtocol) -> None:
        """A connection that can take a request: for who waits longest, else it lies idle."""
        if connection.closed or connection.transport.is_closing():
            return
        if self._waiters:
            self._waiters.popleft().upstream_ready(connection)
        else:
            connection.idle_since = self._loop.time()
            self._idle.append(connection)

    def lost(self, connection: UpstreamProtocol) -> None:
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        self._grow()

    def sweep(self, now: float) -> None:
        """Close what has been idle for too long."""
        while self._idle and now - self._idle[0].idle_since > IDLE_SECONDS:
            connection = self._idle.popleft()
            connection.closed = True
            connection.transport.close()

    def close(self) -> None:
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
        connection = UpstreamProtocol(self)
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await self._loop.create_connection(
                    lambda: connection,
                    origin.host,
                    origin.port,
                    ssl=self._context,
                    server_hostname=origin.host if self._context else None,
                )
        except OSError as error:  # TimeoutError and ssl.SSLError are OSErrors
            failure = error
        self._connecting.discard(task)
        if failure is None and connection.closed:
            failure = ConnectionResetError("closed as soon as it was open")
        if failure is None:
            self._open.add(connection)
            self.offer(connection)
        elif self._waiters:
            self._waiters.popleft().upstream_failed(failure)
            self._grow()
