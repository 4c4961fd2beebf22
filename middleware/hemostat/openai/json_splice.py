"""Editing a JSON object's bytes in place: only the named members get new bytes, and every other byte stays as it was.

A request or a response is not decoded and encoded again, since that would change number formats, key order, escapes
and white space that the client or vLLM chose.
"""

from __future__ import annotations

import re
from collections.abc import KeysView, Mapping
from typing import Any, Final

import msgspec

from hemostat.openai.complexity import TooComplex

NULL: Final = b"null"

MALFORMED: Final = (ValueError, OverflowError, RecursionError, msgspec.MsgspecError)
"""The exceptions that parsing bytes of unknown origin can raise."""

MAX_MEMBERS: Final = 256
MAX_KEY_CHARACTERS: Final = 256
MAX_VALUE_BYTES: Final = 1024
"""The largest size of a value that is decoded whole."""

_members: Final[msgspec.json.Decoder[dict[str, msgspec.Raw]]] = msgspec.json.Decoder(dict[str, msgspec.Raw])
_NULL_VALUE: Final = msgspec.Raw(NULL)
_any: Final[msgspec.json.Decoder[Any]] = msgspec.json.Decoder()


_SLOW_NUMBER: Final = re.compile(rb"[\[,:\s][-0-9.]+[eE][+-]?[0-9]{3}")
"""A number within a list or an object that msgspec may need 13 microseconds for."""
_KEY_AND_COLON: Final = re.compile(rb'[{,\s]*+"[^"\\]*+(?:\\.[^"\\]*+)*+"\s*+:\s*+', re.DOTALL)


class JsonObject:
    """A JSON object's bytes, with the byte ranges of its members' values.

    Raises one of MALFORMED where the bytes are not an object, or where it has a duplicate key: parsers differ in which
    of the values they use, so vLLM could read another value than Hemostat does. TooComplex, which is one of them, where
    it has more than MAX_MEMBERS members, or a key of more than MAX_KEY_CHARACTERS.
    """

    __slots__ = ("_end", "_spans", "data")

    def __init__(self, data: bytes) -> None:
        values = _members.decode(data)
        if len(values) > MAX_MEMBERS or any(len(key) > MAX_KEY_CHARACTERS for key in values):
            raise TooComplex(f"more than {MAX_MEMBERS} members, or a key of more than {MAX_KEY_CHARACTERS} characters")
        self.data = data
        self._spans: dict[str, tuple[int, int]] = {}
        self._end = len(data) - 1
        if values:
            behind_colon = len(next(iter(values))) + 4
            if data[behind_colon : behind_colon + 1] == b" ":
                self._find_spans(values)
                return
        # No shorter object has these members. So one that is as short is compact, and has no others.
        position = 0
        for key, value in values.items():
            start = position + len(key) + 4  # `,"` or `{"` before the key, `":` behind it
            position = start + len(memoryview(value))
            self._spans[key] = start, position
        if position != self._end:
            self._find_spans(values)

    def _find_spans(self, values: dict[str, msgspec.Raw]) -> None:
        """Finds the spans of the members in JSON of any style."""
        data, position = self.data, self.data.index(b"{")
        spans: dict[str, tuple[int, int]] = {}
        self._spans = spans
        for key, value in values.items():
            # As Python's `json` writes a member; the pattern is for all other styles, and escaped keys.
            written = (b', "' if spans else b'{"') + key.encode() + b'": '
            raw = bytes(value)
            start = position + len(written)
            # Slices are compared, since `startswith` takes more instructions.
            if data[position : start + len(raw)] != written + raw:
                match = _KEY_AND_COLON.match(data, position)
                start = -1 if match is None else match.end()
                if start < 0 or data[start : start + len(raw)] != raw:
                    raise ValueError(f"duplicate key {key!r}")
            position = start + len(raw)
            spans[key] = start, position
        self._end = data.rindex(b"}")
        if data[position + (0 if spans else 1) : self._end].strip():
            raise ValueError("duplicate key")

    def __contains__(self, key: str) -> bool:
        return key in self._spans

    @property
    def names(self) -> KeysView[str]:
        """The names of its members."""
        return self._spans.keys()

    def raw(self, key: str) -> bytes:
        """Returns the value's bytes; `null` where the key is absent."""
        span = self._spans.get(key)
        return NULL if span is None else self.data[span[0] : span[1]]

    def start_of(self, key: str) -> int:
        """Returns where the value's bytes begin. Raises KeyError if the key is absent."""
        return self._spans[key][0]

    def value(self, key: str) -> Any:
        """Returns the decoded value; None if the key is absent. TooComplex where to decode it would take too
        long."""
        span = self._spans.get(key)
        return None if span is None else _decode(self.data[span[0] : span[1]])

    def given(self, key: str) -> bool:
        """Returns True if the value is true in Python's sense, or would take too long to be decoded."""
        try:
            return bool(self.value(key))
        except TooComplex:
            return True

    def type_of(self, key: str) -> Any:
        """Returns the member `type` of the value, the value itself where it is no object; None if either is
        absent."""
        if key not in self._spans:
            return None
        raw = self.raw(key)
        if raw.startswith(b"{"):
            raw = bytes(_members.decode(raw).get("type", _NULL_VALUE))
        return _decode(raw)

    def has(self, key: str) -> bool:
        """Returns True if the key is present and its value is not null."""
        span = self._spans.get(key)
        return span is not None and not self.data.startswith(NULL, span[0])

    def edit(self, changes: Mapping[str, bytes]) -> bytes:
        """Returns the object's bytes with these values (JSON): replaced where the key is present, else appended."""
        parts: list[bytes] = []
        position = 0
        for key, (start, end) in self._spans.items():
            if key in changes:
                parts += (self.data[position:start], changes[key])
                position = end
        added = [encode(key) + b":" + value for key, value in changes.items() if key not in self._spans]
        if added:
            last = next(reversed(self._spans.values()))[1] if self._spans else self._end
            parts += (self.data[position:last], b"," if self._spans else b"", b",".join(added))
            position = last
        parts.append(self.data[position:])
        return b"".join(parts)


def _decode(data: bytes) -> Any:
    if len(data) > MAX_VALUE_BYTES or (len(data) > 32 and _SLOW_NUMBER.search(data)):
        raise TooComplex("a value takes too long to be decoded")
    return _any.decode(data)


def encode(value: Any) -> bytes:
    """Returns the value as compact JSON."""
    return msgspec.json.encode(value)
