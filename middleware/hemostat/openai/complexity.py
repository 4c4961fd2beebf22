"""Finds out if a body can be read in a few milliseconds, in one pass over its bytes, before any of it is parsed.

The event loop's thread reads the bodies of all clients of a relay. What a body costs there depends less on its size
than on how many values it has: 400,000 members take longer than half a second. What exceeds these limits is relayed
as it is, and counted; the limits are several times what large requests of agents have.
"""

from __future__ import annotations

from typing import Final

MAX_CONTAINERS: Final = 20_000
"""The largest number of opening brackets and braces, with the ones in texts."""
MAX_STRINGS: Final = 16_000
MAX_COMMAS: Final = 100_000
"""The largest number of commas, with the ones in texts."""
MAX_ESCAPES: Final = 100_000
"""The largest number of backslashes. A body of 512 KiB whose texts are Chinese, each character escaped, has 87,000."""
MAX_MESSAGES: Final = 2_000
"""The largest number of messages of a conversation, of parts of all its messages together, and of prompts of a
request.
"""

_NEVER_COMPLEX: Final = MAX_CONTAINERS
"""A body of no more bytes is within all limits: it has at most one sign a byte, and two quotation marks a string."""
_COUNTED: Final = b'{[,"\\'
_OTHERS: Final = bytes(set(range(256)) - set(_COUNTED))


class TooComplex(ValueError):
    """It would take too long to read the body."""


def check_complexity(body: bytes) -> None:
    """Raises TooComplex for a body that has too many values. It need not be valid JSON.

    >>> check_complexity(b'{"model": "m", "messages": [{"role": "user", "content": "Hi"}]}')
    >>> check_complexity(b'{"messages": [' + b"{}," * 30_000 + b"{}]}")
    Traceback (most recent call last):
        ...
    hemostat.openai.complexity.TooComplex: more than 20000 objects and lists
    """
    if len(body) <= _NEVER_COMPLEX:
        return
    signs = body.translate(None, _OTHERS)
    if signs.count(b"{") + signs.count(b"[") > MAX_CONTAINERS:
        raise TooComplex(f"more than {MAX_CONTAINERS} objects and lists")
    if signs.count(b"\\") > MAX_ESCAPES:
        raise TooComplex(f"more than {MAX_ESCAPES} backslashes")
    if _has_more_strings(signs, MAX_STRINGS):
        raise TooComplex(f"more than {MAX_STRINGS} strings")
    if signs.count(b",") > MAX_COMMAS:
        raise TooComplex(f"more than {MAX_COMMAS} commas")


def check_prompts(prompts: bytes) -> None:
    """Raises TooComplex for too many prompts. prompts: their JSON, a list. Brackets in texts count, too."""
    if prompts.count(b"[") > MAX_MESSAGES + 1 or _has_more_strings(prompts, MAX_MESSAGES):
        raise TooComplex(f"more than {MAX_MESSAGES} prompts")


def check_messages(number: int) -> None:
    """Raises TooComplex for too many messages of a conversation, or parts of them."""
    if number > MAX_MESSAGES:
        raise TooComplex(f"more than {MAX_MESSAGES} messages or parts")


def _has_more_strings(data: bytes, limit: int) -> bool:
    quotes = data.count(b'"')
    if quotes <= 2 * limit:
        return False
    escapes = data.count(b"\\")
    # A quote after a backslash may be the end of a string (after an escaped backslash), but never its beginning.
    return quotes - escapes > 2 * limit or quotes - data.count(b'\\"') > 2 * limit
