"""Server-sent events, without IO: chunks of bytes in, complete events out, each with its original bytes.

Invariant: the concatenation of every event's `raw` and of `flush()` equals the bytes that were fed, whatever the chunk
boundaries, so that an unchanged event is passed on byte for byte. Line ends are LF, CRLF or CR, as in the HTML
standard (https://html.spec.whatwg.org/multipage/server-sent-events.html).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

# Atomic groups: without them a lone CRLF would backtrack into CR plus LF and pass for a blank line.
_BLANK_LINE: Final = re.compile(rb"(?>\r\n|\n|\r)(?>\r\n|\n|\r)")
_LINE_END: Final = re.compile(rb"\r\n|\n|\r")

MAX_EVENT: Final = 16 * 1024 * 1024
"""The largest number of bytes of one incomplete event that are buffered."""


@dataclass(frozen=True, slots=True)
class Event:
    """One block of the stream.

    raw: its bytes, with the blank line that ends it (the LF of a CRLF may be at the start of the next event).
    data: the lines of its `data` fields joined by LF; None if it has none (a comment, for example).
    start, end: the range of `data` in `raw`; start is -1 where it spans several lines.
    """

    raw: bytes
    data: bytes | None
    start: int = -1
    end: int = -1

    def replace(self, data: bytes) -> bytes:
        """Returns the event's bytes with other data, which must not contain line ends."""
        if self.start >= 0:
            return self.raw[: self.start] + data + self.raw[self.end :]
        lines = _LINE_END.split(self.raw)
        others = [line for line in lines if line and line != b"data" and not line.startswith(b"data:")]
        return b"\n".join([*others, b"data: " + data, b"", b""])


def parse(raw: bytes) -> Event:
    """Returns the event in these bytes; the end of the last line may be missing."""
    length = len(raw)
    if raw.startswith(b"data: ") and raw.find(b"\n") == length - 2 and raw.endswith(b"\n\n") and b"\r" not in raw:
        return Event(raw, raw[6:-2], 6, length - 2)
    data: list[bytes] = []
    start = end = -1
    position = 0
    while position < length:
        match = _LINE_END.search(raw, position)
        line_end, following = match.span() if match else (length, length)
        if raw.startswith(b"data", position):
            value = position + 4
            if value == line_end:
                data.append(b"")
                start = end = value
            elif raw[value] == 0x3A:
                start = value + 2 if raw.startswith(b" ", value + 1) else value + 1
                end = line_end
                data.append(raw[start:end])
        position = following
    if not data:
        return Event(raw, None)
    if len(data) > 1 or raw[start - 1 : start] not in (b":", b" "):
        start = end = -1
    return Event(raw, b"\n".join(data), start, end)


def _blank_lines(buffer: bytearray, start: int) -> list[int]:
    """Returns the end of each blank line from `start` on."""
    if buffer.find(b"\r", start) >= 0:
        return [match.end() for match in _BLANK_LINE.finditer(buffer, start)]
    # The usual case, and many times faster than the pattern.
    ends = []
    while (at := buffer.find(b"\n\n", start)) >= 0:
        start = at + 2
        ends.append(start)
    return ends


class Parser:
    """Turns the bytes of a stream into its events. It buffers at most `max_event` bytes; a longer event is passed on in
    parts without data.
    """

    def __init__(self, max_event: int = MAX_EVENT) -> None:
        self._max_event = max_event
        self._buffer = bytearray()
        self._in_oversized = False
        """It is True inside an event whose beginning was already passed on."""

    @property
    def between_events(self) -> bool:
        """It is True if no part of an event is buffered, and the end of no event that was passed on is outstanding."""
        return not self._buffer and not self._in_oversized

    def feed(self, data: bytes) -> list[Event]:
        """Takes the next bytes; returns the events that they complete."""
        # A blank line may lie across the chunk boundary: it is at most four bytes long.
        search = max(0, len(self._buffer) - 3)
        self._buffer += data
        ends = _blank_lines(self._buffer, search)
        events: list[Event] = []
        start = 0
        for end in ends:
            raw = bytes(self._buffer[start:end])
            events.append(Event(raw, None) if self._in_oversized else parse(raw))
            self._in_oversized = False
            start = end
        del self._buffer[:start]
        if len(self._buffer) > self._max_event:
            # The last bytes stay, so that a blank line across the next chunk boundary is still found.
            passed_on = len(self._buffer) - 3
            events.append(Event(bytes(self._buffer[:passed_on]), None))
            del self._buffer[:passed_on]
            self._in_oversized = True
        return events

    def flush(self) -> bytes:
        """Returns the remaining bytes, when the stream ends in the middle of an event."""
        rest = bytes(self._buffer)
        self._buffer.clear()
        return rest
