"""HTTP/1.1 as an intermediary must speak it (RFC 9110, 9112): rules on bytes, without a socket, a clock or randomness.

Heads are read here and not by llhttp: llhttp knows a fixed list of methods, where a proxy has to pass on any token, and
it hides the raw bytes, which have to be sent on as they were and searched for what two parsers could read differently.
The rule for requests: whatever is ambiguous is refused with 400, so that no two servers ever disagree on where a
message ends. Heads are cut into lines; those that an intermediary must not pass on are left out, the rest is untouched.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from hemostat.relay.hooks import Headers

CHUNKED = -1
"""`length` of a body in the chunked coding."""
UNTIL_CLOSE = -2
"""`length` of a response body that ends with the connection."""

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"
CHUNKED_LINE = b"Transfer-Encoding: chunked"
SAFE_METHODS = frozenset((b"GET", b"HEAD", b"OPTIONS", b"TRACE"))
"""Sending these twice asks for nothing twice (RFC 9110, 9.2.1)."""

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]"
_token = re.compile(_TOKEN + rb"+").fullmatch
_request_line = re.compile(rb"(" + _TOKEN + rb"{1,64}) ([\x21-\x7e\x80-\xff]+) HTTP/1\.([01])").fullmatch
_other_version = re.compile(_TOKEN + rb"+ [^ ]+ HTTP/(?!1\.[01])[0-9](?:\.[0-9])?").fullmatch
_status_line = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9][0-9])(?: [^\r\n]*)?").fullmatch
_host = re.compile(rb"[A-Za-z0-9\-._~!$&'()*+;=:\[\]%]*").fullmatch
_absolute = re.compile(rb"https?://([^/?#]+)(.*)", re.IGNORECASE).fullmatch
_chunk_line = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[^\x00-\x08\x0a-\x1f\x7f]*)?\r\n").fullmatch
_trailer_line = re.compile(_TOKEN + rb"+:[^\x00-\x08\x0a-\x1f\x7f]*\r\n").fullmatch

# What a line of a head may consist of: HTAB, printable ASCII and obs-text. Without these, only line ends are left.
_LINE_BYTES = b"\t" + bytes(range(0x20, 0x7F)) + bytes(range(0x80, 0x100))
# Fields that concern one connection only; `proxy-*` and what Connection names are found apart.
_HOP_BY_HOP = frozenset((b"connection", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade"))
_LOOKED_AT = _HOP_BY_HOP | {
    b"authorization",
    b"content-length",
    b"expect",
    b"host",
    b"traceparent",
    b"x-request-id",
}
# Connection must not take these away: they say where a message ends and whom it is for.
_NEVER_NAMED = frozenset((b"content-length", b"host"))

MAX_CHUNK_LINE = 4096
MAX_TRAILERS = 16 * 1024
_MAX_NAMES = 1024

# Field names seen so far, as sent -> lower case where we look at the field, else b"". Bounded; names are no secret.
_names: dict[bytes, bytes] = {}


class BadRequest(Exception):
    """The client's fault: answer with `status` and close the connection."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code


class BadResponse(Exception):
    """The upstream's fault: the client gets a 502."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a client may send and how long it may take; sizes in bytes, times in seconds."""

    head_bytes: int = 64 * 1024
    header_count: int = 128
    body_bytes: int = 256 * 1024 * 1024
    head_seconds: float = 30.0
    """From the first byte of a head to its end."""
    body_seconds: float = 60.0
    """Without a single byte of a body that is due."""
    idle_seconds: float = 75.0
    """Between two requests of one connection."""


@dataclass(frozen=True, slots=True)
class Origin:
    """The upstream server."""

    host: str
    port: int
    tls: bool
    authority: bytes


class RequestHead:
    """A request's head, checked. `lines` are the fields that go upstream, as they came."""

    __slots__ = (
        "authorization",
        "expect",
        "framing",
        "keep_alive",
        "length",
        "lines",
        "method",
        "minor",
        "request_id",
        "target",
        "traceparent",
        "upgrade",
    )

    def __init__(self, method: bytes, target: bytes, minor: int) -> None:
        self.method = method
        self.target = target
        self.minor = minor
        self.lines: list[bytes] = []
        self.length = 0
        """Bytes of body, or CHUNKED."""
        self.framing = -1
        """Index in `lines` of the field that frames the body, -1 without one."""
        self.keep_alive = minor == 1
        self.expect = False
        self.upgrade = False
        self.authorization = False
        self.request_id: bytes | None = None
        self.traceparent = False


