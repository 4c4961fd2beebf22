"""Protects the admin port from whoever can reach it: host names, response headers, limits of size, time and number.

- DNS rebinding (a page whose own host name resolves to this address) is refused by the request's Host header.
- Request heads are limited in bytes and in time, connections in number, so that a client without the token cannot fill
  the memory of the control process. (uvicorn's other parser, httptools, accepts heads of any size.)
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
"""Limit from a connection's start, or a request's first byte, to the end of the request's head."""
MAX_CONNECTIONS = 256
"""More are answered with 503."""
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
"""Of every response. No CORS header is among them: other sites' pages may not read anything."""

_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:]+))(?::\d*)?")


class Harden:
    """ASGI middleware: adds HEADERS, answers 421 to a Host that is not allowed. names: None allows any."""

    def __init__(self, app: ASGIApp, names: Collection[str] | None) -> None:
        self._app = app
        self._names = names
        self._headers = [(name.encode(), value.encode()) for name, value in HEADERS.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def hardened(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *self._headers]
            await send(message)

        host = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"host"), "")
        if self._names is None or not host or is_allowed_host(host, self._names):
            await self._app(scope, receive, hardened)
        else:
            detail = "this host name is not allowed; list it in admin.allowed_hosts, or use the address"
            body = json.dumps({"detail": detail}).encode()
            kind = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
            await hardened({"type": "http.response.start", "status": 421, "headers": kind})
            await hardened({"type": "http.response.body", "body": body})


def is_allowed_host(host: str, names: Collection[str]) -> bool:
    """Whether a Host header is an address, localhost, or one of `names`; the port does not matter.

    An address cannot be rebound; a name can, by its owner. Browsers always send the header.
    """
    found = _HOST.fullmatch(host)
    if found is None:
        return False
    name = (found[1] or found[2]).rstrip(".").lower()
    if name == "localhost" or name in {one.lower() for one in names}:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class HeadTimeoutProtocol(H11Protocol):
    """uvicorn's protocol, which aborts a connection whose request head is not complete within HEAD_SECONDS."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_timer()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self._idle:
            self._stop_timer()
        elif self._timer is None:
            self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    @property
    def _idle(self) -> bool:
        """No request is being answered: incoming bytes belong to a head, or are to be discarded."""
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
    """For uvicorn.Config."""
    return {
        "http": HeadTimeoutProtocol,
        "ws": "none",
        "h11_max_incomplete_event_size": MAX_HEAD_BYTES,
        "limit_concurrency": MAX_CONNECTIONS,
        "timeout_graceful_shutdown": 2,
        "server_header": False,
        "proxy_headers": False,
        "log_level": "error",
        "access_log": False,
    }
