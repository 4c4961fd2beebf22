"""Which conversation a request belongs to, from a few of its bytes: for every request, so without parsing JSON.

What is hashed is what `Request.conversation_key` is made of, but for the model and the system prompt that some forms
have beside the messages: the messages up to the user's first one, or the prompt. So requests of one conversation have
one key, as long as the client writes what it repeats with the same bytes, and conversations that only begin with the
same system prompt have different ones. It decides nothing but which engine is asked: where a body is not what is
expected here, another engine is.
"""

from __future__ import annotations

import re
import zlib

MAX_SCANNED_BYTES = 256 * 1024
"""Of a body; a conversation whose first messages are longer has no key."""
MAX_TOKENS = 256
"""JSON strings and brackets of the user's first message that are read; one with more parts has no key."""

_MASK = 2**64 - 1
_SPREAD = 0x9E3779B97F4A7C15
"""Odd, 2**64 by the golden ratio: neighbouring checksums are far apart on the ring (Knuth's multiplicative hash)."""

# Quotation marks within JSON strings are escaped, so that the patterns do not match inside of them.
_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_BEGIN = re.compile(rb'"(?:messages|input|prompt)"\s*+:\s*+(?:(\[)|(' + _STRING + rb"))", re.DOTALL)
_USER = re.compile(rb'"role"\s*+:\s*+"user"')
_CONTENT = re.compile(rb'\s*+,\s*+"content"\s*+:\s*+' + _STRING + rb"\s*+}", re.DOTALL)
"""The rest of most messages."""
_TOKEN = re.compile(_STRING + rb"|[\[\]{}]", re.DOTALL)


def conversation_key(body: bytes) -> int | None:
    """A number below 2**64, or None where no conversation is recognized.

    >>> first = b'{"messages": [{"role": "user", "content": "Hi"}], "seed": 1}'
    >>> later = b'{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]}'
    >>> conversation_key(first) == conversation_key(later), conversation_key(b"{}")
    (True, None)
    """
    messages = body.find(b'"messages"', 0, MAX_SCANNED_BYTES)
    if messages >= 0:
        # The shape that nearly all clients send; in the others the same is found by looking more closely.
        role = body.find(b'"user"', messages, MAX_SCANNED_BYTES)
        content = _CONTENT.match(body, role + 6, MAX_SCANNED_BYTES) if role >= 0 else None
        if content is not None:
            return _hash(body[messages : content.end()])
    begin = _BEGIN.search(body, 0, MAX_SCANNED_BYTES)
    if begin is None:
        return None
    start = begin.start(1)
    if start < 0:
        return _hash(body[begin.start(2) : begin.end(2)])
    user = _USER.search(body, start, MAX_SCANNED_BYTES)
    end = _end_of_object(body, user.end()) if user is not None else body.find(b"]", start, MAX_SCANNED_BYTES)
    return _hash(body[start:end]) if end > 0 else None


def _end_of_object(body: bytes, position: int) -> int:
    """The end of the object that `position` is in, -1 where it is not found."""
    depth = 0
    for count, token in enumerate(_TOKEN.finditer(body, position, MAX_SCANNED_BYTES)):
        mark = token.group()
        if mark in {b"{", b"["}:
            depth += 1
        elif mark in {b"}", b"]"}:
            if not depth:
                return token.end()
            depth -= 1
        if count >= MAX_TOKENS:
            break
    return -1


def _hash(data: bytes) -> int:
    return zlib.crc32(data) * _SPREAD & _MASK
