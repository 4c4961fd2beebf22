"""Header fields: their syntax, which of them an intermediary has to interpret, and which it must not forward."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from typing import Final, TypeVar, overload

TOKEN: Final = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]"
_Found = TypeVar("_Found")

_token: Final = re.compile(TOKEN + rb"+").fullmatch

LINE_BYTES: Final = b"\t" + bytes(range(0x20, 0x7F)) + bytes(range(0x80, 0x100))
"""The bytes that a line of a head may contain: HTAB, printable ASCII, obs-text. Without them, only line ends remain."""

HOP_BY_HOP: Final = frozenset((b"connection", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade"))
"""The fields that concern one connection only. `proxy-*` and the fields that Connection names are recognised
separately."""
_INTERPRETED: Final = HOP_BY_HOP | {
    b"authorization",
    b"content-encoding",
    b"content-length",
    b"content-type",
    b"expect",
    b"host",
    b"traceparent",
    b"x-request-id",
}
_NOT_IN_TRAILERS: Final = _INTERPRETED | {
    b"age",
    b"cache-control",
    b"content-range",
    b"date",
    b"expires",
    b"location",
    b"pragma",
    b"retry-after",
    b"set-cookie",
    b"vary",
    b"warning",
    b"www-authenticate",
}
"""The fields that may not be in a response's trailers: framing, routing, authentication, control data and what says how
to read the content (RFC 9110, 6.5.1, RFC 7230, 4.1.2). A recipient that merges trailers into the head would obey them.
"""
# Connection must not remove these: they say where the message ends and whom it is for.
_NOT_REMOVABLE: Final = frozenset((b"content-length", b"host"))

_RECURRING: Final = frozenset(
    (b"accept", b"accept-encoding", b"connection", b"content-type", b"host", b"server", b"user-agent")
)
"""The fields that most clients and servers repeat unchanged, as OpenAI's clients do `x-stainless-…`. None is meant for
secrets."""
_MAX_CACHED: Final = 1024
_MAX_CACHED_NAME_BYTES: Final = 64
_MAX_CACHED_LINE_BYTES: Final = 256
# Field names seen before, as sent -> their class, and whether the field recurs. Bounded; field names are not secret.
_names: Final[dict[bytes, tuple[bytes, bool]]] = {}
# Lines of recurring fields seen before -> what `read_field` returns. Bounded.
_lines: Final[dict[bytes, tuple[bytes, bytes]]] = {}


def remember(cache: dict[bytes, _Found], key: bytes, value: _Found, max_entries: int, max_bytes: int) -> None:
    """Caches what was found for a key of at most `max_bytes`.

    A cache that is full is emptied: what one client sent once does not slow down the others for good.
    """
    if len(key) <= max_bytes:
        if len(cache) >= max_entries:
            cache.clear()
        cache[key] = value


def read_field(line: bytes) -> tuple[bytes, bytes]:
    """Returns the class of a field line, and its value without the white space around it.

    The class is the name in lower case if it is one that the parsers interpret; `proxy` and `x-hemostat` for every name
    with that prefix; b"" for all others, which are forwarded unchanged. ValueError says what is malformed.
    """
    result = _lines.get(line)
    if result is not None:
        return result
    name, colon, value = line.partition(b":")
    known = _names.get(name)
    special, recurs = _classify(name) if known is None else known
    if not colon:
        raise ValueError("a header field lacks its colon")
    value = value.strip(b" \t")
    if recurs:
        remember(_lines, line, (special, value), _MAX_CACHED, _MAX_CACHED_LINE_BYTES)
    return special, value


def _classify(name: bytes) -> tuple[bytes, bool]:
    """Returns the class of a field's name, and whether the field recurs. The result is cached."""
    if _token(name) is None:
        raise ValueError("a header field name is malformed, or a field is folded")
    lower = name.lower()
    if lower.startswith(b"proxy-"):
        special = b"proxy"
    elif lower.startswith(b"x-hemostat-"):
        special = b"x-hemostat"
    else:
        special = lower if lower in _INTERPRETED else b""
    known = special, lower in _RECURRING or lower.startswith(b"x-stainless-")
    remember(_names, name, known, _MAX_CACHED, _MAX_CACHED_NAME_BYTES)
    return known


def allowed_in_trailers(line: bytes) -> bool:
    """Returns True if a field line behind the last chunk of a response may be forwarded."""
    name = line.partition(b":")[0].lower()
    return name not in _NOT_IN_TRAILERS and not name.startswith((b"proxy-", b"x-hemostat-"))


def connection_options(value: bytes) -> set[bytes]:
    """Returns the options that a Connection field names, in lower case, without the fields that it must not remove."""
    return {option.strip(b" \t") for option in value.lower().split(b",")} - _NOT_REMOVABLE


def drop_fields(lines: list[bytes], framing: int, names: Collection[bytes]) -> tuple[list[bytes], int]:
    """Returns the lines without the fields that have these lower-case names, and the new index of the framing field.

    framing: the index of the field that frames the body, which is always kept, or -1.
    """
    kept_line = lines[framing] if framing >= 0 else None
    kept = [line for line in lines if line is kept_line or line.partition(b":")[0].lower() not in names]
    return kept, kept.index(kept_line) if kept_line is not None else -1


def split_fields(lines: list[bytes]) -> list[tuple[bytes, bytes]]:
    """Returns the field lines as (name, value), in order."""
    out = []
    for line in lines:
        name, _, value = line.partition(b":")
        out.append((name, value.strip(b" \t")))
    return out


class Fields(Sequence[tuple[bytes, bytes]]):
    """Field lines as (name, value), in order. Of most requests none is read, so they are split on first use."""

    __slots__ = ("_lines", "_split")

    def __init__(self, lines: list[bytes]) -> None:
        self._lines = lines
        self._split: list[tuple[bytes, bytes]] | None = None

    def _fields(self) -> list[tuple[bytes, bytes]]:
        if self._split is None:
            self._split = split_fields(self._lines)
        return self._split

    @overload
    def __getitem__(self, index: int) -> tuple[bytes, bytes]: ...

    @overload
    def __getitem__(self, index: slice) -> list[tuple[bytes, bytes]]: ...

    def __getitem__(self, index: int | slice) -> tuple[bytes, bytes] | list[tuple[bytes, bytes]]:
        return self._fields()[index]

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
        return iter(self._fields())

    def __len__(self) -> int:
        return len(self._lines)
