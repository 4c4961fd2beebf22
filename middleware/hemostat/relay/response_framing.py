"""The framing of a response's body for the client."""

from __future__ import annotations

from enum import Enum, auto
from typing import Final

from hemostat.relay.http.framing import CHUNKED, CHUNKED_LINE
from hemostat.relay.http.response import ResponseHead

MAX_COLLECTED_BYTES: Final = 16 * 1024 * 1024
"""A response with Content-Length that the hook transforms is collected up to this size; a longer one is chunked."""


class BodyMode(Enum):
    """The ways in which the response's body is passed on."""

    RAW = auto()
    """The body is forwarded unchanged, with its framing."""
    CHUNKED = auto()
    """The body is sent in the chunked coding."""
    UNTIL_CLOSE = auto()
    """The body is sent without framing; it ends with the client's connection."""
    COLLECTED = auto()
    """The body is collected to its end, then sent with a Content-Length."""


# Module globals, for the reason that `exchange_state` gives.
_RAW: Final = BodyMode.RAW
_CHUNKED: Final = BodyMode.CHUNKED
_UNTIL_CLOSE: Final = BodyMode.UNTIL_CLOSE


def frame_response(head: ResponseHead, *, http11: bool, transformed: bool, close: bool) -> tuple[BodyMode, bool]:
    """Chooses the body's mode, and makes the head's fields agree with it.

    http11: True if the client's version is HTTP/1.1, not 1.0. transformed: True if a hook changes the body. close: True
    if the client's connection is to be closed after the response. Returns the mode, and whether the connection has to
    be closed.
    """
    length = head.length
    mode = _CHUNKED if http11 else _UNTIL_CLOSE
    if transformed:
        if 0 <= length <= MAX_COLLECTED_BYTES:
            mode = BodyMode.COLLECTED
    elif length >= 0 or (length == CHUNKED and http11):
        mode = _RAW
    lines = head.lines
    coded = head.framing >= 0 and lines[head.framing] == CHUNKED_LINE
    if mode is _CHUNKED and not coded:
        if head.framing >= 0:
            lines[head.framing] = CHUNKED_LINE
        else:
            lines.append(CHUNKED_LINE)
    elif head.framing >= 0 and (mode is _UNTIL_CLOSE or (coded and not http11)):
        del lines[head.framing]
    close = close or mode is _UNTIL_CLOSE
    if close:
        lines.append(b"Connection: close")
    elif not http11:
        lines.append(b"Connection: keep-alive")
    return mode, close
