"""Parses and checks request heads."""

from __future__ import annotations

import re
from typing import Final

from hemostat.relay.http.errors import BadRequest
from hemostat.relay.http.fields import LINE_BYTES, TOKEN, connection_options, drop_fields, read_field, remember
from hemostat.relay.http.framing import CHUNKED, CHUNKED_LINE, parse_length

CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
SAFE_METHODS: Final = frozenset((b"GET", b"HEAD", b"OPTIONS", b"TRACE"))
"""The methods without side effects, so that a request may be sent twice (RFC 9110, 9.2.1)."""

_request_line: Final = re.compile(rb"(" + TOKEN + rb"{1,64}) ([\x21-\x7e\x80-\xff]+) HTTP/1\.([01])").fullmatch
_other_version: Final = re.compile(TOKEN + rb"+ [^ ]+ HTTP/(?!1\.[01])[0-9](?:\.[0-9])?").fullmatch
_host: Final = re.compile(rb"[A-Za-z0-9\-._~!$&'()*+;=:\[\]%]*").fullmatch
_absolute: Final = re.compile(rb"https?://([^/?#]+)(.*)", re.IGNORECASE).fullmatch

_KEPT: Final = frozenset((b"content-type", b"content-encoding"))
_MAX_CACHED: Final = 256
_MAX_CACHED_BYTES: Final = 128
# Request lines seen before, and valid values of Host. Bounded, and emptied when full. What may contain a secret is not
# kept: a target with a query, or with an authority, which may name a user and a password.
_request_lines: Final[dict[bytes, tuple[bytes, bytes, int]]] = {}
_hosts: Final[dict[bytes, bool]] = {}


class RequestHead:
    """A request's head, checked."""

    __slots__ = (
        "authorization",
        "expect",
        "framing",
        "keep_alive",
        "length",
        "lines",
        "marked",
        "method",
        "minor",
        "received",
        "request_id",
        "target",
        "traceparent",
        "upgrade",
    )

    def __init__(self, method: bytes, target: bytes, minor: int) -> None:
        self.method = method
        self.target = target
        self.minor = minor
        """The minor version of HTTP/1: 0 or 1."""
        self.received: list[bytes] = []
        """All field lines, as the client sent them."""
        self.marked = False
        """It is True if the name of one of the fields begins with X-Hemostat-."""
        self.lines: list[bytes] = []
        """The fields that are forwarded, unchanged."""
        self.length = 0
        """The number of bytes of body, or CHUNKED."""
        self.framing = -1
        """The index in `lines` of the field that frames the body, -1 without one."""
        self.keep_alive = minor == 1
        self.expect = False
        """It is True if the client waits for `100 Continue` before it sends the body."""
        self.upgrade = False
        """It is True if the client wants to switch to WebSocket."""
        self.authorization = False
        """It is True if there is an Authorization field."""
        self.request_id: bytes | None = None
        """The value of the first X-Request-Id."""
        self.traceparent = False
        """It is True if there is a traceparent field."""

    def drop(self, names: frozenset[bytes]) -> None:
        """Removes fields by their lower-case names; the framing field stays."""
        self.lines, self.framing = drop_fields(self.lines, self.framing, names)


