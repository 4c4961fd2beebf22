"""Parses and checks response heads."""

from __future__ import annotations

import re
from typing import Final

from hemostat.relay.http.errors import BadResponse
from hemostat.relay.http.fields import (
    HOP_BY_HOP,
    LINE_BYTES,
    connection_options,
    drop_fields,
    read_field,
    remember,
)
from hemostat.relay.http.framing import CHUNKED, CHUNKED_LINE, UNTIL_CLOSE, parse_length

_BODYLESS: Final = frozenset((204, 304))
_status_line: Final = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9][0-9])(?: [^\r\n]*)?").fullmatch

_MAX_CACHED: Final = 64
_MAX_CACHED_BYTES: Final = 64
_status_lines: Final[dict[bytes, tuple[int, int]]] = {}
"""The status lines that were seen before, each with its status and minor version. The table is bounded, and emptied
when full.
"""


class ResponseHead:
    """A response's head, checked."""

    __slots__ = (
        "content_coding",
        "content_type",
        "framing",
        "keep_alive",
        "length",
        "lines",
        "minor",
        "status",
        "status_line",
        "upgrade",
    )

    def __init__(self, status_line: bytes, status: int, minor: int) -> None:
        self.status_line = status_line
        self.status = status
        self.minor = minor
        """The minor version of HTTP/1: 0 or 1."""
        self.lines: list[bytes] = []
        """The fields that are forwarded, unchanged."""
        self.length = UNTIL_CLOSE
        """The number of bytes of body (to HEAD and for 304: 0, whatever Content-Length says), CHUNKED or
        UNTIL_CLOSE."""
        self.framing = -1
        """The index in `lines` of the field that frames the body, -1 without one."""
        self.keep_alive = minor == 1
        self.content_type = b""
        """The value of the last Content-Type."""
        self.content_coding = b"identity"
        """The value of the last Content-Encoding."""
        self.upgrade = False
        """It is True if a 101 response has the field Upgrade."""

    def encode(self, body: bytes = b"") -> bytes:
        """Returns the head as it is sent, followed by `body`."""
        return b"\r\n".join((self.status_line, *self.lines, b"", body))


def parse_response(head: bytes, *, to_head: bool) -> ResponseHead:
    """Returns a checked head (given without its closing empty line) with the fields to forward.

    to_head: True if it is the response to a HEAD request. Raises BadResponse, which says what is wrong.
    """
    lines = head.split(b"\r\n")
    breaks = len(lines) - 1
    if head.translate(None, LINE_BYTES) != b"\r\n" * breaks:
        raise BadResponse("the response head contains a control character, or CR or LF alone")
    known = _status_lines.get(lines[0])
    status, minor = _read_status_line(lines[0]) if known is None else known
    response = ResponseHead(lines[0], status, minor)
    if response.minor == 0:
        response.status_line = b"HTTP/1.1" + lines[0][8:]
    kept = response.lines
    options: set[bytes] | None = None
    coded = sized = False
    del lines[0]
    for line in lines:
        try:
            special, value = read_field(line)
        except ValueError as error:
            raise BadResponse(str(error)) from None
        if not special:
            kept.append(line)
        elif special == b"content-type":
            response.content_type = value
            kept.append(line)
        elif special == b"content-encoding":
            response.content_coding = value
            kept.append(line)
        elif special == b"content-length":
            if sized:
                raise BadResponse("Content-Length is given twice")
            sized = True
            try:
                response.length = parse_length(value)
            except ValueError:
                raise BadResponse("Content-Length is not a number") from None
            response.framing = len(kept)
            kept.append(line)
        elif special == b"transfer-encoding":
            if coded or value.lower() != b"chunked" or response.minor == 0:
                raise BadResponse("Transfer-Encoding is not `chunked`")
            coded = True
            response.length = CHUNKED
            response.framing = len(kept)
            kept.append(CHUNKED_LINE)
        elif special == b"connection":
            if value != b"keep-alive":
                options = connection_options(value) if options is None else options | connection_options(value)
        elif special == b"upgrade":
            if status == 101:
                kept.append(line)
                response.upgrade = True
        elif special not in HOP_BY_HOP and special != b"proxy":
            kept.append(line)
    if sized and coded:
        raise BadResponse("both Content-Length and Transfer-Encoding are given")
    if options is not None:
        if b"close" in options:
            response.keep_alive = False
        if options - {b"close", b"keep-alive", b"upgrade"}:
            response.lines, response.framing = drop_fields(kept, response.framing, options - {b"upgrade"})
            kept = response.lines
    if status < 200 or status in _BODYLESS or to_head:
        # Some clients (llhttp of 104, for one) read a body where an interim response says how long it is.
        if response.framing >= 0 and (status < 200 or (coded and not to_head)):
            del kept[response.framing]
            response.framing = -1
        response.length = 0
    return response


def _read_status_line(line: bytes) -> tuple[int, int]:
    """Returns the status and the minor version. The result is cached."""
    match = _status_line(line)
    if match is None:
        raise BadResponse("the status line is malformed")
    result = int(match[2]), 1 if match[1] == b"1" else 0
    remember(_status_lines, line, result, _MAX_CACHED, _MAX_CACHED_BYTES)
    return result
