"""Arrays as they are sent: little-endian."""

from __future__ import annotations

import sys
from array import array
from typing import Any


def little_endian(values: array[Any]) -> bytes:
    """Returns the bytes of `values`, which stay as they are.

    >>> little_endian(array("i", [1, -1]))[:4]
    b'\\x01\\x00\\x00\\x00'
    """
    if sys.byteorder == "big":
        values = values[:]
        values.byteswap()
    return values.tobytes()
