"""What stands between the admin port and whoever reaches it: names, headers, sizes, patience. No state of Hemostat's.

- A page that rebinds its own name to this address (DNS rebinding) is refused by the name that it is called by.
- A head is bounded in bytes and in time, connections in number, so that one who may not do anything can not fill the
  memory of the control process either. (uvicorn's other parser, httptools, takes heads of any size.)
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

HEAD_BYTES = 16 * 1024
HEAD_WITHIN = 10.0
"""Seconds from a connection's start, or a request's first byte, to the end of the request's head."""
CONNECTIONS_AT_MOST = 256
"""Above it: 503."""
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
    """ASGI: adds HEADERS, refuses hosts that are none of ours (421). names: None: any name will do."""

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
        if self._names is None or not host or is_ours(host, self._names):
            await self._app(scope, receive, hardened)
        else:
            said = "not called by this name; list it in admin.allowed_hosts, or use the address"
            body = json.dumps({"detail": said}).encode()
            kind = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
            await hardened({"type": "http.response.start", "status": 421, "headers": kind})
            await hardened({"type": "http.response.body", "body": body})


def is_ours(host: str, names: Collection[str]) -> bool:
    """Whether a Host header is an address, localhost, or one of `names` (whose port does not matter).

    An address cannot be rebound; a name can, by whoever owns it. No header comes from no browser.
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


class Patient(H11Protocol):
    """uvicorn's protocol, that waits for a head no longer than HEAD_WITHIN."""

    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self._idle:
            self._stop_waiting()
        elif self._waiting is None:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    @property
    def _idle(self) -> bool:
        """No request is being answered: what comes now is (part of) a head, or what nobody wants to read."""
        return self.cycle is None or self.cycle.response_complete

    def _wait(self) -> None:
        self._waiting = self.loop.call_later(HEAD_WITHIN, self._give_up)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _give_up(self) -> None:
        self._waiting = None
        if self._idle:
            self.transport.abort()


def server_settings() -> dict[str, Any]:
    """For uvicorn.Config."""
    return {
        "http": Patient,
        "ws": "none",
        "h11_max_incomplete_event_size": HEAD_BYTES,
        "limit_concurrency": CONNECTIONS_AT_MOST,
        "timeout_graceful_shutdown": 2,
        "server_header": False,
        "proxy_headers": False,
        "log_level": "error",
        "access_log": False,
    }
