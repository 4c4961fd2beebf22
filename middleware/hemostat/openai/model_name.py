"""The name of the model in what the server sends: an adapter's version is replaced by the base model's name.

vLLM 0.32 answers a request for an adapter with the adapter's name as `model` in the body, or in every event of a
stream. Whatever alias of the base model was asked for, it answers that with the first of its names; that name is what a
client of Hemostat gets. Every other byte stays as it was, and nothing is parsed.
"""

from __future__ import annotations

import json
import re
from typing import Final

import msgspec

from hemostat.openai.json_splice import MALFORMED, JsonObject, encode
from hemostat_calibration.profiles.profile import VERSION_PATTERN

MAX_HELD_BYTES: Final = 4096
"""A member that white space spreads over more bytes than this is not recognized across the pieces of a body."""

_elements: Final[msgspec.json.Decoder[list[msgspec.Raw]]] = msgspec.json.Decoder(list[msgspec.Raw])
_KEY: Final = b'"model"'
_member: Final = re.compile(rb'"model"[ \t\r\n]*:').search
_ERROR_EVENT: Final = b'data: {"error"'
_WHITE: Final = b" \t\r\n"


class ModelName:
    """Replaces the version in one response's body, which arrives in pieces of any size.

    In an answer it replaces the value of members `model`: bytes `"model":"VERSION"`, which cannot occur inside a JSON
    string, since a quote is escaped there. A text in which the version occurs thus stays as it is. In an error the
    version is replaced wherever it occurs.
    """

    __slots__ = (
        *("_between_events", "_everywhere", "_held", "_in_error", "_last", "_member", "_name", "_name_in_event"),
        *("_named", "_restored", "_stream", "_version", "replaced"),
    )

    def __init__(self, version: str, name: str, *, stream: bool, error: bool) -> None:
        """stream: the body is an event stream. error: the whole body is an error."""
        self.replaced = False
        """It is True if the answer named the version as its model."""
        self._named = False
        """It is True if the answer named a model."""
        self._version = version.encode()
        self._name = encode(name)[1:-1]
        self._name_in_event = json.dumps(name)[1:-1].encode()
        """The name as vLLM writes it in a stream's error event."""
        self._stream = stream
        self._everywhere = error
        self._in_error = False
        """It is True if the present line of a stream, which is not complete, is an error event."""
        self._held = b""
        """The end of what was fed, while it may be the beginning of what is replaced."""
        self._last = b""
        """The byte before `_held`."""
        self._between_events = False
        """It is True if the present place is between two events of an answer that names the version, as vLLM writes
        them.
        """
        self._member = b',"model":"%b"' % self._version
        self._restored = b',"model":"%b"' % self._name

    def feed(self, data: bytes) -> bytes:
        """Takes the next bytes of the body; returns what the client gets now."""
        if self._between_events and data.endswith(b"\n\n"):
            quick = data.replace(self._member, self._restored)
            if self._version not in quick:
                return quick
        if self._held:
            data = self._held + data
            self._held = b""
        at = data.find(self._version)
        if at >= 0:
            data = self._replace(data, at)
        if not self.replaced and not self._named:
            self._named = _member(data) is not None
        if self._stream and data.endswith(b"\n\n"):
            # The usual case: whole events.
            self._in_error = False
            self._last = b"\n"
            self._between_events = self.replaced and not self._everywhere
            return data
        return self._hold_end(data)

    @property
    def other_answered(self) -> bool:
        """It is True if the body is an answer, and of another model."""
        return self._named and not self.replaced and not self._everywhere

    def finish(self) -> bytes:
        """Is called when the body is complete, and returns the rest of what the client gets."""
        held, self._held = self._held, b""
        return held

    def _replace(self, data: bytes, at: int) -> bytes:
        """Returns the data with the version replaced wherever it is the model's name. at: the first place of the
        version.
        """
        version, start = self._version, 0
        parts: list[bytes] = []
        while at >= 0:
            end = at + len(version)
            if self._everywhere:
                parts += (data[start:at], self._name)
                start = end
            elif self._is_member(data, at, end):
                self.replaced = True
                parts += (data[start:at], self._name)
                start = end
            elif self._stream and self._in_error_event(data, at):
                parts += (data[start:at], self._name_in_event)
                start = end
            at = data.find(version, end)
        parts.append(data[start:])
        return b"".join(parts)

    def _is_member(self, data: bytes, at: int, end: int) -> bool:
        """Returns True if the bytes from `at` to `end` are the value of a member `model`."""
        if data[end : end + 1] != b'"':
            return False
        if data.endswith(b'"model":"', 0, at):
            key = at - 9
        else:
            before = data[max(0, at - MAX_HELD_BYTES) : at]
            if not before.endswith(b'"'):
                return False
            before = before[:-1].rstrip(_WHITE)
            if not before.endswith(b":"):
                return False
            before = before[:-1].rstrip(_WHITE)
            if not before.endswith(_KEY):
                return False
            key = max(0, at - MAX_HELD_BYTES) + len(before) - len(_KEY)
        return self._byte_before(data, key) != b"\\"

    def _byte_before(self, data: bytes, at: int) -> bytes:
        return data[at - 1 : at] if at else self._last

    def _in_error_event(self, data: bytes, at: int) -> bool:
        line = data.rfind(b"\n", 0, at) + 1
        return data.startswith(_ERROR_EVENT, line) or (not line and self._in_error)

    def _hold_end(self, data: bytes) -> bytes:
        """Holds back the end of `data` that may be the beginning of something to replace; returns the rest."""
        self._between_events = False
        keep = len(data)
        if self._everywhere:
            keep -= _partial(data, self._version)
        else:
            keep = min(keep, self._start_of_member(data))
            if self._stream:
                keep = min(keep, self._start_in_stream(data))
        if len(data) - keep > MAX_HELD_BYTES:
            keep = len(data)
        self._held = data[keep:]
        if keep:
            self._last = data[keep - 1 : keep]
        return data[:keep]

    def _start_of_member(self, data: bytes) -> int:
        """Returns where a member `model` begins whose value is not complete; the length of `data` if there is none."""
        at = data.rfind(_KEY)
        if at >= 0 and self._may_become_member(data[at + len(_KEY) : at + MAX_HELD_BYTES + 1]):
            return len(data) if self._byte_before(data, at) == b"\\" else at
        at = len(data) - _partial(data, _KEY)
        return len(data) if self._byte_before(data, at) == b"\\" else at

    def _may_become_member(self, rest: bytes) -> bool:
        """Returns True if a member `model` may follow. rest: what follows the key so far."""
        rest = rest.lstrip(_WHITE)
        if not rest.startswith(b":"):
            return not rest
        return (b'"' + self._version + b'"').startswith(rest[1:].lstrip(_WHITE))

    def _start_in_stream(self, data: bytes) -> int:
        """Returns where a line begins that may become an error event, or a version inside one."""
        line = data.rfind(b"\n") + 1
        if line or not self._in_error:
            self._in_error = data.startswith(_ERROR_EVENT, line)
        if self._in_error:
            return len(data) - _partial(data, self._version)
        return line if _ERROR_EVENT.startswith(data[line : line + len(_ERROR_EVENT)]) else len(data)


