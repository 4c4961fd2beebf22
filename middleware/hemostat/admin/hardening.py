"""Protects the admin port from whoever can reach it: host names, response headers, limits of size, time and number.

- DNS rebinding (a page whose own host name resolves to this address) is refused by the request's Host header.
- Request heads are limited in bytes and in time, connections and requests in number, so that a client without the token
  cannot fill the memory of the control process. (uvicorn's other parser, httptools, accepts heads of any size.)
- Kubernetes restarts a pod whose /livez does not answer. So probes are answered whatever others do: a new connection is
  always taken, in place of the one that has waited longest for a request, and the limit of requests is not for probes.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import re
from collections.abc import Collection
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_HEAD_BYTES = 16 * 1024
HEAD_SECONDS = 10.0
"""The limit from a connection's start, or a request's first byte, to the end of the request's head."""
MAX_WAITING = 256
"""The largest number of connections without a request; those that have waited longest are closed for others."""
MAX_WAITING_PER_ADDRESS = 64
MAX_REQUESTS = 256
"""The largest number of requests at a time; more are answered with 503."""
RETRY_AFTER = "2"
"""The Retry-After, in seconds, of every answer with 503. By then another process is active, or this one has been
started again.
"""
STOPS = "this process stops, and did not finish this; look at the state in a moment, and ask again if it is not done"
PROBES = frozenset({"/livez", "/readyz"})
HEADERS = {
    "content-security-policy": "default-src 'none'; connect-src 'self'; style-src 'self'; script-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-frame-options": "DENY",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
"""The headers of every response. No CORS header is among them: other sites' pages may not read anything."""

_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:]+))(?::\d*)?")


class Harden:
    """ASGI middleware: adds HEADERS, answers 421 to a Host that is not allowed, and 503 to requests beyond
    MAX_REQUESTS or that the stop of the process cuts off. names: None allows any. closing: set when the process stops.
    """

    def __init__(self, app: ASGIApp, names: Collection[str] | None, closing: asyncio.Event) -> None:
        self._app = app
        self._names = names
        self._closing = closing
        self._requests = 0
        """The number of requests in progress."""
        self._headers = [(name.encode(), value.encode()) for name, value in HEADERS.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        started = False

        async def hardened(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message.get("headers", ()), *self._headers]
            await send(message)

        host = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"host"), "")
        if self._names is not None and host and not is_allowed_host(host, self._names):
            detail = "this host name is not allowed; list it in admin.allowed_hosts, or use the address"
            await _refuse(hardened, 421, detail)
        elif self._requests >= MAX_REQUESTS and scope["path"] not in PROBES:
            await _refuse(hardened, 503, "too many requests at a time")
        else:
            self._requests += 1
            try:
                await self._app(scope, receive, hardened)
            except asyncio.CancelledError:
                # The server cancels what takes longer than its stop may take, and would answer with 500.
                if started or not self._closing.is_set():
                    raise
                await _refuse(hardened, 503, STOPS)
            finally:
                self._requests -= 1


async def _refuse(send: Send, status: int, detail: str) -> None:
    body = json.dumps({"detail": detail}).encode()
    kind = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    if status == 503:
        kind.append((b"retry-after", RETRY_AFTER.encode()))
    await send({"type": "http.response.start", "status": status, "headers": kind})
    await send({"type": "http.response.body", "body": body})


def is_allowed_host(host: str, names: Collection[str]) -> bool:
    """Returns True if a Host header is an address, localhost, or one of `names`; the port does not matter.

    An address cannot be rebound; a name can, by its owner. Browsers always send the header.
    """
    match = _HOST.fullmatch(host)
    if match is None:
        return False
    name = (match[1] or match[2]).rstrip(".").lower()
    if name == "localhost" or name in {allowed.lower() for allowed in names}:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class Waiting:
    """The connections of one server that wait for a request, or for the rest of its head. Owns their order."""

    def __init__(self) -> None:
        self._addresses: dict[HeadTimeoutProtocol, str] = {}
        """The addresses of the waiting connections; the connections that have waited longest come first."""

    def add(self, connection: HeadTimeoutProtocol, address: str) -> None:
        """Notes that a connection begins to wait. It may abort another one."""
        self._addresses.setdefault(connection, address)
        own = [connection for connection, its in self._addresses.items() if its == address]
        if len(own) > MAX_WAITING_PER_ADDRESS:
            own[0].transport.abort()
            self.remove(own[0])
        elif len(self._addresses) > MAX_WAITING:
            oldest = next(iter(self._addresses))
            oldest.transport.abort()
            self.remove(oldest)

    def remove(self, connection: HeadTimeoutProtocol) -> None:
        self._addresses.pop(connection, None)


class HeadTimeoutProtocol(H11Protocol):
    """A protocol for uvicorn that aborts a connection whose request head is not complete within HEAD_SECONDS."""

    waiting: Waiting
    """The waiting connections; the connections of a server share it."""
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_timer()
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self._idle:
            self._stop_timer()
            self.waiting.remove(self)
        elif self._timer is None:
            self._start_timer()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._idle and not self.transport.is_closing():
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self.waiting.remove(self)
        super().connection_lost(exc)

    def _wait(self) -> None:
        self.waiting.add(self, self.client[0] if self.client else "")

    @property
    def _idle(self) -> bool:
        """It is True if no request is being answered: incoming bytes belong to a head, or are to be discarded."""
        return self.cycle is None or self.cycle.response_complete

    def _start_timer(self) -> None:
        self._timer = self.loop.call_later(HEAD_SECONDS, self._abort)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _abort(self) -> None:
        self._timer = None
        if self._idle:
            self.transport.abort()


def server_settings() -> dict[str, Any]:
    """Returns the arguments for uvicorn.Config."""
    protocol = type("Protocol", (HeadTimeoutProtocol,), {"waiting": Waiting()})
    return {
        "http": protocol,
        "ws": "none",
        "h11_max_incomplete_event_size": MAX_HEAD_BYTES,
        "timeout_graceful_shutdown": 2,
        "server_header": False,
        "proxy_headers": False,
        "log_level": "error",
        "access_log": False,
    }
