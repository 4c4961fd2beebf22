"""One client's connection: its requests, one after the other.

    READING_HEAD ─► READING_BODY ─► AWAITING_RESPONSE ─► READING_HEAD (keep-alive)
         └──── no body, or all of it is here ──┘
    AWAITING_RESPONSE ─► TUNNEL
    every state ─► CLOSING

An exchange is in progress in READING_BODY, AWAITING_RESPONSE and TUNNEL, and in no other state.
"""

from __future__ import annotations

import asyncio
import re
import socket
import struct
from enum import Enum, auto
from time import perf_counter
from typing import Final, cast

from hemostat.ipc import ends
from hemostat.openai import routes
from hemostat.relay.client_identity import client_network, credential_digest
from hemostat.relay.clients import Clients
from hemostat.relay.context import RelayContext
from hemostat.relay.disconnect import DisconnectWatcher
from hemostat.relay.exchange import Exchange
from hemostat.relay.exchange_state import COLLECTING, QUEUED
from hemostat.relay.forwarding import ensure_request_id
from hemostat.relay.http.errors import BadRequest, error_body, error_response
from hemostat.relay.http.framing import MIN_CHUNK_BYTES, RequestBodyReader
from hemostat.relay.http.request import parse_request
from hemostat.relay.limits import MAX_READ_AHEAD_BYTES
from hemostat.relay.request_budget import MEMORY_EXHAUSTED, UPLOADS_EXHAUSTED
from hemostat.relay.shares import Holding
from hemostat.relay.tunnel import Tunnel
from hemostat.relay.turns import ANSWER_BYTES

SLOW_UPLOAD_BYTES_PER_SECOND: Final = 32 * 1024
"""A long body that arrives at less gives way where no upstream connection is left for another one: 2 MB in a minute."""
SLOW_UPLOAD_SECONDS: Final = 2.0
"""The least time for which the rate of an upload is measured."""
LINGER_SECONDS: Final = 1.0
"""The time from the end of the last response to closing the connection, for the client to read it."""


_RESET: Final = struct.pack("ii", 1, 0)
"""The value of SO_LINGER with which closing sends a reset."""
_last_blank: Final = re.compile(rb"\n(?!\r\n)").search
"""The end of the last one of several empty lines."""


class ConnectionState(Enum):
    """The meaning of the next bytes from the client."""

    READING_HEAD = auto()
    """They are the head of the next request. Its beginning may be in the buffer."""
    READING_BODY = auto()
    """They are the rest of the body of the present request."""
    AWAITING_RESPONSE = auto()
    """They are pipelined requests, which are kept in the buffer until the response to the present one is complete."""
    TUNNEL = auto()
    """They are bytes for the upstream: the protocol has been switched."""
    CLOSING = auto()
    """They are discarded: the last response has been sent."""


# Module globals, for the reason that `exchange_state` gives.
_READING_HEAD: Final = ConnectionState.READING_HEAD
_READING_BODY: Final = ConnectionState.READING_BODY
_AWAITING_RESPONSE: Final = ConnectionState.AWAITING_RESPONSE
_TUNNEL: Final = ConnectionState.TUNNEL
_CLOSING: Final = ConnectionState.CLOSING


