"""Numbers of the generations and requests that have the same nonce."""

from __future__ import annotations

from collections import OrderedDict

MAX_NONCES = 4096
"""The largest number of nonces that are known; the one that was used longest ago is forgotten, and its numbers start
from 0 again."""
NUMBERS = 1 << 14
"""The count of numbers of one nonce after which they start from 0 again: the admin port refuses a message with a larger
number. Hemostat's nonces are used for one request each, but a client may set one of its own for all of its requests."""


class Numbering:
    """Owns the last number of each nonce.

    >>> numbering = Numbering()
    >>> [numbering.next(nonce) for nonce in ("a", "b", "a")]
    [0, 0, 1]
    """

    def __init__(self) -> None:
        self._next: OrderedDict[str, int] = OrderedDict()

    def __len__(self) -> int:
        """Returns the number of nonces that are known."""
        return len(self._next)

    def next(self, nonce: str) -> int:
        """Returns the next number of the nonce, from 0 to NUMBERS - 1."""
        number = self._next.pop(nonce, 0)
        self._next[nonce] = (number + 1) % NUMBERS
        if len(self._next) > MAX_NONCES:
            self._next.popitem(last=False)
        return number
