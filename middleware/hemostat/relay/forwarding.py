"""Builds the head that goes upstream from the one that the client sent."""

from __future__ import annotations

import random
from typing import Final

from hemostat.ipc.origin import Origin
from hemostat.relay.http.request import RequestHead

MAX_REQUEST_ID: Final = 200
"""The largest number of bytes of a client's X-Request-Id that are kept in logs, traces and records; all of it goes
upstream."""

_random: Final = random.Random()  # noqa: S311  identifiers, not secrets

_DIGITS_AT_ONCE: Final = 4096


class _RandomDigits:
    """Random hexadecimal digits, made many at a time, since a call costs more than what it makes. Owns those left."""

    __slots__ = ("_digits", "_used")

    def __init__(self) -> None:
        self._digits = b""
        self._used = 0

    def take(self, number: int) -> bytes:
        start, end = self._used, self._used + number
        if end > len(self._digits):
            self._digits = _random.randbytes(_DIGITS_AT_ONCE // 2).hex().encode()
            start, end = 0, number
        self._used = end
        return self._digits[start:end]


_digits: Final = _RandomDigits()


def new_request_id() -> bytes:
    """Returns a random UUID (version 4, its variant always the digit 8) in 32 hexadecimal digits."""
    digits = _digits.take(30)
    return digits[:12] + b"4" + digits[12:15] + b"8" + digits[15:]


def _new_traceparent() -> bytes:
    """Returns a field line. Both ids end in 1, so that neither is zero."""
    digits = _digits.take(46)
    return b"traceparent: 00-" + digits[:31] + b"1-" + digits[31:] + b"1-00"


def ensure_request_id(request: RequestHead) -> str:
    """Returns the request's id, as it is kept here; one is added where the client sent none."""
    if request.request_id is not None:
        return request.request_id[:MAX_REQUEST_ID].decode("latin-1")
    request_id = new_request_id()
    request.lines.append(b"X-Request-Id: " + request_id)
    return request_id.decode("ascii")


def upstream_head(request: RequestHead, origin: Origin, authorization: bytes | None) -> bytes:
    """Returns the head as it goes upstream, its closing empty line included. Adds the missing fields to
    `request.lines`.

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
        lines.append(_new_traceparent())
    if authorization is not None and not request.authorization:
        lines.append(authorization)
    if request.upgrade:
        lines.append(b"Connection: Upgrade")
        lines.append(b"Upgrade: websocket")
    return b"%b %b HTTP/1.1\r\n%b\r\n\r\n" % (request.method, request.target, b"\r\n".join(lines))


def redirected(payload: bytes, old: Origin, new: Origin) -> bytes:
    """Returns a request that was written for one engine, as it goes to another one of the same scheme. See
    `upstream_head` for why only TLS changes it."""
    if not new.tls:
        return payload
    return payload.replace(b"\r\nHost: %b\r\n" % old.authority, b"\r\nHost: %b\r\n" % new.authority, 1)