def _partial(data: bytes, pattern: bytes) -> int:
    """Returns the length of the longest end of `data` that is a beginning of `pattern`, not the whole of it."""
    return next((n for n in range(min(len(pattern) - 1, len(data)), 0, -1) if data.endswith(pattern[:n])), 0)


def without_versions(data: bytes) -> bytes:
    """Returns the server's list of models without the adapters that are named by a profile's version.

    Only those entries are cut out, each with its comma. What is no list of models is returned as it is.
    """
    try:
        listed = JsonObject(data)
        raw = listed.raw("data")
        cards = [bytes(card) for card in _elements.decode(raw)]
        hidden = [_is_version(JsonObject(card)) for card in cards]
    except MALFORMED:
        return data
    if not any(hidden):
        return data
    position = raw.index(b"[") + 1
    before_first = raw[position : raw.index(cards[0], position)]
    kept: list[bytes] = []
    for card, hide in zip(cards, hidden, strict=True):
        start = raw.index(card, position)
        if not hide:
            kept += (raw[position:start] if kept else before_first, card)
        position = start + len(card)
    return listed.edit({"data": b"[" + b"".join(kept) + raw[position:]})


def _is_version(card: JsonObject) -> bool:
    name = card.value("id")
    return isinstance(name, str) and is_version(name) and card.value("parent") is not None


def is_version(name: str) -> bool:
    """Returns True if a model's name is a profile's version: 32 hexadecimal digits."""
    return VERSION_PATTERN.fullmatch(name) is not None