class ResponseHead:
    """A response's head, checked. `lines` are the fields that go to the client, as they came."""

    __slots__ = ("framing", "keep_alive", "length", "lines", "minor", "status", "status_line", "upgrade")

    def __init__(self, status_line: bytes, status: int, minor: int) -> None:
        self.status_line = status_line
        self.status = status
        self.minor = minor
        self.lines: list[bytes] = []
        self.length = UNTIL_CLOSE
        """Bytes of body (what it would be, for HEAD and 304), CHUNKED or UNTIL_CLOSE."""
        self.framing = -1
        self.keep_alive = minor == 1
        self.upgrade = False


def parse_origin(url: str) -> Origin:
    """ValueError unless `url` is http(s)://host[:port] and nothing more."""
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname or parts.path not in {"", "/"} or parts.query:
        raise ValueError(f"upstream_url: {url!r} is not of the form http://host:port or https://host:port")
    tls = parts.scheme == "https"
    port = parts.port or (443 if tls else 80)
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    authority = host if port == (443 if tls else 80) else f"{host}:{port}"
    return Origin(parts.hostname, port, tls, authority.encode("ascii"))


def _learn(name: bytes) -> bytes:
    """Lower case of a field name that we look at, b"" of any other; ValueError where it is no token."""
    if _token(name) is None:
        raise ValueError
    lower = name.lower()
    if lower.startswith(b"proxy-"):
        special = b"proxy"
    elif lower.startswith(b"x-hemostat-"):
        special = b"x-hemostat"
    else:
        special = lower if lower in _LOOKED_AT else b""
    if len(_names) < _MAX_NAMES:
        _names[name] = special
    return special


def _options(value: bytes) -> set[bytes]:
    return {option.strip(b" \t") for option in value.lower().split(b",")}


def _named(lines: list[bytes], options: set[bytes]) -> list[bytes]:
    """`lines` without the fields that Connection names."""
    return [line for line in lines if line.partition(b":")[0].lower() not in options]


def _length(value: bytes) -> int:
    """Content-Length; ValueError unless it is digits and of a sane size."""
    if not value.isdigit() or len(value) > 18:
        raise ValueError
    return int(value)


def parse_request(head: bytes, max_headers: int, pairs: list[tuple[bytes, bytes]] | None = None) -> RequestHead:
    """Check and cut a head (without its closing empty line). BadRequest says what is wrong.

    Every field is added to `pairs`, as (name, value).
    """
    lines = head.split(b"\r\n")
    breaks = len(lines) - 1
    if head.translate(None, _LINE_BYTES) != b"\r\n" * breaks:
        raise BadRequest(400, "the request head contains a control character, or CR or LF alone")
    match = _request_line(lines[0])
    if match is None:
        if _other_version(lines[0]):
            raise BadRequest(505, "only HTTP/1.0 and HTTP/1.1 are spoken here")
        raise BadRequest(400, "the request line is malformed")
    if breaks > max_headers:
        raise BadRequest(431, f"more than {max_headers} header fields")
    method, target, minor = match.groups()
    request = RequestHead(method, target, 1 if minor == b"1" else 0)
    kept = request.lines
    options: set[bytes] | None = None
    hosts = 0
    host_at = -1
    coded = sized = upgrades = False
    del lines[0]
    for line in lines:
        name, colon, value = line.partition(b":")
        special = _names.get(name)
        if special is None:
            try:
                special = _learn(name)
            except ValueError:
                raise BadRequest(400, "a header field name is malformed, or a field is folded") from None
        if not colon:
            raise BadRequest(400, "a header field lacks its colon")
        if pairs is not None:
            value = value.strip(b" \t")
            pairs.append((name, value))
        if not special:
            kept.append(line)
            continue
        value = value.strip(b" \t")
        if special == b"host":
            hosts += 1
            if _host(value) is None:
                raise BadRequest(400, "Host is malformed")
            host_at = len(kept)
            kept.append(line)
        elif special == b"content-length":
            if sized:
                raise BadRequest(400, "Content-Length is given twice")
            sized = True
            try:
                request.length = _length(value)
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
                options = _options(value) if options is None else options | _options(value)
        elif special == b"upgrade":
            upgrades = upgrades or value.lower() == b"websocket"
        elif special == b"expect":
            # From a 1.0 client it means nothing; a next hop would wait for it.
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
    if sized and coded:
        raise BadRequest(400, "both Content-Length and Transfer-Encoding are given")
    if hosts > 1 or (hosts == 0 and request.minor == 1):
        raise BadRequest(400, "exactly one Host is needed")
    if options is not None:
        if b"close" in options:
            request.keep_alive = False
        elif request.minor == 0:
            request.keep_alive = b"keep-alive" in options
        # Only WebSocket: an upgrade to h2c would carry requests past every rule in this file.
        request.upgrade = (
            upgrades and b"upgrade" in options and request.minor == 1 and request.length == 0 and method == b"GET"
        )
        options -= _NEVER_NAMED
        if options - {b"close", b"keep-alive", b"upgrade", b"te"}:
            _drop_named(request, options)
            host_at = next((i for i, line in enumerate(request.lines) if line[:5].lower() == b"host:"), -1)
    if target[:1] != b"/":
        _to_origin_form(request, host_at)
    return request


