"""Finds out which conversation a request belongs to from a few of its bytes. This is done for every request, and so
without parsing JSON.

What is hashed is what `Request.conversation_key` is made of, but for the model, and for the system prompt that some
forms have outside the messages: the messages up to the user's first one, or the prompt. So requests of one conversation
have one key, as long as the client writes what it repeats with the same bytes, and conversations that only begin with
the same system prompt have different ones. It decides nothing but which engine is asked: where a body is not what is
expected here, another engine is.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from itertools import islice
from typing import Final

MAX_SCANNED_BYTES: Final = 256 * 1024
"""The number of bytes of a body that are scanned; a conversation whose first messages begin later has no key."""
MAX_TEXT_BYTES: Final = 16 * 1024
"""The number of bytes of the user's first message, or of a prompt, that are hashed. For a conversation that begins with
16 KiB of another one's text it does not matter that both go to the same engine.
"""
MAX_OCCURRENCES: Final = 32
"""The largest number of places that are looked at in search of the messages, or of the user."""

# Quotation marks within JSON strings are escaped, so that nothing here is found inside of them.
_STRING: Final = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
# Patterns for `finditer`. Where only the first occurrence is needed, `bytes.find` is faster.
_MESSAGES: Final = re.compile(rb'"messages"')
_PROMPTS: Final = (re.compile(rb'"input"'), re.compile(rb'"prompt"'))
_USER: Final = re.compile(rb'"user"')
_VALUE: Final = re.compile(rb'\s{0,16}+:\s{0,16}+(["\[])')
_ROLE: Final = re.compile(rb'"role"\s{0,16}+:\s{0,16}+\Z')
_MAX_ROLE_BYTES: Final = 40
_CONTENT: Final = re.compile(rb'\s*+,\s*+"content"\s*+:\s*+' + _STRING + rb"\s*+}", re.DOTALL)
"""The rest of most messages."""
_WRITTEN_CONTENT: Final = (b', "content": "', b',"content":"')
"""The beginnings of the content as JSON libraries write it. A text without escaped quotation marks ends at the first
one.
"""
_BACKSLASH: Final = 0x5C
_TEXT: Final = re.compile(_STRING, re.DOTALL)
_TOKEN: Final = re.compile(_STRING + rb"?+|[\[\]{}]", re.DOTALL)
"""A string that does not end before the search does is one, too: it would be read again from each quotation mark."""

_SPREAD: Final = 0x1E3779B1
"""The factor of checksums. It is odd, 2**32 by the golden ratio without its highest bit: checksums of texts that differ
in one character are related, and their multiples are far apart on the ring (Knuth's multiplicative hash)."""
_FACTOR_MASK: Final = (1 << 30) - 1
"""The mask of factors: compiled code multiplies numbers below 2**30 without making objects of them."""


def conversation_key(body: bytes) -> int | None:
    """Returns a number below 2**32, or None if no conversation is recognized.

    >>> first = b'{"messages": [{"role": "user", "content": "Hi"}], "seed": 1}'
    >>> later = b'{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]}'
    >>> conversation_key(first) == conversation_key(later), conversation_key(b"{}")
    (True, None)
    """
    messages = body.find(b'"messages"', 0, MAX_SCANNED_BYTES)
    if messages >= 0 and (role := body.find(b'"user"', messages, MAX_SCANNED_BYTES)) >= 0:
        # The shape that nearly all clients send; in the others the same is found by looking more closely.
        start = role + len(b'"user"')
        for written in _WRITTEN_CONTENT:
            begin = start + len(written)
            if body[start:begin] == written:
                quote = body.find(b'"', begin, begin + MAX_TEXT_BYTES)
                if quote >= 0 and body[quote : quote + 2] == b'"}' and body[quote - 1] != _BACKSLASH:
                    return _hash(body[messages:quote])
        content = _CONTENT.match(body, start, start + MAX_TEXT_BYTES)
        if content is not None:
            return _hash(body[messages : content.end()])
    result = _find_value(body, _PROMPTS if messages < 0 else (_MESSAGES, *_PROMPTS))
    if result is None:
        return None
    start = result.start(1)
    if result[1] == b'"':
        text = _TEXT.match(body, start, start + MAX_TEXT_BYTES)
        return _hash(body[start : text.end() if text is not None else start + MAX_TEXT_BYTES])
    user = _find_user(body, start)
    end = body.find(b"]", start, MAX_SCANNED_BYTES) if user is None else _end_of_object(body, user)
    return _hash(body[start:end]) if end > 0 else None


def _occurrences(body: bytes, sign: re.Pattern[bytes], start: int) -> Iterator[re.Match[bytes]]:
    return islice(sign.finditer(body, start, MAX_SCANNED_BYTES), MAX_OCCURRENCES)


def _find_value(body: bytes, names: tuple[re.Pattern[bytes], ...]) -> re.Match[bytes] | None:
    """Returns the match where the list of messages, or the prompt's text, begins: group 1 is its first byte. None if
    there is neither."""
    for name in names:
        for occurrence in _occurrences(body, name, 0):
            if (value := _VALUE.match(body, occurrence.end())) is not None:
                return value
    return None


def _find_user(body: bytes, start: int) -> int | None:
    """Returns where the role of the user's first message ends; None if there is none."""
    for occurrence in _occurrences(body, _USER, start):
        user = occurrence.start()
        if _ROLE.search(body, max(start, user - _MAX_ROLE_BYTES), user) is not None:
            return occurrence.end()
    return None


def _end_of_object(body: bytes, position: int) -> int:
    """Returns the end of the object that `position` is in, or how far it is read."""
    depth, end = 0, position + MAX_TEXT_BYTES
    for token in _TOKEN.finditer(body, position, end):
        mark = token.group()
        if mark in {b"{", b"["}:
            depth += 1
        elif mark in {b"}", b"]"}:
            if not depth:
                return token.end()
            depth -= 1
    return end


def _hash(data: bytes) -> int:
    return (zlib.crc32(data) & _FACTOR_MASK) * _SPREAD & 0xFFFFFFFF