class ClientConnection(asyncio.Protocol):
    """Owns what has been read from the client and not been used, and whether reading is paused."""

    __slots__ = (
        "_advancing",
        "_at",
        "_blank_bytes",
        "_body",
        "_body_bytes",
        "_buffer",
        "_clients",
        "_context",
        "_counted",
        "_peer",
        "_reading",
        "_searched",
        "_stalled",
        "_tunnel",
        "_waits",
        "_watcher",
        "_work",
        "address",
        "eof",
        "exchange",
        "holding",
        "reading_paused",
        "since",
        "state",
        "transport",
        "write_paused",
    )

    def __init__(self, context: RelayContext, clients: Clients[ClientConnection]) -> None:
        self.state: ConnectionState = _READING_HEAD
        self.transport: asyncio.Transport = cast("asyncio.Transport", None)
        self.exchange: Exchange | None = None
        """The request in progress."""
        self.reading_paused = False
        """It is True if nothing more is to be read, until the request in progress needs it."""
        self._waits = False
        """It is True if nothing more is to be read, nor any request begun, before the client's next turn."""
        self._reading = True
        """It is True if the transport reads: it is neither paused nor waits."""
        self.write_paused = False
        """It is True if the client does not read."""
        self.eof = False
        """It is True if the client has shut down its sending side, or is gone."""
        self.since = 0.0
        """The event-loop time from which the client's time limits count."""
        self.address = ""
        """The address of the present request's client."""
        self._peer = ""
        """The address of the connection's other end."""
        self._context = context
        self._clients = clients
        self.holding = Holding(self, b"")
        self._buffer: bytes | bytearray = b""
        """The bytes that have been read and not been used: a packet as it came, or several in one array."""
        self._at = 0
        """The place in the buffer up to which it has been used; 0 except while `_advance` runs."""
        self._searched = 0
        """The place in the buffer up to which no head ends."""
        self._blank_bytes = 0
        """The number of bytes of empty lines since the last request."""
        self._work = 0
        """The amount that the present step of `_advance` counts for in `Turns`."""
        self._counted = 0
        """The number of bytes of the buffer that the budget knows of."""
        self._body: RequestBodyReader | None = None
        """The reader of the present request's body; it is used in READING_BODY."""
        self._body_bytes = 0
        """The bytes of the body, with its framing, that have been read since `since`; they are counted in
        READING_BODY.
        """
        self._tunnel: Tunnel | None = None
        """The tunnel in TUNNEL."""
        self._advancing = False
        """It is True while `_advance` is running: it must not be entered again from an exchange that ends at once."""
        self._watcher: DisconnectWatcher | None = None
        self._stalled = (0, 0.0)
        """The number of bytes that the client has not taken, and since when they are as many, while writing is
        paused.
        """

    # Called by the event loop.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        peer = transport.get_extra_info("peername")
        self.address = self._peer = str(peer[0]) if isinstance(peer, tuple) else ""
        self.holding.network = client_network(self._peer)
        self.since = self._context.loop.time()
        if not self._clients.opened(self):
            self.state = _CLOSING
            if self._context.access_log is not None:
                self._context.access_log.refused(503, self._peer)
            body = error_body(503, "too many connections", "overloaded")
            self.transport.write(error_response(503, body, fields=b"Connection: close\r\n"))
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        state = self.state
        if state is _READING_HEAD:
            if not self._buffer:
                self.since = self._context.loop.time()
                self._buffer = data
            else:
                self._append(data)
            if self.write_paused and len(self._buffer) > MAX_READ_AHEAD_BYTES:
                self.pause_reading()
            self._advance()
        elif state is _READING_BODY:
            self._body_bytes += len(data)
            self._use_turn(len(data))
            self._read_body(data)
        elif state is _AWAITING_RESPONSE:
            self._append(data)
            if len(self._buffer) > MAX_READ_AHEAD_BYTES:
                self.pause_reading()
            self._count()
        else:
            self._use_turn(len(data))
            if state is _TUNNEL:
                assert self._tunnel is not None
                self._tunnel.from_client(data)

    def eof_received(self) -> bool:
        self.eof = True
        if self._tunnel is not None:
            return self._tunnel.client_ended()
        if self.state is not _AWAITING_RESPONSE:
            return False
        # Whether the client still waits for its response, or is gone, cannot be seen from this.
        self._watch()
        return True

    def pause_writing(self) -> None:
        self.write_paused = True
        self._stalled = self.transport.get_write_buffer_size(), self._context.loop.time()
        if self.exchange is not None:
            self.exchange.pause_response()

    def resume_writing(self) -> None:
        self.write_paused = False
        if self.exchange is not None:
            self.exchange.resume_response()
        elif self.state is _READING_HEAD:
            self._advance()

    def connection_lost(self, exc: Exception | None) -> None:
        self.state = _CLOSING
        self._clients.closed(self)
        if self._waits:
            self._waits = False
            self._context.turns.forget(self.holding.network, self)
        if self._watcher is not None:
            self._watcher.stop()
            self._watcher = None
        self._drop_buffer()
        exchange, self.exchange = self.exchange, None
        if exchange is not None:
            exchange.client_lost()
        self.holding.owner = None  # otherwise the two keep each other until the garbage collector finds them

    # Requests.

    def _advance(self) -> None:
        """Reads requests from the buffer, one at a time, until one waits for its response, more has to be read, or the
        client has used up its turn."""
        if self._advancing or self._waits:
            return
        self._advancing = True
        waits = False
        while self.state is _READING_HEAD and len(self._buffer) > self._at and not self.write_paused and not waits:
            if not self._read_head():
                break
            waits = len(self._buffer) > self._at and self._use_turn(self._work)
        self._advancing = False
        if self._at:
            self._compact()
        if self.state is _READING_HEAD and not waits:
            if self.eof and not self.write_paused:
                self.transport.close()
            elif not self.write_paused:
                self.resume_reading()
        elif self.state is _READING_BODY and self.eof:
            self.transport.close()  # the rest of this body will never arrive
        if self._buffer or self._counted:
            self._count()

    def _read_head(self) -> bool:
        """Begins the next request. Returns False while its head is incomplete, or if nothing more is to be read."""
        context = self._context
        limits = context.limits
        buffer = self._buffer
        size = len(buffer)
        begin = self._at
        if buffer.startswith(b"\r\n", begin):
            # At least one empty line before a request is to be ignored (RFC 9112, 2.2). As many are as fit into a head,
            # however they are cut into packets.
            last = _last_blank(buffer, begin, min(size, begin + limits.head_bytes - self._blank_bytes + 2))
            assert last is not None
            self._blank_bytes += last.end() - begin
            if self._blank_bytes > limits.head_bytes:
                self._refuse(BadRequest(400, f"more than {limits.head_bytes} bytes of empty lines before a request"))
                return False
            self._at = begin = last.end()
            if begin == size:
                return False
        searched = self._searched
        end = buffer.find(b"\r\n\r\n", searched - 3 if searched > begin + 3 else begin)
        if end < 0 or end - begin > limits.head_bytes:
            searched = max(begin, searched)
            self._searched = size
            if size - begin > limits.head_bytes:
                self._refuse(BadRequest(431, f"the request head is longer than {limits.head_bytes} bytes"))
            elif buffer.count(b"\n", searched) != buffer.count(b"\r\n", max(begin, searched - 1)):
                self._refuse(BadRequest(400, "the request head contains LF alone"))
            return False
        started = perf_counter()
        try:
            head = buffer[begin:end] if isinstance(buffer, bytes) else _part(buffer, begin, end)
            request = parse_request(head, limits.header_count)
            if request.length > limits.body_bytes:
                raise BadRequest(413, f"the body is longer than {limits.body_bytes} bytes")
        except BadRequest as error:
            self._refuse(error)
            return False
        if self._counted:
            self._release()
        if limits.trusted_proxies is not None:
            self.address = limits.trusted_proxies.name_client(self._peer, request)
            self.holding.network = client_network(self.address)
        self.exchange = exchange = Exchange(context, self, request, ensure_request_id(request), started)
        self._blank_bytes = 0
        self._searched = 0
        length = request.length
        after = end + 4
        if 0 <= length <= size - after:
            self._work = after + length - begin
            stop = after + length
            body = buffer[after:stop] if isinstance(buffer, bytes) else _part(buffer, after, stop)
            self._at = stop
            self.state = _AWAITING_RESPONSE
            exchange.start(body, complete=True, more_read=False)
        else:
            self._work = size - begin
            rest = _part(buffer, after, size)
            self._set_buffer(b"")
            self._body = RequestBodyReader(length, limits.body_bytes)
            self.state = _READING_BODY
            self.resume_reading()
            self._measure_rate()
            exchange.start(b"", complete=False, more_read=bool(rest))
            if rest and self.state is _READING_BODY:
                self._read_body(rest)
        if self.state is _READING_HEAD:
            self._work += ANSWER_BYTES
        return self.state is not _CLOSING

    def _append(self, data: bytes) -> None:
        """Adds to the buffer. One array, not a list: a client can send each byte in a packet of its own."""
        if not self._buffer:
            self._buffer = data
            return
        if isinstance(self._buffer, bytes):
            self._buffer = bytearray(self._buffer)
        self._buffer += data

    def _set_buffer(self, data: bytes) -> None:
        self._buffer = data
        self._at = 0
        self._searched = 0

    def _compact(self) -> None:
        """Leaves out of the buffer what has been used."""
        at = self._at
        size = len(self._buffer)
        self._searched = max(0, self._searched - at)
        self._at = 0
        self._buffer = b"" if at == size else _part(self._buffer, at, size)

    def _use_turn(self, size: int) -> bool:
        """Counts work for the client. Returns True if its turn is used up, so that the connection waits for another."""
        if self._context.turns.spend(self.holding.network, size) and not self._waits:
            self._waits = True
            self._context.turns.wait(self.holding.network, self)
            self._update_reading()
        return self._waits

    def take_turn(self) -> None:
        """See `turns.Waiting`."""
        self._waits = False
        if self.state is _READING_HEAD:
            self._advance()
        self._update_reading()

    def _read_body(self, data: bytes) -> None:
        """Reads more of the present request's body, and possibly what follows it."""
        exchange, body = self.exchange, self._body
        assert exchange is not None
        assert body is not None
        started = perf_counter()
        try:
            pieces, rest = body.feed(data)
        except BadRequest as error:
            exchange.fail_request(error)
            return
        if body.chunked:
            # Each takes time, however short it is.
            self._use_turn(MIN_CHUNK_BYTES * len(pieces))
        if body.complete:
            self._body = None
            self._set_buffer(rest)
            self.state = _AWAITING_RESPONSE
        exchange.request_data(pieces, complete=body.complete, started=started)
        if self._buffer:
            self._count()

    # Called by the exchange.

    @property
    def last_request(self) -> bool:
        return self._context.draining or (self.eof and len(self._buffer) == self._at)

    def exchange_ended(self, *, keep_alive: bool) -> None:
        self.exchange = None
        if not keep_alive:
            self._linger()
            return
        self.state = _READING_HEAD
        self.since = self._context.loop.time()
        unread = len(self._buffer) > self._at
        if unread or self.reading_paused or self.eof:
            self._advance()

    def exchange_broken(self, *, reset: bool) -> None:
        self.exchange = None
        self.state = _CLOSING
        if reset:
            self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self.transport.abort()
        else:
            self.transport.close()

    def tunnel_opened(self, tunnel: Tunnel) -> None:
        self.state = _TUNNEL
        self._tunnel = tunnel
        if self._buffer:
            tunnel.from_client(bytes(self._buffer))
            self._drop_buffer()
        self.resume_reading()
        if self.eof:
            tunnel.client_ended()

    def pause_reading(self) -> None:
        if not self.reading_paused and not self.eof and not self.transport.is_closing():
            self.reading_paused = True
            self._update_reading()
            self._watch()

    def resume_reading(self) -> None:
        if self.reading_paused:
            self.reading_paused = False
            self._measure_rate()
            self._update_reading()

    def _update_reading(self) -> None:
        """Lets the transport read, unless reading is paused or the client has to wait for its turn."""
        reading = not self.reading_paused and not self._waits
        if reading is not self._reading and not self.eof and not self.transport.is_closing():
            self._reading = reading
            if reading:
                self.transport.resume_reading()
            else:
                self.transport.pause_reading()

    # The budget.

    def _count(self) -> None:
        """Tells the budget what is in the buffer. Any request may have to give way for it, this client's too."""
        holding, added = self.holding, len(self._buffer) - self._counted
        if not added:
            return
        if not holding.size:
            holding.waiting = False
        self._counted += added
        self._context.budget.hold(holding, added)
        if added > 0:
            self._context.budget.enforce()

    def _release(self) -> None:
        """Tells the budget that the counted bytes are no longer in the buffer, or become a request."""
        self._context.budget.hold(self.holding, -self._counted)
        self._counted = 0

    def _drop_buffer(self) -> None:
        self._set_buffer(b"")
        if self._counted:
            self._release()

    def give_way(self) -> None:
        """See `shares.Owner`."""
        exchange = self.exchange
        if exchange is not None and (exchange.state is COLLECTING or exchange.state is QUEUED):
            exchange.give_way(MEMORY_EXHAUSTED)
        elif self.state is _READING_HEAD:
            self._refuse(BadRequest(503, MEMORY_EXHAUSTED, "overloaded"))
        else:
            self._drop_buffer()  # of requests that were sent before this one was answered
            self.transport.abort()

    def give_way_upload(self) -> None:
        """See `shares.Owner`."""
        assert self.exchange is not None
        self.exchange.give_way(UPLOADS_EXHAUSTED)

    def credential(self) -> bytes:
        """See `shares.Owner`."""
        return b"" if self.exchange is None else credential_digest(self.exchange.outgoing.head)

    def uploads_slowly(self, now: float) -> bool:
        """See `shares.Owner`. Time in which the upstream does not read is not the client's."""
        seconds = now - self.since
        measured = self.state is _READING_BODY and not self.reading_paused and seconds >= SLOW_UPLOAD_SECONDS
        return measured and self._body_bytes < SLOW_UPLOAD_BYTES_PER_SECOND * seconds

    def _measure_rate(self) -> None:
        """Begins to measure how fast the client sends, if the state is READING_BODY."""
        if self.state is _READING_BODY:
            self.since = self._context.loop.time()
            self._body_bytes = 0

    # The end of the connection.

    @property
    def evictable(self) -> bool:
        """It is True if nothing is lost by closing the connection but an incomplete request, or what follows the last
        response.
        """
        state = self.state
        if state is _READING_BODY:
            return self.exchange is not None and self.exchange.state is COLLECTING
        return state is _READING_HEAD or state is _CLOSING

    def _refuse(self, error: BadRequest) -> None:
        """Refuses a request that cannot be parsed, or not be read to its end, so that what follows it cannot be
        either."""
        self._context.counters.request(routes.OTHER, ends.OVERLOADED if error.status == 503 else ends.REFUSED)
        if self._context.access_log is not None:
            self._context.access_log.refused(error.status, self._peer)
        body = error_body(error.status, error.message, error.code)
        self.transport.write(error_response(error.status, body, fields=b"Connection: close\r\n"))
        self._linger()

    def _linger(self) -> None:
        """Closes the connection, but lets the client read first: closing while there is unread input would reset the
        connection."""
        self.state = _CLOSING
        self._drop_buffer()
        if self.eof or self.transport.is_closing():
            self.transport.close()
            return
        self.resume_reading()
        self.transport.write_eof()
        self._context.loop.call_later(LINGER_SECONDS, self.transport.close)

    def _watch(self) -> None:
        """Watches for a disconnect: nothing is read from here on, so that the event loop does not see the client
        disconnect."""
        if self._watcher is None:
            self._watcher = DisconnectWatcher(self._context.loop, self)
        self._watcher.start()

    @property
    def unread(self) -> bool:
        """See `disconnect.Watched`."""
        return self.state is not _CLOSING and (self.eof or self.reading_paused)

    def probe(self) -> bool:
        """See `disconnect.Watched`."""
        return self.exchange is not None and self.exchange.probe()

    def sweep(self, now: float) -> None:
        """Enforces the time limits. Called about once a second; now: event-loop time."""
        limits = self._context.limits
        waited = now - self.since
        if self.write_paused:
            left = self.transport.get_write_buffer_size()
            if left != self._stalled[0]:
                self._stalled = left, now
            elif now - self._stalled[1] > limits.send_seconds:
                self.transport.abort()
                return
        if self.state is _READING_HEAD:
            if self._buffer and waited > limits.head_seconds and not self.write_paused:
                self._refuse(BadRequest(408, f"the request head took more than {limits.head_seconds:g} s"))
            elif not self._buffer:
                context = self._context
                if context.draining:
                    # A client may send a request at any moment, however long it has sent none.
                    if now - max(self.since, context.draining_since) > context.idle_drain_seconds:
                        self.transport.close()
                elif waited > limits.idle_seconds:
                    self.transport.close()
        elif self.state is _READING_BODY and not self.reading_paused and waited > limits.body_seconds:
            if self._body_bytes < limits.body_bytes_per_second * waited:
                assert self.exchange is not None
                rate = limits.body_bytes_per_second
                self.exchange.fail_request(BadRequest(408, f"the body arrives at less than {rate} bytes/s"))
            else:
                self._measure_rate()


def _part(buffer: bytes | bytearray, begin: int, end: int) -> bytes:
    return buffer[begin:end] if isinstance(buffer, bytes) else bytes(memoryview(buffer)[begin:end])
