"""The end of a body: Content-Length, the chunked coding, or the end of the connection (RFC 9112, 6 and 7)."""

from __future__ import annotations

import re
from typing import Final

from hemostat.relay.http.errors import BadRequest
from hemostat.relay.http.fields import TOKEN, allowed_in_trailers

CHUNKED: Final = -1
"""The `length` of a body in the chunked coding."""
UNTIL_CLOSE: Final = -2
"""The `length` of a response body that ends with the connection."""

CHUNKED_LINE: Final = b"Transfer-Encoding: chunked"
LAST_CHUNK: Final = b"0\r\n\r\n"

MAX_CHUNK_LINE_BYTES: Final = 4096
MAX_TRAILER_BYTES: Final = 16 * 1024
MIN_CHUNK_BYTES: Final = 64
"""The least size of a request's chunks with their framing, on average over what is read at a time: each takes almost a
microsecond.
"""
MAX_SMALL_CHUNKS: Final = 1024
"""The number of chunks in one read that may be shorter than that."""
_PART_BYTES: Final = 8192
"""The number of bytes of a request's chunks after which the number of chunks is checked."""

_chunk_line: Final = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[^\x00-\x08\x0a-\x1f\x7f]*)?\r\n").fullmatch
_trailer_line: Final = re.compile(TOKEN + rb"+:[^\x00-\x08\x0a-\x1f\x7f]*\r\n").fullmatch


def parse_length(value: bytes) -> int:
    """Returns the value of Content-Length. Raises ValueError unless it consists of digits and has a plausible size."""
    if not value.isdigit() or len(value) > 18:
        raise ValueError
    return int(value)


def set_length(lines: list[bytes], framing: int, length: int) -> int:
    """Gives `lines` a Content-Length, and returns its index.

    It replaces the framing field, keeping the case of its name; without one (framing -1) it is appended.
    """
    if framing < 0:
        lines.append(b"Content-Length: %d" % length)
        return len(lines) - 1
    name = lines[framing].partition(b":")[0]
    lines[framing] = (b"Content-Length" if name.lower() != b"content-length" else name) + b": %d" % length
    return framing


def chunk(data: bytes) -> bytes:
    """Returns one chunk; b"" stays b"", since an empty chunk would end the body."""
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""


class ChunkedReader:
    """Parses the chunked coding, split at any byte.

    Strict: CRLF only, sizes in hexadecimal, extensions and trailers of bounded size.
    """

    __slots__ = ("_kept", "_left", "_line", "_start", "_trailers")

    def __init__(self) -> None:
        self._line = b""
        """The beginning of an incomplete size line or trailer."""
        self._left = 0
        """The number of bytes of the current chunk that are missing, its CRLF included."""
        self._trailers = -1
        """The number of bytes of trailers so far, -1 before the last chunk."""
        self._kept = b""
        """The trailers so far that may be forwarded."""
        self._start = -1
        """The place where the trailers begin in what was fed last; -1: nothing of it is behind the last chunk's
        line.
        """

    @property
    def between_chunks(self) -> bool:
        """True where the next byte is the first one of a chunk's size, so that a leading zero changes nothing."""
        return not self._left and not self._line and self._trailers < 0

    def feed(self, data: bytes, out: list[bytes] | None) -> int:
        """Appends the payload in `data` to `out` (None: the payload is not needed).

        Returns -1 while the body is incomplete; when it is complete, how many bytes of `data` belong to it, and the
        reader is ready for the next body. Raises ValueError on a malformed body.
        """
        pos, end = 0, len(data)
        self._start = -1 if self._trailers < 0 else 0
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
                if len(self._line) > MAX_CHUNK_LINE_BYTES:
                    raise ValueError("a chunk's size line or a trailer is too long")
                return -1
            line = data[pos : newline + 1]
            if self._line:
                line = self._line + line
                self._line = b""
            if len(line) > MAX_CHUNK_LINE_BYTES:
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
                    self._start = pos
                    self._kept = b""
            elif line == b"\r\n":
                self._trailers = -1
                return pos
            else:
                self._trailers += len(line)
                if _trailer_line(line) is None or self._trailers > MAX_TRAILER_BYTES:
                    raise ValueError("the trailers are malformed or too long")
                if allowed_in_trailers(line):
                    self._kept += line
        return -1

    def to_forward(self, data: bytes, used: int) -> bytes:
        """Returns what is forwarded for `data`, for which `feed` has just returned `used`: all but trailers that must
        not be forwarded.

        Trailers are held back until the body is complete.
        """
        start = self._start
        if start < 0:
            return data
        return data[:start] if used < 0 else data[:start] + self._kept + b"\r\n"


class RequestBodyReader:
    """Finds the end of one request's body in what the client sends, and enforces the limit on its size."""

    __slots__ = ("_chunks", "_limit", "_missing", "_size", "complete")

    def __init__(self, length: int, limit: int) -> None:
        """length: of the request's head. limit: the most bytes of payload."""
        self._chunks = ChunkedReader() if length == CHUNKED else None
        self._missing = length
        """The number of bytes that are missing, with Content-Length."""
        self._size = 0
        """The number of bytes of payload so far, in the chunked coding."""
        self._limit = limit
        self.complete = False

    @property
    def chunked(self) -> bool:
        return self._chunks is not None

    def feed(self, data: bytes) -> tuple[list[bytes], bytes]:
        """Returns the pieces of payload in `data`, and the bytes after the end of the body. BadRequest says what is
        wrong."""
        if self._chunks is None:
            if len(data) < self._missing:
                self._missing -= len(data)
                return [data], b""
            self.complete = True
            return [data[: self._missing]], data[self._missing :]
        pieces: list[bytes] = []
        used, start, end = -1, 0, 0
        while used < 0 and end < len(data):
            start, end = end, end + _PART_BYTES
            try:
                used = self._chunks.feed(data[start:end], pieces)
            except ValueError as error:
                raise BadRequest(400, f"the body is malformed: {error}") from error
            if len(pieces) > max(MAX_SMALL_CHUNKS, end // MIN_CHUNK_BYTES):
                raise BadRequest(400, f"the body's chunks are shorter than {MIN_CHUNK_BYTES} bytes")
        self._size += sum(map(len, pieces))
        if self._size > self._limit:
            raise BadRequest(413, f"the body is longer than {self._limit} bytes")
        self.complete = used >= 0
        return pieces, data[start + used :] if self.complete else b""