def parse_request(head: bytes, max_headers: int) -> RequestHead:
    """Returns a checked head (given without its closing empty line) with the fields to forward. Raises BadRequest,
    which says what is wrong."""
    lines = head.split(b"\r\n")
    breaks = len(lines) - 1
    if head.translate(None, LINE_BYTES) != b"\r\n" * breaks:
        raise BadRequest(400, "the request head contains a control character, or CR or LF alone")
    known = _request_lines.get(lines[0])
    method, target, minor = _read_request_line(lines[0]) if known is None else known
    if breaks > max_headers:
        raise BadRequest(431, f"more than {max_headers} header fields")
    request = RequestHead(method, target, minor)
    kept = request.lines
    options: set[bytes] | None = None
    hosts = 0
    host_at = -1
    coded = sized = upgrades = False
    del lines[0]
    request.received = lines
    for line in lines:
        try:
            special, value = read_field(line)
        except ValueError as error:
            raise BadRequest(400, str(error)) from None
        if not special:
            kept.append(line)
            continue
        if special == b"host":
            hosts += 1
            if value not in _hosts and not _valid_host(value):
                raise BadRequest(400, "Host is malformed")
            host_at = len(kept)
            kept.append(line)
        elif special in _KEPT:
            kept.append(line)
        elif special == b"content-length":
            if sized:
                raise BadRequest(400, "Content-Length is given twice")
            sized = True
            try:
                request.length = parse_length(value)
            except ValueError:
                raise BadRequest(400, "Content-Length is not a number") from None
            request.framing = len(kept)
            kept.append(line)
        elif special == b"transfer-encoding":
            if coded or value.lower() != b"chunked" or request.minor == 0:
                raise BadRequest(400, "Transfer-Encoding must be `chunked`, once, in HTTP/1.1")
            coded = True
            request.length = CHUNKED
            request.framing = len(kept)
            kept.append(CHUNKED_LINE)
        elif special == b"connection":
            if value != b"keep-alive" or request.minor == 0:
                options = connection_options(value) if options is None else options | connection_options(value)
        elif special == b"upgrade":
            upgrades = upgrades or value.lower() == b"websocket"
        elif special == b"expect":
            # It has no meaning in HTTP/1.0, but the upstream might wait for it.
            if value.lower() == b"100-continue":
                request.expect = request.minor == 1
                if not request.expect:
                    continue
            kept.append(line)
        elif special == b"authorization":
            request.authorization = True
            kept.append(line)
        elif special == b"x-request-id":
            if request.request_id is None:
                request.request_id = value
            kept.append(line)
        elif special == b"traceparent":
            request.traceparent = True
            kept.append(line)
        elif special == b"x-hemostat":
            request.marked = True
    if sized and coded:
        raise BadRequest(400, "both Content-Length and Transfer-Encoding are given")
    if hosts > 1 or (hosts == 0 and request.minor == 1):
        raise BadRequest(400, "exactly one Host is needed")
    if options is not None:
        if b"close" in options:
            request.keep_alive = False
        elif request.minor == 0:
            request.keep_alive = b"keep-alive" in options
        # Only WebSocket: an upgrade to h2c would bypass every rule in this file.
        request.upgrade = (
            upgrades and b"upgrade" in options and request.minor == 1 and request.length == 0 and method == b"GET"
        )
        if options - {b"close", b"keep-alive", b"upgrade", b"te"}:
            _drop_connection_fields(request, options)
            host_at = next((i for i, line in enumerate(request.lines) if line[:5].lower() == b"host:"), -1)
    if target[:1] != b"/":
        _to_origin_form(request, host_at)
    return request


def _read_request_line(line: bytes) -> tuple[bytes, bytes, int]:
    """Returns the method, the target and the minor version. The result is cached."""
    match = _request_line(line)
    if match is None:
        if _other_version(line):
            raise BadRequest(505, "only HTTP/1.0 and HTTP/1.1 are supported")
        raise BadRequest(400, "the request line is malformed")
    result = match[1], match[2], 1 if match[3] == b"1" else 0
    if result[1][:1] == b"/" and b"?" not in line:
        remember(_request_lines, line, result, _MAX_CACHED, _MAX_CACHED_BYTES)
    return result


def _valid_host(value: bytes) -> bool:
    """Returns True if Host may have this value. A valid one is cached."""
    if _host(value) is None:
        return False
    remember(_hosts, value, True, _MAX_CACHED, _MAX_CACHED_BYTES)
    return True


def _drop_connection_fields(request: RequestHead, options: set[bytes]) -> None:
    """Removes the fields that Connection names."""
    if request.request_id is not None and b"x-request-id" in options:
        request.request_id = None
    request.traceparent = request.traceparent and b"traceparent" not in options
    request.authorization = request.authorization and b"authorization" not in options
    request.expect = request.expect and b"expect" not in options
    request.lines, request.framing = drop_fields(request.lines, request.framing, options)


def _to_origin_form(request: RequestHead, host_at: int) -> None:
    """Converts a target in absolute form to origin form; its authority replaces Host (RFC 9112, 3.2.2)."""
    if request.method == b"CONNECT":
        raise BadRequest(501, "CONNECT is for forward proxies")
    if request.target == b"*" and request.method == b"OPTIONS":
        return
    match = _absolute(request.target)
    if match is None or _host(match[1]) is None:
        raise BadRequest(400, "the request target is malformed")
    rest = match[2]
    request.target = rest if rest[:1] == b"/" else b"/" + rest
    if host_at >= 0:
        request.lines[host_at] = b"Host: " + match[1]
