"""Responses with injected members that cannot be parsed: these are removed all the same, by their bytes.

A client gets what it did not ask for in no case, whatever the server sends: JSON that ends early, a key that is there
twice, `NaN`, a byte order mark, a response or an event that is too large to be buffered.
"""

from __future__ import annotations

import re

_NAMES = rb"logprobs|token_ids|prompt_token_ids|input_messages|output_messages"
_MEMBER = re.compile(rb'(?<!\\)"(?:' + _NAMES + rb')"[ \t\r\n]*:[ \t\r\n]*(?=[\[{])')
"""A quote inside a string is escaped: the second one would be, if this were part of a text."""
_BEGUN = re.compile(rb'(?<!\\)"(?:[a-z_]{0,20}|(?:' + _NAMES + rb')"[ \t\r\n]*:?[ \t\r\n]*)\Z')
"""The end of the data that may become a member with the next bytes."""
_TOKEN = re.compile(rb'[\[{]|[\]}]|"')
_STRING_END = re.compile(rb'(?:[^"\\]|\\.)*(")?', re.DOTALL)
_LINE_END = re.compile(rb"[\r\n]")
_NULL = b"null"


class Scrubber:
    """Bytes in, in pieces of any size; the same bytes out, with `null` in place of lists and objects of these names.

    A value that does not end is left out to the end of the response, or, in a stream, of its line.
    """

    __slots__ = ("_depth", "_held", "_in_string", "_stream")

    def __init__(self, *, stream: bool) -> None:
        self._stream = stream
        self._held = b""
        """The end of what was fed, while it may be the beginning of a member, or of an escape in a value."""
        self._depth = 0
        """The number of brackets that are open in the value that is left out; 0: none is."""
        self._in_string = False

    def feed(self, data: bytes) -> bytes:
        """Takes the next bytes; returns what the client gets now."""
        data, self._held = self._held + data, b""
        parts: list[bytes] = []
        at = 0
        while at < len(data):
            if self._depth:
                at = self._skip(data, at)
                continue
            match = _MEMBER.search(data, at)
            if match is None:
                begun = _BEGUN.search(data, max(at, len(data) - 256))
                keep = len(data) if begun is None else begun.start()
                parts.append(data[at:keep])
                self._held = data[keep:]
                break
            parts += (data[at : match.end()], _NULL)
            at = match.end() + 1
            self._depth = 1
        return b"".join(parts)

    def finish(self) -> bytes:
        """Is called when the response is complete, and returns the rest of what the client gets."""
        held = b"" if self._depth else self._held
        self._held, self._depth, self._in_string = b"", 0, False
        return held

    def _skip(self, data: bytes, at: int) -> int:
        """Returns where to go on: behind the value, or behind all of `data`."""
        limit = len(data)
        if self._stream and (line := _LINE_END.search(data, at)) is not None:
            limit = line.start()
        while at < limit:
            if self._in_string:
                string = _STRING_END.match(data, at, limit)
                assert string is not None
                at = string.end()
                if string[1] is None:
                    break
                self._in_string = False
                continue
            match = _TOKEN.search(data, at, limit)
            if match is None:
                at = limit
                break
            at = match.end()
            sign = match[0]
            if sign == b'"':
                self._in_string = True
            elif sign in b"[{":
                self._depth += 1
            else:
                self._depth -= 1
                if not self._depth:
                    return at
        if limit < len(data):
            # The line ends inside the value.
            self._depth, self._in_string = 0, False
            return limit
        self._held = data[at:]
        return limit


def scrub(data: bytes, *, stream: bool) -> bytes:
    """Returns the data without what was injected, all at once.

    >>> scrub(b'{"choices":[{"text":"x","logprobs":{"tokens":["}"]},"token_ids":[5', stream=False)
    b'{"choices":[{"text":"x","logprobs":null,"token_ids":null'
    """
    scrubber = Scrubber(stream=stream)
    return scrubber.feed(data) + scrubber.finish()
