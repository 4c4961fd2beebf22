"""One connection to an engine: it carries one request and response at a time, and is then reused.

    IDLE ─► AWAITING_HEAD ─┬─► READING_BODY ─► IDLE
                           └─► TUNNEL
    every state ─► CLOSED

A receiver (the exchange) is assigned exactly in AWAITING_HEAD, READING_BODY and TUNNEL.
"""

from __future__ import annotations

import asyncio
from enum import Enum, auto
from fcntl import ioctl
from termios import FIONREAD
from time import perf_counter
from typing import Final, Protocol, cast

from hemostat.relay.http.errors import BadResponse
from hemostat.relay.http.framing import CHUNKED, UNTIL_CLOSE, ChunkedReader
from hemostat.relay.http.response import ResponseHead, parse_response
from hemostat.relay.tunnel import Tunnel

MAX_HEAD_BYTES: Final = 256 * 1024
MAX_INTERIM_RESPONSES: Final = 100
"""The number of interim responses to one request."""
PIECE_BYTES: Final = 64 * 1024
"""The bytes of a response that are read in one pass of the event loop, where more have arrived."""
SHORT_PIECE_BYTES: Final = 1024
"""The same for a stream of short lines that the hook reads: each event takes microseconds, however short it is."""
SHORT_LINE_BYTES: Final = 16
_EVENTS: Final = b"text/event-stream"
_NO_BYTES: Final = bytes(4)
"""An int of 0."""


class UpstreamState(Enum):
    """The state of a connection to the upstream."""

    IDLE = auto()
    AWAITING_HEAD = auto()
    """A request has been sent; the final response head is not complete."""
    READING_BODY = auto()
    TUNNEL = auto()
    """The protocol has been switched."""
    CLOSED = auto()
    """The connection is closed, or about to be."""


# Module globals, for the reason that `exchange_state` gives.
_IDLE: Final = UpstreamState.IDLE
_AWAITING_HEAD: Final = UpstreamState.AWAITING_HEAD
_READING_BODY: Final = UpstreamState.READING_BODY
_TUNNEL: Final = UpstreamState.TUNNEL
_CLOSED: Final = UpstreamState.CLOSED


class Receiver(Protocol):
    """The receiver of a response."""

    @property
    def request_complete(self) -> bool:
        """It is True if the whole request has been sent upstream."""

    def connection_ready(self, connection: UpstreamConnection) -> None:
        """Takes the connection that was waited for; the pool calls it."""

    def connection_failed(self, error: OSError) -> None:
        """Is told by the pool that the upstream cannot be reached."""

    def wait_expired(self) -> None:
        """Is told by the pool that no connection became free in time."""

    def retry(self) -> bool:
        """Is told that a reused connection closed without a byte of response. Returns True if the request is sent once
        more."""

    def pause_request(self) -> None:
        """Sends nothing more for now, since the upstream does not read fast enough."""

    def resume_request(self) -> None:
        """Goes on sending, since the upstream reads again."""

    def interim_response(self, head: ResponseHead) -> None:
        """Takes a 1xx response other than 101."""

    def switch_protocols(self, head: ResponseHead) -> Tunnel:
        """Takes a 101 response that was asked for, and returns the tunnel through which bytes pass from here on."""

    def response_started(self, head: ResponseHead, received: float) -> bool:
        """Takes the final head, which was read at `received` (perf_counter). Returns True if the body is to be given
        without its chunked framing."""

    def response_data(self, data: bytes) -> None:
        """Takes more of the response's body."""

    def response_end(self) -> None:
        """Is told that the response is complete, and the connection is no longer the receiver's."""

    def response_failed(self, reason: str) -> None:
        """Is told that the response is malformed or ends too early."""


class ConnectionOwner(Protocol):
    """The pool, as a connection sees it."""

    @property
    def trusted(self) -> bool:
        """It is True if connections may carry more than one request."""

    @property
    def waiting(self) -> int:
        """The number of requests that wait for a connection."""

    def offer(self, connection: UpstreamConnection) -> None:
        """Is told that the connection can take a request."""

    def sent_stray_bytes(self) -> None:
        """Is told that the upstream has sent bytes that belong to no response."""

    def lost(self, connection: UpstreamConnection) -> None:
        """Is told that the connection is closed."""


