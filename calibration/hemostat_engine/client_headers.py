"""The headers of clients, for passive mode: `vllm serve --middleware hemostat_engine.client_headers.ClientHeaders`.

The engine's client gets no headers from vLLM's server. This ASGI middleware keeps the headers of the request in a
context variable, which `passive` reads where the request is sampled. It changes neither the request nor the answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final

_Scope = MutableMapping[str, Any]
_App = Callable[[_Scope, Any, Any], Awaitable[None]]

_SHADOW: Final = b"x-hemostat-shadow"
_LABEL: Final = b"x-hemostat-label"
_CLIENT_BYTES: Final = 8
_PERSON: Final = b"hemostat client"

_headers: ContextVar[Iterable[tuple[bytes, bytes]] | None] = ContextVar("hemostat_headers", default=None)


class ClientHeaders:
    """The ASGI middleware."""

    in_force = False
    """It is True once vLLM has made one."""

    def __init__(self, app: _App) -> None:
        self._app = app
        ClientHeaders.in_force = True

    async def __call__(self, scope: _Scope, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            _headers.set(scope["headers"])
        await self._app(scope, receive, send)


@dataclass(frozen=True, slots=True)
class Options:
    """The options that the headers of the current request ask for.

    shadow: `on`, `off`, or None without the header. Any other value means `off`, as nothing here can refuse a request.
    """

    shadow: str | None = None
    label: str = ""
    client: bytes = b""


def current(client_header: str, salt: bytes) -> Options:
    """Returns the options of the current request. client_header: lower-case. salt: see `PassivePolicy`."""
    shadow, label, client = None, "", b""
    named = client_header.encode("latin-1", "replace")
    for name, value in _headers.get() or ():
        if name == _SHADOW and shadow is None:
            shadow = "on" if value.strip() == b"on" else "off"
        elif name == _LABEL and not label:
            label = value.decode("latin-1").strip()
        if name == named and not client:
            client = value
    return Options(shadow, label, _digest(client, salt))


def _digest(value: bytes, salt: bytes) -> bytes:
    """Returns the digest that a relay would make of the header."""
    words = value.split()
    if not words:
        return b""
    if len(words) > 1:
        words[0] = words[0].lower()
    return hashlib.blake2b(b" ".join(words), digest_size=_CLIENT_BYTES, key=salt, person=_PERSON).digest()
