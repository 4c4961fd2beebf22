"""The client's side of the relay: one connection, its requests one after the other.

A request is in one of these states:

    request  up    waiting  what
    None     None  False    between requests; `_buffer` may hold the start of a head
    set      None  False    its body is collected for the hook
    set      None  True     waits for a connection to the upstream; what was read lies in `_unsent`
    set      set   False    with the upstream, its response on the way; `tunnel` after a switch of protocols

`_lingering` ends them all: the last answer is out, and what still comes in is thrown away until the client closes.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import struct
from enum import Enum, auto
from time import perf_counter
from typing import TYPE_CHECKING, cast

from hemostat import logs
from hemostat.openai import routes
from hemostat.relay import counters, outcomes
from hemostat.relay.hooks import ExchangeHook, Headers, Refusal, Rewrite
from hemostat.relay.http import (
    CHUNKED,
    CHUNKED_LINE,
    CONTINUE,
    LAST_CHUNK,
    SAFE_METHODS,
    UNTIL_CLOSE,
    BadRequest,
    ChunkedReader,
    RequestHead,
    ResponseHead,
    chunk,
    error_body,
    error_response,
    fields,
    parse_request,
    set_length,
)
from hemostat.relay.outcomes import OutcomeObserver, ResponseOutcome
from hemostat.relay.upstream import UpstreamProtocol

if TYPE_CHECKING:
    from hemostat.relay.worker import Relay
    from hemostat.tracing import RequestSpan

READ_AHEAD = 64 * 1024
"""Bytes taken from a client beyond the request that is being answered, or before the upstream takes them."""
COLLECTED = 16 * 1024 * 1024
"""A response with Content-Length that the hook wants is collected up to this size, and chunked beyond it."""
HEAD_SECONDS = 3.0
"""How long the head of a rewritten request's response is held back (within the sweep's second) for the hook to see its
beginning: vLLM says in the first event of a stream that it refuses the request."""
LINGER_SECONDS = 1.0
WATCH_SECONDS = 0.1
ANSWER_SECONDS = 0.02
"""How long a reset may be on its way before it is first looked for."""

_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER: closing sends a reset."""
_TCP_CLOSE = 7
_TCP_CLOSE_WAIT = 8
_STATE_KNOWN = hasattr(socket, "TCP_INFO")
"""Linux. Elsewhere a client that goes while it is not read from is noticed at the next byte sent to it."""
_TRACE_FIELDS = frozenset((b"traceparent", b"tracestate"))
request_log = logging.getLogger(logs.REQUEST)
_random = random.Random()  # noqa: S311  names, not secrets


class Mode(Enum):
    """What becomes of the response's body."""

    RAW = auto()
    """Sent on as it is, framing included."""
    CHUNK = auto()
    """Put into chunks."""
    PLAIN = auto()
    """Ends with the connection."""
    COLLECT = auto()
    """Kept to its end, then sent with a Content-Length."""


def new_request_id() -> str:
    """A random UUID (version 4) in 32 hexadecimal digits."""
    bits = _random.getrandbits(128) & ~(0xF << 76) & ~(0x3 << 62) | (0x4 << 76) | (0x2 << 62)
    return f"{bits:032x}"


def _new_trace() -> tuple[int, int]:
    """Trace and parent id, neither of them zero."""
    bits = _random.getrandbits(192)
    return bits >> 64 | 1, bits & 0xFFFFFFFFFFFFFFFF | 1