class UpstreamConnection(asyncio.Protocol):
    """Parses the framing of responses, and nothing else of them."""

    __slots__ = (
        "_buffer",
        "_chunks",
        "_descriptor",
        "_eof",
        "_events",
        "_head",
        "_interim",
        "_may_upgrade",
        "_missing",
        "_owner",
        "_payload_only",
        "_reading",
        "_reading_paused",
        "_receiver",
        "_rest",
        "_reused",
        "_searched",
        "_state",
        "_to_head",
        "_tunnel",
        "idle_since",
        "transport",
    )

    def __init__(self, owner: ConnectionOwner) -> None:
        self._owner = owner
        self.transport: asyncio.Transport = cast("asyncio.Transport", None)
        self.idle_since = 0.0
        """The event-loop time at which it became idle; the pool sets it."""
        self._descriptor = -1
        self._state: UpstreamState = _IDLE
        self._receiver: Receiver | None = None
        self._reused = False
        """It is True if the connection has carried a request before: the upstream may have been about to close it."""
        self._eof = False
        """It is True if the upstream has shut down its sending side."""
        self._reading_paused = False
        self._rest = b""
        """The bytes that have been read, and are left for the next pass of the event loop; until then nothing more is
        read."""
        self._reading = True
        """It is True if the transport reads: it is not paused, and there is no rest."""
        self._buffer = bytearray()
        """The beginning of an incomplete response head."""
        self._searched = 0
        """The place in the buffer up to which no head ends."""
        self._interim = 0
        """The number of interim responses to the present request."""
        self._events = False
        """It is True if the hook reads the response, which is a stream of events."""
        self._head: ResponseHead | None = None
        """The final head, while its body is read."""
        self._missing = 0
        """The number of bytes of body that are missing, with Content-Length."""
        self._chunks = ChunkedReader()
        self._payload_only = False
        self._to_head = False
        """It is True if the request's method is HEAD."""
        self._may_upgrade = False
        """It is True if the request asks for a switch of protocols."""
        self._tunnel: Tunnel | None = None

    # Called by the pool and the exchange.

    @property
    def idle(self) -> bool:
        """It is True if the connection is open, and carries no request."""
        return self._state is _IDLE and not self.transport.is_closing()

    @property
    def usable(self) -> bool:
        """It is True if a request can be sent on the connection, and nothing has arrived that would be taken for its
        response.
        """
        return self._state is _IDLE and not self.transport.is_closing() and not self._unread()

    @property
    def closed(self) -> bool:
        return self._state is _CLOSED

    def assign(self, receiver: Receiver, *, to_head: bool, may_upgrade: bool, paused: bool) -> None:
        """Assigns the receiver that the next response is for.

        to_head: the request's method is HEAD. may_upgrade: the request asks for a switch of protocols. paused: read
        nothing before `resume`.
        """
        self._receiver = receiver
        self._to_head = to_head
        self._may_upgrade = may_upgrade
        self._state = _AWAITING_HEAD
        if paused:
            self.pause()

    def pause(self) -> None:
        """Stops reading: the client is slow, and the rest of the response is left in the upstream's buffers."""
        if not self._reading_paused and self._state is not _CLOSED:
            self._reading_paused = True
            self._update_reading()

    def resume(self) -> None:
        if self._reading_paused and self._state is not _CLOSED:
            self._reading_paused = False
            self._update_reading()

    def _update_reading(self) -> None:
        reading = not self._reading_paused and not self._rest
        if reading is not self._reading and self._state is not _CLOSED and not self.transport.is_closing():
            self._reading = reading
            if reading:
                self.transport.resume_reading()
            else:
                self.transport.pause_reading()

    def abort(self) -> None:
        """Closes at once. The upstream notices it, so that the engine stops generating."""
        self._receiver = self._head = None
        self._rest = b""
        self._state = _CLOSED
        self.transport.abort()

    def close(self) -> None:
        """Closes after what has been written is sent."""
        self._receiver = None
        self._rest = b""
        self._state = _CLOSED
        self.transport.close()

    @property
    def between_chunks(self) -> bool:
        """It is True if the response is chunked, and the next byte from the upstream is the first one of a chunk's
        size.
        """
        head = self._head
        return head is not None and head.length == CHUNKED and self._chunks.between_chunks

    # Called by the event loop.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self._descriptor = transport.get_extra_info("socket").fileno()

    def data_received(self, data: bytes) -> None:
        if self._rest:
            self._rest += data
        elif len(data) > (SHORT_PIECE_BYTES if self._events else PIECE_BYTES):
            self._rest = data
            self._read_rest(self._piece(data))
        else:
            self._receive(data)

    def _piece(self, data: bytes) -> int:
        """Returns how much of what has arrived is read in this pass of the event loop."""
        end = min(len(data), PIECE_BYTES)
        if self._events:
            lines = data.count(b"\n", 0, end) + data.count(b"\r", 0, end)
            if lines > end // SHORT_LINE_BYTES:
                return min(end, SHORT_PIECE_BYTES)
        return end

    def _read_rest(self, end: int) -> None:
        """Reads the first `end` bytes of the rest, and the others in later passes."""
        data, rest = self._rest[:end], self._rest[end:]
        self._rest = b""
        self._leave(rest)
        self._receive(data)

    def _leave(self, rest: bytes) -> None:
        """Reads this in the next pass of the event loop."""
        if rest and not self._rest:
            asyncio.get_running_loop().call_soon(self._go_on)
        self._rest = rest
        self._update_reading()

    def _go_on(self) -> None:
        if self._rest:
            self._read_rest(self._piece(self._rest))

    def _receive_rest(self) -> None:
        """Receives the rest: the connection has ended, and nothing more comes after the rest."""
        while self._rest:
            rest, self._rest = self._rest, b""
            self._receive(rest)

    def _receive(self, data: bytes) -> None:
        receiver = self._receiver
        if receiver is None:
            # Not the response to any request; it must not be taken for the next one's.
            self._stray()
            return
        head = self._head
        if head is not None:
            self._body(receiver, head, data)
            return
        tunnel = self._tunnel
        if tunnel is not None:
            tunnel.from_upstream(data)
            return
        received = perf_counter()
        try:
            head, rest = self._read_head(receiver, data)
        except BadResponse as error:
            self._malformed(receiver, str(error))
            return
        if head is None:
            return
        if self._tunnel is not None:
            if rest:
                self._tunnel.from_upstream(rest)
            return
        self._head = head
        self._missing = head.length
        self._state = _READING_BODY
        self._payload_only = receiver.response_started(head, received)
        self._events = self._payload_only and head.content_type.startswith(_EVENTS)
        if self._receiver is not receiver:
            return  # it goes to another engine
        if self._events and (end := self._piece(rest)) < len(rest):
            self._leave(rest[end:] + self._rest)
            rest = rest[:end]
        self._body(receiver, head, rest)

    def _read_head(self, receiver: Receiver, data: bytes) -> tuple[ResponseHead | None, bytes]:
        """Returns the final head and what follows it; None while it is incomplete. Interim responses are handed on."""
        if not self._buffer:
            # The usual case: the whole head, and no interim response before it.
            end = data.find(b"\r\n\r\n")
            if 0 <= end <= MAX_HEAD_BYTES:
                head = parse_response(data[:end], to_head=self._to_head)
                if head.status >= 200:
                    self._interim = 0
                    return head, data[end + 4 :]
        buffer: bytes | bytearray = data
        searched = 0
        if self._buffer:
            searched = self._searched
            self._buffer += data
            buffer = self._buffer
        begin = 0
        while True:
            end = buffer.find(b"\r\n\r\n", max(begin, searched - 3))
            if end < 0 or end - begin > MAX_HEAD_BYTES:
                size = len(buffer)
                if size - begin > MAX_HEAD_BYTES:
                    raise BadResponse("the response head is too long")
                searched = max(begin, searched)
                if buffer.count(b"\n", searched) != buffer.count(b"\r\n", max(begin, searched - 1)):
                    raise BadResponse("the response head contains LF alone")
                if buffer is self._buffer:
                    del self._buffer[:begin]
                else:
                    self._buffer = bytearray(memoryview(buffer)[begin:])
                self._searched = size - begin
                return None, b""
            head = parse_response(bytes(memoryview(buffer)[begin:end]), to_head=self._to_head)
            begin = end + 4
            if head.status >= 200 or head.status == 101:
                data = bytes(memoryview(buffer)[begin:])
                self._buffer = bytearray()
                self._interim = 0
            if head.status >= 200:
                return head, data
            if head.status == 101:
                if not head.upgrade or not self._may_upgrade:
                    raise BadResponse("the upstream switches protocols without being asked to")
                self._tunnel = receiver.switch_protocols(head)
                self._state = _TUNNEL
                return head, data
            self._interim += 1
            if self._interim > MAX_INTERIM_RESPONSES:
                raise BadResponse(f"more than {MAX_INTERIM_RESPONSES} interim responses")
            receiver.interim_response(head)
            if begin == len(buffer):
                self._buffer = bytearray()
                return None, b""

    def _body(self, receiver: Receiver, head: ResponseHead, data: bytes) -> None:
        length = head.length
        if length >= 0:
            size = len(data)
            if size < self._missing:
                self._missing -= size
                receiver.response_data(data)
            else:
                excess = size > self._missing
                receiver.response_data(data[: self._missing] if excess else data)
                self._complete(receiver, reusable=head.keep_alive, excess=excess)
        elif length == CHUNKED:
            out: list[bytes] | None = [] if self._payload_only else None
            try:
                used = self._chunks.feed(data, out)
            except ValueError as error:
                self._malformed(receiver, str(error))
                return
            excess = 0 <= used < len(data)
            if out is not None:
                receiver.response_data(b"".join(out))
            else:
                receiver.response_data(self._chunks.to_forward(data, used))
            if used >= 0:
                self._complete(receiver, reusable=head.keep_alive, excess=excess)
        else:
            receiver.response_data(data)

    def _complete(self, receiver: Receiver, *, reusable: bool, excess: bool = False) -> None:
        """Completes the response. excess: bytes have followed the response."""
        if self._receiver is not receiver:
            return  # the client's connection failed while this was written to it
        self._events = False
        if excess or self._rest:
            self._stray()
        elif reusable and receiver.request_complete and not self._eof and self._owner.trusted:
            self._receiver = None
            self._head = None
            self._state = _IDLE
            self.resume()
            self._reused = True
            if self._owner.waiting:
                # Not at once: what the upstream sends behind the response may be on its way.
                asyncio.get_running_loop().call_soon(self._offer)
            else:
                self._owner.offer(self)
        else:
            self.abort()
        receiver.response_end()

    def _offer(self) -> None:
        if not self.idle:
            return
        if self._unread():
            self._stray()
        else:
            self._owner.offer(self)

    def _unread(self) -> bool:
        """Returns True if the upstream has sent bytes that have not been read. (Over TLS they need not be bytes of a
        response.)"""
        return self._reused and ioctl(self._descriptor, FIONREAD, _NO_BYTES) != _NO_BYTES

    def _stray(self) -> None:
        """Handles bytes that have arrived and that belong to no response. Those behind them must not be taken for one
        either."""
        self._owner.sent_stray_bytes()
        self.abort()

    def _malformed(self, receiver: Receiver, reason: str) -> None:
        self.abort()
        receiver.response_failed(f"the upstream's response is malformed: {reason}")

    def pause_writing(self) -> None:
        if self._receiver is not None:
            self._receiver.pause_request()

    def resume_writing(self) -> None:
        if self._receiver is not None:
            self._receiver.resume_request()

    def eof_received(self) -> bool:
        self._receive_rest()
        self._eof = True
        receiver = self._receiver
        if receiver is None:
            self._state = _CLOSED
        elif self._tunnel is not None:
            return self._tunnel.upstream_ended()
        elif self._head is not None and self._head.length == UNTIL_CLOSE:
            self._complete(receiver, reusable=False)
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._receive_rest()
        unanswered = self._state is _AWAITING_HEAD and not self._buffer
        self._state = _CLOSED
        self._owner.lost(self)
        receiver, self._receiver = self._receiver, None
        if receiver is None:
            return
        if self._tunnel is not None:
            self._tunnel.client.close()
        elif not (unanswered and self._reused and receiver.retry()):
            receiver.response_failed("the upstream closed the connection before its response was complete")
