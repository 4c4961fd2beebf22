"""A response as the client gets it: how its body is framed, and what is held back of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from enum import Enum, auto
from typing import Final

from hemostat.relay.http.framing import CHUNKED, CHUNKED_LINE, set_length
from hemostat.relay.http.response import ResponseHead

MAX_COLLECTED_BYTES: Final = 16 * 1024 * 1024
"""A response with Content-Length that the hook transforms is collected up to this size; a longer one is chunked."""
MAX_HEAD_HOLD_SECONDS: Final = 0.2
"""The longest time for which a response's head is held back for the hook. vLLM reports in the first event of a stream
that it refuses the request, until which the response can still be replaced. It does so before anything is computed,
within milliseconds; the first token of an answer may take seconds, and the client is to see the head until then, as
without the hook."""


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
_COLLECTED: Final = BodyMode.COLLECTED


class ClientResponse:
    """The response to one request. Owns what is held back of it, until that goes to the client or is discarded."""

    __slots__ = ("_hold", "collected", "head", "held_head", "mode")

    def __init__(self) -> None:
        self.head: ResponseHead | None = None
        """The head that the upstream sent last; its lines are changed by `frame`."""
        self.mode = _RAW
        self.held_head = b""
        """The head as it goes to the client, until it has gone; empty with BodyMode.COLLECTED."""
        self._hold: asyncio.TimerHandle | None = None
        """The timer that releases the head if the body is not there in time."""
        self.collected: list[bytes] | None = None
        """The body so far, with BodyMode.COLLECTED."""

    def frame(self, head: ResponseHead, *, http11: bool, transformed: bool, close: bool) -> bool:
        """Chooses the body's mode, makes the head's fields agree with it, and holds the head back.

        http11: True if the client's version is HTTP/1.1, not 1.0. transformed: True if a hook changes the body. close:
        True if the client's connection is to be closed after the response. Returns whether it has to be closed.
        """
        length = head.length
        mode = _CHUNKED if http11 else _UNTIL_CLOSE
        if transformed:
            if 0 <= length <= MAX_COLLECTED_BYTES:
                mode = _COLLECTED
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
        self.mode = mode
        if mode is _COLLECTED:
            self.collected = []
        else:
            self.held_head = head.encode()
        return close

    @property
    def ends_by_close(self) -> bool:
        """It is True if only the end of the client's connection says where the body ends."""
        return self.mode is _UNTIL_CLOSE

    def take_collected(self) -> bytes:
        """Returns the collected body, which is no longer kept."""
        assert self.collected is not None
        body = b"".join(self.collected)
        self.collected = None
        return body

    def whole(self, body: bytes) -> bytes:
        """Returns the head, with the body's length, and the whole body."""
        head = self.head
        assert head is not None
        set_length(head.lines, head.framing, len(body))
        return head.encode(body)

    def limit_hold(self, loop: asyncio.AbstractEventLoop, release: Callable[[], None]) -> None:
        """Has `release` called if the head is still held back after MAX_HEAD_HOLD_SECONDS."""
        if self._hold is None and self.held_head:
            self._hold = loop.call_later(MAX_HEAD_HOLD_SECONDS, release)

    def take_head(self) -> bytes:
        """Returns the head that was held back, which goes to the client now."""
        head, self.held_head = self.held_head, b""
        self.end_hold()
        return head

    def end_hold(self) -> None:
        if self._hold is not None:
            self._hold.cancel()
            self._hold = None

    def discard(self) -> None:
        """Forgets the response: another one takes its place."""
        self.head = None
        self.mode = _RAW
        self.held_head = b""
        self.collected = None
        self.end_hold()