class ClientProtocol(asyncio.Protocol):
    """One client's connection."""

    __slots__ = (
        "_advancing",
        "_began",
        "_body_left",
        "_body_size",
        "_buffer",
        "_chunks",
        "_collected",
        "_ear",
        "_exchange",
        "_head_sent",
        "_held",
        "_held_since",
        "_hook_alive",
        "_keep_alive",
        "_lingering",
        "_mode",
        "_outcome",
        "_own",
        "_parts",
        "_parts_size",
        "_prefix",
        "_probed",
        "_received",
        "_relay",
        "_request_id",
        "_response",
        "_retried",
        "_route",
        "_sent",
        "_span",
        "_transforming",
        "_unsent",
        "_unsent_size",
        "_watcher",
        "body_done",
        "eof",
        "head_request",
        "overhead",
        "paused",
        "request",
        "since",
        "transport",
        "tunnel",
        "up",
        "upgrade_wanted",
        "waiting",
    )

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self.transport: asyncio.Transport = cast("asyncio.Transport", None)
        self._buffer = b""
        self._advancing = False
        self._lingering = False
        self._held = False
        self._watcher: asyncio.TimerHandle | None = None
        self.paused = False
        """The client does not read: nothing more is taken from the upstream."""
        self.eof = False
        """The client has shut down its sending side, or is gone."""
        self.tunnel = False
        self.since = 0.0
        """When the client last did what it is waited for to do."""
        self.request: RequestHead | None = None
        self.up: UpstreamProtocol | None = None
        self.waiting = False
        self._unsent: list[bytes] = []
        self._unsent_size = 0
        self._exchange: ExchangeHook | None = None
        self._parts: list[bytes] | None = None
        self._chunks: ChunkedReader | None = None
        self._reset()

    def _reset(self) -> None:
        """Between requests."""
        self.request = None
        self.up = None
        self.body_done = True
        self.head_request = False
        self.upgrade_wanted = False
        self.overhead = 0.0
        self._sent: bytes | None = None
        self._own: tuple[list[bytes], int, bytes] | None = None
        """Header lines, framing and body as the client sent them, where something else was sent upstream instead and
        nothing has come back to the client yet."""
        self._retried = False
        self._head_sent = False
        self._response: ResponseHead | None = None
        self._prefix = b""
        self._mode = Mode.RAW
        self._transforming = False
        self._hook_alive = False
        self._probed = False
        self._ear: OutcomeObserver | None = None
        self._span: RequestSpan | None = None
        """Where this exchange is traced."""

    # From the event loop.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.since = self._relay.loop.time()
        self._relay.clients.add(self)

    def data_received(self, data: bytes) -> None:
        if self.tunnel:
            assert self.up is not None
            self.up.transport.write(data)
        elif self._lingering:
            pass
        elif self.request is None:
            if not self._buffer:
                self.since = self._relay.loop.time()
                self._buffer = data
            else:
                self._buffer += data
            if self.paused and len(self._buffer) > READ_AHEAD:
                self.hold()
            self._advance()
        elif not self.body_done:
            self.since = self._relay.loop.time()
            self._body(data)
        else:
            self._buffer += data
            if len(self._buffer) > READ_AHEAD:
                self.hold()

    def eof_received(self) -> bool:
        self.eof = True
        if self.tunnel:
            assert self.up is not None
            return _pass_eof(self.up.transport) and not self.up.eof
        if self._lingering or self.request is None or not self.body_done:
            return False
        # A client that is gone looks the same as one that has only said all it had to say.
        self._watch()
        return True

    def pause_writing(self) -> None:
        self.paused = True
        if self.up is not None:
            self.up.pause()

    def resume_writing(self) -> None:
        self.paused = False
        if self.up is not None:
            self.up.resume()
        elif self.request is None and not self._lingering:
            self._advance()

    def connection_lost(self, exc: Exception | None) -> None:
        self._relay.gone(self)
        if self._watcher is not None:
            self._watcher.cancel()
            self._watcher = None
        up, self.up = self.up, None
        if self.tunnel:
            assert up is not None
            up.client = None
            up.closed = True
            up.transport.close()
            self._finish(counters.OK)
            return
        if self.waiting:
            self._relay.pool.cancel(self)
            self.waiting = False
        if up is not None:
            up.abandon()
        if self.request is not None:
            self._finish(counters.CLIENT_GONE)
        self._lingering = True

    # Requests.

    def _advance(self) -> None:
        """Take up requests from the buffer, one at a time, until one has to wait for somebody else."""
        if self._advancing:
            return
        self._advancing = True
        while self.request is None and self._buffer and not self._lingering and not self.paused:
            if not self._take_up():
                break
        self._advancing = False
        if self.request is None and not self._lingering:
            if self.eof and not self.paused:
                self.transport.close()
            elif not self.paused:
                self.unhold()
        elif self.eof and not self.body_done:
            self.transport.close()  # the rest of this body will never come

    def _take_up(self) -> bool:
        """Begin the next request; False while its head is incomplete, or nothing more is to be read."""
        relay = self._relay
        limits = relay.limits
        buffer = self._buffer
        if buffer[:2] == b"\r\n":
            # An empty line before a request is to be ignored (RFC 9112, 2.2).
            self._buffer = buffer = buffer[2:]
        end = buffer.find(b"\r\n\r\n")
        if end < 0 or end > limits.head_bytes:
            if len(buffer) > limits.head_bytes:
                self._refuse(BadRequest(431, f"the request head is longer than {limits.head_bytes} bytes"))
            elif buffer.count(b"\n") != buffer.count(b"\r\n"):
                self._refuse(BadRequest(400, "the request head contains LF alone"))
            return False
        started = perf_counter()
        self._route = routes.OTHER
        try:
            pairs: list[tuple[bytes, bytes]] | None = None if relay.hook is None else []
            request = parse_request(buffer[:end], limits.header_count, pairs)
            if request.length > limits.body_bytes:
                raise BadRequest(413, f"the body is longer than {limits.body_bytes} bytes")
        except BadRequest as error:
            self._refuse(error)
            return False
        self.request = request
        target = request.target
        query = target.find(b"?")
        self._route = routes.LABELS.get(target if query < 0 else target[:query], routes.OTHER)
        self._keep_alive = request.keep_alive
        self.head_request = request.method == b"HEAD"
        self.upgrade_wanted = request.upgrade
        if request.request_id is None:
            request_id = new_request_id()
            request.lines.append(b"X-Request-Id: " + request_id.encode())
            self._request_id = request_id
        else:
            self._request_id = request.request_id.decode("latin-1")
        length = request.length
        rest = buffer[end + 4 :]
        self._body_size = 0
        self._body_left = length
        self.body_done = length == 0 or 0 < length <= len(rest)
        if self._route in routes.SCORED and request.method == b"POST":
            self._ear = OutcomeObserver()
            self._began = started
            if relay.tracing is not None:
                self._trace(request, pairs)
        if pairs is not None and self._begin(request, pairs, rest):
            return not self._lingering
        if self.body_done:
            self._buffer = rest[length:]
            payload = self._upstream_head(request)
            if length:
                body = rest[:length]
                payload += body
                if self._ear is not None:
                    self._ear.feed_request(body)
            self._sent = payload
            self._dispatch(payload, started)
        else:
            self._buffer = b""
            self._chunks = ChunkedReader() if length == CHUNKED else None
            self.unhold()
            self._dispatch(self._upstream_head(request), started)
            if rest:
                self._body(rest)
        return True

    def _trace(self, request: RequestHead, pairs: list[tuple[bytes, bytes]] | None) -> None:
        """Put a span of our own between the client's and the upstream's."""
        assert self._relay.tracing is not None
        given = {name.lower().decode(): value.decode("latin-1") for name, value in fields(request.lines)}
        try:
            self._span = self._relay.tracing.start_request(self._route, given, self._request_id)
            carried = self._span.upstream_headers()
        except Exception:  # noqa: BLE001  tracing may fail, requests may not
            self._relay.counters.add(outcomes.UNTRACED, ())
            return
        _drop(request, _TRACE_FIELDS)
        request.traceparent = True
        made = [(name.encode(), value.encode("latin-1")) for name, value in carried.items()]
        request.lines += [b"%b: %b" % field for field in made]
        if pairs is not None:
            pairs[:] = [pair for pair in pairs if pair[0].lower() not in _TRACE_FIELDS] + made

    def _begin(self, request: RequestHead, pairs: Headers, rest: bytes) -> bool:
        """Ask the hook; True when the request is in its hands or has been answered."""
        relay = self._relay
        assert relay.hook is not None
        try:
            wish = relay.hook.begin(request.method.decode("ascii"), request.target, pairs, self._request_id)
        except Exception:  # noqa: BLE001  a hook that raises has lost its say
            relay.counters.hook_raised()
            return False
        if wish is None:
            return False
        if isinstance(wish, Refusal):
            self._buffer = rest[request.length :] if self.body_done else b""
            self._answer(wish.status, wish.body, counters.REFUSED)
            return True
        self._exchange = wish
        self._hook_alive = True
        self._parts = []
        self._parts_size = 0
        if request.expect:
            # The body is needed before anything is sent upstream, so it is asked for here.
            request.expect = False
            _drop(request, frozenset((b"expect",)))
            if not self.body_done and not rest:
                self.transport.write(CONTINUE)
        self._buffer = b""
        self._chunks = ChunkedReader() if request.length == CHUNKED else None
        if request.length == 0:
            self._buffer = rest
            self._decide()
        else:
            self.body_done = False
            self.unhold()
            if rest:
                self._body(rest)
        return True

    def _upstream_head(self, request: RequestHead) -> bytes:
        """The head as it goes upstream.

        Host: to a plain upstream the client's own, so that redirects and links that the server builds from it lead back
        here; over TLS the upstream's, since it has to agree with the certificate's name.
        """
        lines = request.lines
        relay = self._relay
        if relay.origin.tls or request.minor == 0:
            host = b"Host: " + relay.origin.authority
            at = next((i for i, line in enumerate(lines) if line[:5].lower() == b"host:"), -1)
            if at < 0:
                lines.append(host)
            elif relay.origin.tls:
                lines[at] = host
        if not request.traceparent:
            lines.append(b"traceparent: 00-%032x-%016x-00" % _new_trace())
        if relay.authorization is not None and not request.authorization:
            lines.append(relay.authorization)
        if request.upgrade:
            lines.append(b"Connection: Upgrade")
            lines.append(b"Upgrade: websocket")
        return b"%b %b HTTP/1.1\r\n%b\r\n\r\n" % (request.method, request.target, b"\r\n".join(lines))

    def _body(self, data: bytes) -> None:
        """More of the present request's body, and maybe what follows it."""
        limits = self._relay.limits
        started = perf_counter()
        if self._chunks is None:
            size = len(data)
            if size >= self._body_left:
                self._buffer = data[self._body_left :]
                data = data[: self._body_left]
                self.body_done = True
            self._body_left -= len(data)
            pieces = [data]
        else:
            pieces = []
            try:
                used = self._chunks.feed(data, pieces)
            except ValueError as error:
                self._break_off(BadRequest(400, f"the body is malformed: {error}"))
                return
            self._body_size += sum(map(len, pieces))
            if self._body_size > limits.body_bytes:
                self._break_off(BadRequest(413, f"the body is longer than {limits.body_bytes} bytes"))
                return
            if used >= 0:
                self._buffer = data[used:]
                self.body_done = True
        if self._ear is not None:
            self._ear.feed_request(data)
        if self._parts is not None:
            assert self._exchange is not None
            self._parts += pieces
            self._parts_size += sum(map(len, pieces))
            if self.body_done or self._parts_size > self._exchange.body_limit:
                self._decide()
            return
        if self._chunks is not None:
            pieces = [chunk(piece) for piece in pieces]
            if self.body_done:
                pieces.append(LAST_CHUNK)
        self._forward(b"".join(pieces), started)

    def _decide(self) -> None:
        """The body is whole, or longer than the hook takes: ask the hook what goes upstream."""
        started = perf_counter()
        request, exchange, parts = self.request, self._exchange, self._parts
        assert request is not None
        assert exchange is not None
        assert parts is not None
        self._parts = None
        body = b"".join(parts)
        whole = self.body_done and len(body) <= exchange.body_limit
        try:
            verdict = exchange.request(body if whole else None)
            if isinstance(verdict, Rewrite) and not whole:
                raise ValueError("a body that the hook has not seen cannot be rewritten")
        except Exception:  # noqa: BLE001  a hook that raises has lost its say
            self._relay.counters.hook_raised()
            self._hook_alive = False
            verdict = None
        if isinstance(verdict, Refusal):
            self._answer(verdict.status, verdict.body, counters.REFUSED)
            return
        if isinstance(verdict, Rewrite):
            self._own = (list(request.lines), request.framing, body)
            body = verdict.body
            if verdict.drop_headers:
                _drop(request, verdict.drop_headers)
            request.framing = set_length(request.lines, request.framing, len(body))
        elif self._chunks is not None:
            body = chunk(body) + (LAST_CHUNK if self.body_done else b"")
        payload = self._upstream_head(request) + body
        if self.body_done:
            self._sent = payload
        self._dispatch(payload, started)

    def _dispatch(self, payload: bytes, started: float) -> None:
        """Send the beginning of a request upstream, now or when there is a connection."""
        up = self._relay.pool.acquire(self)
        if up is None:
            self.waiting = True
            self._unsent.append(payload)
            self._unsent_size = len(payload)
            self.overhead = -started
            return
        self.up = up
        up.assign(self)
        up.transport.write(payload)
        self.overhead = perf_counter() - started

    def _replay(self) -> bool:
        """Ask the hook whether the response that is now complete is to be forgotten, and the request sent again."""
        own, self._own = self._own, None
        if own is None or not self._hook_alive or not self._transforming:
            return False
        assert self._exchange is not None
        try:
            if not self._exchange.replay():
                return False
        except Exception:  # noqa: BLE001  a hook that raises has lost its say
            self._hook_failed()
            return False
        started = perf_counter()
        request = self.request
        assert request is not None
        request.lines, request.framing, body = own
        self._keep_alive = request.keep_alive
        self._response = None
        self._prefix = b""
        self._mode = Mode.RAW
        self._transforming = False
        if self._chunks is not None:
            body = chunk(body) + LAST_CHUNK
        self._dispatch(self._upstream_head(request) + body, started)
        return True

    def _forward(self, data: bytes, started: float) -> None:
        """Send more of a body upstream."""
        if self.up is not None:
            self.up.transport.write(data)
            if self.body_done:
                self.overhead = perf_counter() - started
        elif self.waiting:
            self._unsent.append(data)
            self._unsent_size += len(data)
            if self.body_done:
                self.overhead = -started
            elif self._unsent_size > READ_AHEAD:
                self.hold()

    # From the pool and the upstream.

    def upstream_ready(self, up: UpstreamProtocol) -> None:
        """The pool has a connection for the request that waits."""
        self.waiting = False
        self.up = up
        up.assign(self)
        payload = b"".join(self._unsent)
        self._unsent = []
        up.transport.write(payload)
        self.overhead += perf_counter()
        if not self.body_done:
            self.unhold()

    def upstream_failed(self, error: OSError) -> None:
        """The pool could not connect."""
        self.waiting = False
        self._unsent = []
        self.response_broken(f"the upstream cannot be reached ({error.strerror or type(error).__name__})")

    def retry(self) -> bool:
        """The pooled connection closed without a byte of response. Send the request once more, on a new one, if that is
        harmless: the method is safe (what it asked for cannot have had an effect), and all of it is still here."""
        request = self.request
        if request is None or self._sent is None or self._retried or request.method not in SAFE_METHODS:
            return False
        self._retried = True
        self.up = None
        self.waiting = True
        self._unsent = [self._sent]
        self.overhead = -perf_counter()
        self._relay.pool.retry(self)
        return True

    def interim(self, head: ResponseHead) -> None:
        """A 1xx response; clients of HTTP/1.0 do not know them."""
        request = self.request
        if request is None or request.minor == 0 or (head.status == 100 and not request.expect):
            return
        self.transport.write(b"\r\n".join((head.status_line, *head.lines, b"", b"")))

    def upgraded(self, head: ResponseHead) -> None:
        """The upstream switched protocols: from here on bytes are bytes."""
        self.tunnel = True
        head.lines.append(b"Connection: Upgrade")
        self.transport.write(b"\r\n".join((head.status_line, *head.lines, b"", b"")))
        if self._buffer:
            assert self.up is not None
            self.up.transport.write(self._buffer)
            self._buffer = b""
        self.unhold()
        if self.eof:
            assert self.up is not None
            _pass_eof(self.up.transport)

    def tunnel_eof(self) -> None:
        """The upstream has said all it had to say."""
        if self.eof or not _pass_eof(self.transport):
            self.transport.close()

    @property
    def _last(self) -> bool:
        """No request is going to follow the present one."""
        return self._relay.draining or (self.eof and not self._buffer)

    def response_started(self, head: ResponseHead, received: float) -> bool:
        """The final head is here, read at `received`. True when the body is wanted without its chunked framing."""
        request = self.request
        assert request is not None
        lines = head.lines
        length = head.length
        modern = request.minor == 1
        close = not self._keep_alive or not self.body_done or self._last
        self._response = head
        self._received = received
        bodyless = self.head_request or head.status in {204, 304}
        if self._ear is not None:
            self._listen(head)
        if self._exchange is not None and self._hook_alive and self._wanted(head) and not bodyless:
            self._transforming = True
            if 0 <= length <= COLLECTED:
                self._mode = Mode.COLLECT
                self._collected: list[bytes] = []
            else:
                self._mode = Mode.CHUNK if modern else Mode.PLAIN
        elif length == UNTIL_CLOSE or (length == CHUNKED and not modern):
            self._mode = Mode.CHUNK if modern else Mode.PLAIN
        coded = head.framing >= 0 and lines[head.framing] == CHUNKED_LINE
        if self._mode is Mode.CHUNK and not coded:
            if head.framing >= 0:
                lines[head.framing] = CHUNKED_LINE
            else:
                lines.append(CHUNKED_LINE)
        elif head.framing >= 0 and (self._mode is Mode.PLAIN or (coded and not modern)):
            del lines[head.framing]
        if self._mode is Mode.PLAIN:
            close = True
        if close:
            lines.append(b"Connection: close")
        elif not modern:
            lines.append(b"Connection: keep-alive")
        self._keep_alive = not close
        if self._mode is not Mode.COLLECT:
            self._prefix = b"\r\n".join((head.status_line, *lines, b"", b""))
            self._held_since = self._relay.loop.time()
        return self._mode is not Mode.RAW

    def _listen(self, head: ResponseHead) -> None:
        """Hear how the response ends, where it is a generation's and can be read."""
        assert self._ear is not None
        given = {name.lower(): value for name, value in fields(head.lines)}
        if head.status != 200 or given.get(b"content-encoding", b"identity") != b"identity":
            self._ear.disabled = True
        else:
            self._ear.begin_response(stream=given.get(b"content-type", b"").startswith(b"text/event-stream"))

    def _wanted(self, head: ResponseHead) -> bool:
        assert self._exchange is not None
        try:
            return self._exchange.response_head(head.status, fields(head.lines))
        except Exception:  # noqa: BLE001  a hook that raises has lost its say
            self._hook_failed()
            return False

    def _hook_failed(self) -> None:
        self._relay.counters.hook_raised()
        self._hook_alive = False
        self._transforming = False

    def response_data(self, data: bytes) -> None:
        """More of the response's body, in its framing or without, as `response_started` asked for."""
        mode = self._mode
        if mode is Mode.COLLECT:
            self._collected.append(data)
            return
        if self._transforming and data:
            assert self._exchange is not None
            try:
                data = self._exchange.response_data(data)
            except Exception:  # noqa: BLE001  a hook that raises has lost its say
                self._hook_failed()
        if self._transforming and not data and self._own is not None:
            self._received = perf_counter()
            return
        if self._ear is not None:
            self._ear.feed_response(data)
        if mode is Mode.CHUNK:
            data = chunk(data)
        if self._prefix:
            self._send_head(data)
        elif data:
            self.transport.write(data)

    def _send_head(self, data: bytes) -> None:
        """With the first bytes of the body, in their framing."""
        self.transport.write(self._prefix + data)
        self._prefix = b""
        self._own = None
        self._head_sent = True
        self.overhead += perf_counter() - self._received

    def response_end(self) -> None:
        """The response is complete, and the upstream connection no longer this client's."""
        self.up = None
        head = self._response
        assert head is not None
        if self._mode is Mode.COLLECT:
            started = perf_counter()
            body = b"".join(self._collected)
            self._collected = []
            if self._transforming:
                assert self._exchange is not None
                try:
                    given = self._exchange.response_data(body)
                    if self._replay():
                        return
                    if self._transforming:
                        body = given + self._exchange.response_end()
                except Exception:  # noqa: BLE001  a hook that raises has lost its say
                    self._hook_failed()
            if self._ear is not None:
                self._ear.feed_response(body)
            set_length(head.lines, head.framing, len(body))
            self.transport.write(b"\r\n".join((head.status_line, *head.lines, b"", body)))
            self.overhead += perf_counter() - started
        else:
            if self._prefix and self._replay():
                return
            tail = b""
            if self._transforming:
                assert self._exchange is not None
                try:
                    tail = self._exchange.response_end()
                except Exception:  # noqa: BLE001  a hook that raises has lost its say
                    self._hook_failed()
                if self._ear is not None:
                    self._ear.feed_response(tail)
            if self._mode is Mode.CHUNK:
                tail = chunk(tail) + LAST_CHUNK
            if self._prefix:
                self._send_head(tail)
            elif tail:
                self.transport.write(tail)
        self._relay.counters.observe_overhead(self.overhead)
        status = head.status
        keep = self._keep_alive and self.body_done
        self._finish(
            counters.OK if status < 400 else counters.CLIENT_ERROR if status < 500 else counters.SERVER_ERROR,
            complete=True,
        )
        if keep:
            self._next()
        else:
            self._linger()

    def response_broken(self, reason: str) -> None:
        """There will be no (more) response: a 502, or the end of the connection where the head is out already."""
        self.up = None
        if not self._head_sent:
            self._answer(502, error_body(502, reason, "upstream_failed"), counters.UPSTREAM_FAILED)
            return
        plain = self._mode is Mode.PLAIN
        self._finish(counters.UPSTREAM_FAILED)
        self._lingering = True
        if plain:
            # An orderly end would look like the end of the body.
            self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self.transport.abort()
        else:
            self.transport.close()

    # Answers of our own, and ends.

    def _refuse(self, error: BadRequest) -> None:
        """The request cannot be understood, so that nothing after it can be either."""
        self._relay.counters.request(routes.OTHER, counters.REFUSED)
        body = error_body(error.status, error.message, error.code)
        self.transport.write(error_response(error.status, body, connection=b"Connection: close\r\n"))
        self._linger()

    def _break_off(self, error: BadRequest) -> None:
        """The request went wrong after its head had been accepted."""
        up, self.up = self.up, None
        if up is not None:
            up.abandon()
        if self.waiting:
            self._relay.pool.cancel(self)
            self.waiting = False
        if self._head_sent:
            self._finish(counters.REFUSED)
            self._lingering = True
            self.transport.close()
        else:
            self._answer(error.status, error_body(error.status, error.message, error.code), counters.REFUSED)

    def _answer(self, status: int, body: bytes, outcome: str) -> None:
        """Answer the present request ourselves."""
        request = self.request
        assert request is not None
        keep = self._keep_alive and self.body_done and not self._last
        connection = b"" if keep and request.minor else b"Connection: %b\r\n" % (b"keep-alive" if keep else b"close")
        self.transport.write(error_response(status, body, connection=connection, bodyless=self.head_request))
        self._finish(outcome)
        if keep:
            self._next()
        else:
            self._linger()

    def _finish(self, outcome: str, *, complete: bool = False) -> None:
        """The present exchange is over."""
        self._relay.counters.request(self._route, outcome)
        exchange, self._exchange = self._exchange, None
        ear, span, response = self._ear, self._span, self._response
        self._parts = None
        self._chunks = None
        self._unsent = []
        self._reset()
        if ear is not None:
            arm = "none" if exchange is None else exchange.arm
            ended = ResponseOutcome()
            try:
                if complete and outcome is counters.OK:
                    ended = ear.finish(arm, self._relay.counters.add)
            except Exception:  # noqa: BLE001  an outcome that cannot be judged is nobody's trouble
                self._relay.counters.add(outcomes.UNJUDGED, ())
            if span is not None or self._relay.log_requests:
                self._tell(ear, ended, span, arm, 0 if response is None else response.status, outcome)
        if exchange is not None:
            try:
                exchange.closed(complete=complete)
            except Exception:  # noqa: BLE001  a hook that raises has lost its say
                self._relay.counters.hook_raised()

    def _tell(
        self,
        ear: OutcomeObserver,
        ended: ResponseOutcome,
        span: RequestSpan | None,
        arm: str,
        status: int,
        outcome: str,
    ) -> None:
        """Who asked for it to be told: the trace, the log. Never what was said."""
        try:
            if self._relay.log_requests:
                request_log.info(
                    "request",
                    extra={
                        "request_id": self._request_id,
                        "route": self._route,
                        "status": status,
                        "outcome": outcome,
                        "arm": arm,
                        "finish_reasons": list(ended.finish_reasons),
                        "output_tokens": ended.output_tokens,
                        "seconds": round(perf_counter() - self._began, 6),
                        **({} if span is None else span.log_fields()),
                    },
                )
            if span is not None:
                span.end(
                    status=status,
                    outcome=outcome,
                    error=outcome != counters.OK,
                    attributes={
                        "gen_ai.request.model": ear.model,
                        "gen_ai.response.finish_reasons": ended.finish_reasons or None,
                        "gen_ai.usage.output_tokens": ended.output_tokens,
                        "hemostat.arm": arm,
                    },
                )
        except Exception:  # noqa: BLE001  tracing and logging may fail, requests may not
            self._relay.counters.add(outcomes.UNTRACED, ())

    def _next(self) -> None:
        self.since = self._relay.loop.time()
        if self._relay.draining and not self._buffer:
            self.transport.close()
        elif self._buffer or self._held or self.eof:
            self._advance()

    def _linger(self) -> None:
        """Close, but not before the client had the chance to read: closing on unread input would reset it."""
        self._lingering = True
        self._buffer = b""
        if self.eof or self.transport.is_closing():
            self.transport.close()
            return
        self.unhold()
        self.transport.write_eof()
        self._relay.loop.call_later(LINGER_SECONDS, self.transport.close)

    # Slow and vanished clients.

    def hold(self) -> None:
        """Take nothing more from the client for now."""
        if not self._held and not self.eof and not self.transport.is_closing():
            self._held = True
            self.transport.pause_reading()
            self._watch()

    def unhold(self) -> None:
        if self._held:
            self._held = False
            if not self.eof and not self.transport.is_closing():
                self.transport.resume_reading()

    def _watch(self) -> None:
        """From here on the transport would not see the client go; so look at the connection's state now and then."""
        if self._watcher is None and _STATE_KNOWN:
            self._watcher = self._relay.loop.call_later(0.0 if self.eof else WATCH_SECONDS, self._look)

    def _look(self) -> None:
        self._watcher = None
        if self._lingering or not (self.eof or self._held):
            return
        state = self.transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
        if state == _TCP_CLOSE:
            self.transport.abort()
            return
        again = WATCH_SECONDS
        if state == _TCP_CLOSE_WAIT and self.request is not None and not self._probed:
            self._probed = self._probe()
            again = ANSWER_SECONDS
        self._watcher = self._relay.loop.call_later(again, self._look)

    def _probe(self) -> bool:
        """The client's end is shut for sending. A client that is gone answers any byte with a reset, one that reads on
        does not. Send what means nothing: an interim response before the head, a zero before a chunk's size. False if
        there is no such thing at this point.
        """
        request = self.request
        assert request is not None
        if request.minor == 0 or self.tunnel:
            return False
        if not self._head_sent:
            self.transport.write(CONTINUE)
            return True
        if self._mode is Mode.CHUNK or (self._mode is Mode.RAW and self.up is not None and self.up.between_chunks):
            self.transport.write(b"0")
            return True
        return False

    def sweep(self, now: float) -> None:
        """Close the connection of a client that has kept us waiting for too long."""
        limits = self._relay.limits
        waited = now - self.since
        if self._lingering or self.tunnel:
            return
        if self._prefix and self._relay.loop.time() - self._held_since > HEAD_SECONDS:
            self._send_head(b"")
        if self.request is None:
            if self._buffer and waited > limits.head_seconds and not self.paused:
                self._refuse(BadRequest(408, f"the request head took more than {limits.head_seconds:g} s"))
            elif not self._buffer and waited > limits.idle_seconds:
                self.transport.close()
        elif not self.body_done and not self._held and waited > limits.body_seconds:
            self._break_off(BadRequest(408, f"no byte of the body for {limits.body_seconds:g} s"))

    def drain(self) -> None:
        """Close as soon as nothing is in flight."""
        if self.request is None and not self._buffer and not self._lingering:
            self.transport.close()


def _pass_eof(transport: asyncio.Transport) -> bool:
    """Shut down the sending side; where that cannot be (TLS), close. True if the other direction stays open."""
    if transport.is_closing():
        return False
    if transport.can_write_eof():
        transport.write_eof()
        return True
    transport.close()
    return False


def _drop(request: RequestHead, names: frozenset[bytes]) -> None:
    """Leave out fields by their lower-case names; the framing field stays."""
    framing = request.lines[request.framing] if request.framing >= 0 else None
    request.lines = [line for line in request.lines if line is framing or line.partition(b":")[0].lower() not in names]
    request.framing = request.lines.index(framing) if framing is not None else -1
