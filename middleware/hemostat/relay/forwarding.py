"""Builds the head that goes upstream from the one that the client sent."""

from __future__ import annotations

import random

from hemostat.relay.http.request import RequestHead
from hemostat.relay.upstreams.origin import Origin

MAX_REQUEST_ID = 200
"""Bytes of a client's X-Request-Id that are kept in logs, traces and records; all of it goes upstream."""

_random = random.Random()  # noqa: S311  identifiers, not secrets


def new_request_id() -> str:
    """A random UUID (version 4) in 32 hexadecimal digits."""
    bits = _random.getrandbits(128) & ~(0xF << 76) & ~(0x3 << 62) | (0x4 << 76) | (0x2 << 62)
    return f"{bits:032x}"


def _new_trace() -> tuple[int, int]:
    """Trace id and parent id, both different from zero."""
    bits = _random.getrandbits(192)
    return bits >> 64 | 1, bits & 0xFFFFFFFFFFFFFFFF | 1


def ensure_request_id(request: RequestHead) -> str:
    """The request's id, as it is kept here; one is added where the client sent none."""
    if request.request_id is not None:
        return request.request_id[:MAX_REQUEST_ID].decode("latin-1")
    request_id = new_request_id()
    request.lines.append(b"X-Request-Id: " + request_id.encode())
    return request_id


def upstream_head(request: RequestHead, origin: Origin, authorization: bytes | None) -> bytes:
    """The head as it goes upstream, its closing empty line included. Adds the missing fields to `request.lines`.

    authorization: field line for a request without one.

    Host: for a plain upstream it is the client's own, so that redirects and links that the server builds from it lead
    back here; over TLS it is the upstream's, since it has to agree with the certificate's name.
    """
    lines = request.lines
    if origin.tls or request.minor == 0:
        host = b"Host: " + origin.authority
        at = next((i for i, line in enumerate(lines) if line[:5].lower() == b"host:"), -1)
        if at < 0:
            lines.append(host)
        elif origin.tls:
            lines[at] = host
    if not request.traceparent:
        lines.append(b"traceparent: 00-%032x-%016x-00" % _new_trace())
    if authorization is not None and not request.authorization:
        lines.append(authorization)
    if request.upgrade:
        lines.append(b"Connection: Upgrade")
        lines.append(b"Upgrade: websocket")
    return b"%b %b HTTP/1.1\r\n%b\r\n\r\n" % (request.method, request.target, b"\r\n".join(lines))


def redirected(payload: bytes, old: Origin, new: Origin) -> bytes:
    """A request that was written for one engine, as it goes to another one of the same scheme. See `upstream_head` for
    why only TLS changes it."""
    if not new.tls:
        return payload
    return payload.replace(b"\r\nHost: %b\r\n" % old.authority, b"\r\nHost: %b\r\n" % new.authority, 1)