def _drop_named(request: RequestHead, options: set[bytes]) -> None:
    framing = request.lines[request.framing] if request.framing >= 0 else None
    if request.request_id is not None and b"x-request-id" in options:
        request.request_id = None
    request.traceparent = request.traceparent and b"traceparent" not in options
    request.authorization = request.authorization and b"authorization" not in options
    request.expect = request.expect and b"expect" not in options
    request.lines = _named(request.lines, options - {b"transfer-encoding"})
    request.framing = request.lines.index(framing) if framing is not None else -1


def _to_origin_form(request: RequestHead, host_at: int) -> None:
    """Absolute form becomes origin form, its authority wins over Host (RFC 9112, 3.2.2)."""
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


def parse_response(head: bytes, *, to_head: bool) -> ResponseHead:
    """Check and cut the upstream's head (without its closing empty line). `to_head`: it answers a HEAD request.

    BadResponse says what is wrong.
    """
    lines = head.split(b"\r\n")
    breaks = len(lines) - 1
    if head.translate(None, _LINE_BYTES) != b"\r\n" * breaks:
        raise BadResponse("the response head contains a control character, or CR or LF alone")
    match = _status_line(lines[0])
    if match is None:
        raise BadResponse("the status line is malformed")
    status = int(match[2])
    response = ResponseHead(lines[0], status, 1 if match[1] == b"1" else 0)
    if response.minor == 0:
        response.status_line = b"HTTP/1.1" + lines[0][8:]
    kept = response.lines
    options: set[bytes] | None = None
    coded = sized = False
    del lines[0]
    for line in lines:
        name, colon, value = line.partition(b":")
        special = _names.get(name)
        if special is None:
            try:
                special = _learn(name)
            except ValueError:
                raise BadResponse("a header field name is malformed, or a field is folded") from None
        if not colon:
            raise BadResponse("a header field lacks its colon")
        if not special:
            kept.append(line)
        elif special == b"content-length":
            if sized:
                raise BadResponse("Content-Length is given twice")
            sized = True
            try:
                response.length = _length(value.strip(b" \t"))
            except ValueError:
                raise BadResponse("Content-Length is not a number") from None
            response.framing = len(kept)
            kept.append(line)
        elif special == b"transfer-encoding":
            if coded or value.strip(b" \t").lower() != b"chunked" or response.minor == 0:
                raise BadResponse("Transfer-Encoding is not `chunked`")
            coded = True
            response.length = CHUNKED
            response.framing = len(kept)
            kept.append(CHUNKED_LINE)
        elif special == b"connection":
            if value != b" keep-alive":
                options = _options(value) if options is None else options | _options(value)
        elif special == b"upgrade":
            if status == 101:
                kept.append(line)
                response.upgrade = True
        elif special not in _HOP_BY_HOP and special != b"proxy":
            kept.append(line)
    if sized and coded:
        raise BadResponse("both Content-Length and Transfer-Encoding are given")
    if options is not None:
        if b"close" in options:
            response.keep_alive = False
        options -= _NEVER_NAMED
        if options - {b"close", b"keep-alive", b"upgrade"}:
            framing = kept[response.framing] if response.framing >= 0 else None
            response.lines = kept = _named(kept, options - {b"transfer-encoding", b"upgrade"})
            response.framing = kept.index(framing) if framing is not None else -1
    if status < 200 or status in {204, 304} or to_head:
        if coded and not to_head:
            del kept[response.framing]
            response.framing = -1
        response.length = 0
    return response


def fields(lines: list[bytes]) -> Headers:
    """Field lines as (name, value), in order."""
    out = []
    for line in lines:
        name, _, value = line.partition(b":")
        out.append((name, value.strip(b" \t")))
    return out


def set_length(lines: list[bytes], framing: int, length: int) -> int:
    """Make `lines` say Content-Length: in place of the framing field, its case kept, else at the end. New index."""
    if framing < 0:
        lines.append(b"Content-Length: %d" % length)
        return len(lines) - 1
    name = lines[framing].partition(b":")[0]
    lines[framing] = (b"Content-Length" if name.lower() != b"content-length" else name) + b": %d" % length
    return framing


def chunk(data: bytes) -> bytes:
    """One chunk; b"" stays b"", since an empty chunk would end the body."""
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""


def error_body(status: int, message: str, code: str | None = None) -> bytes:
    """JSON in OpenAI's error shape."""
    kind = "invalid_request_error" if status < 500 else "api_error"
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}}).encode()


_REASONS = {
    400: b"Bad Request",
    408: b"Request Timeout",
    413: b"Content Too Large",
    431: b"Request Header Fields Too Large",
    500: b"Internal Server Error",
    501: b"Not Implemented",
    502: b"Bad Gateway",
    503: b"Service Unavailable",
    505: b"HTTP Version Not Supported",
}


def error_response(status: int, body: bytes, *, connection: bytes = b"", bodyless: bool = False) -> bytes:
    """An answer of our own. `connection`: a whole field line with its CRLF; `bodyless`: it answers a HEAD request."""
    head = b"HTTP/1.1 %d %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n%b\r\n" % (
        status,
        _REASONS.get(status, b"Error"),
        len(body),
        connection,
    )
    return head if bodyless else head + body


class ChunkedReader:
    """The chunked coding, cut at any byte. Strict: CRLF only, sizes in hexadecimal, bounded extensions and trailers."""

    __slots__ = ("_left", "_line", "_trailers")

    def __init__(self) -> None:
        self._line = b""
        self._left = 0
        """Bytes of the present chunk that are missing, its CRLF included."""
        self._trailers = -1
        """Bytes of trailers so far, -1 before the last chunk."""

    @property
    def between_chunks(self) -> bool:
        """True where the next byte is the first of a size, so that a leading zero would be no change."""
        return not self._left and not self._line and self._trailers < 0

    def feed(self, data: bytes, out: list[bytes] | None) -> int:
        """Append the payload in `data` to `out` (None: not wanted). Returns the bytes used up when the body is complete
        (the reader is then ready for the next one), else -1. ValueError on a malformed body."""
        pos, end = 0, len(data)
        while pos < end:
            left = self._left
            if left >= 2 and pos + left <= end:
                stop = pos + left
                if not data.startswith(b"\r\n", stop - 2):
                    raise ValueError("a chunk is longer than it says")
                if out is not None and left > 2:
                    out.append(data[pos : stop - 2])
                self._left = 0
                pos = stop
                continue
            if left > 2:
                take = min(left - 2, end - pos)
                if out is not None:
                    out.append(data[pos : pos + take])
                pos += take
                self._left = left = left - take
                if pos == end:
                    return -1
            while left and pos < end:
                if data[pos] != (13 if left == 2 else 10):
                    raise ValueError("a chunk is longer than it says")
                pos += 1
                self._left = left = left - 1
            if left or pos == end:
                return -1
            newline = data.find(b"\n", pos)
            if newline < 0:
                self._line += data[pos:]
                if len(self._line) > MAX_CHUNK_LINE:
                    raise ValueError("a chunk's size line or a trailer is too long")
                return -1
            line = data[pos : newline + 1]
            if self._line:
                line = self._line + line
                self._line = b""
            if len(line) > MAX_CHUNK_LINE:
                raise ValueError("a chunk's size line or a trailer is too long")
            pos = newline + 1
            if self._trailers < 0:
                match = _chunk_line(line)
                if match is None:
                    raise ValueError("a chunk's size is malformed")
                size = int(match[1], 16)
                if size:
                    self._left = size + 2
                else:
                    self._trailers = 0
            elif line == b"\r\n":
                self._trailers = -1
                return pos
            else:
                self._trailers += len(line)
                if _trailer_line(line) is None or self._trailers > MAX_TRAILERS:
                    raise ValueError("the trailers are malformed or too long")
        return -1
