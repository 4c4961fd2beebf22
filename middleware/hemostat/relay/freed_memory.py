"""Memory that was freed goes back to the operating system."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Final, cast

_trim: Final = cast("Callable[[int], int] | None", getattr(ctypes.CDLL(None), "malloc_trim", None))
"""glibc's; other C libraries have none."""


def return_freed_memory() -> None:
    """Takes about 0.25 ms per MiB that is returned. glibc by itself returns only what lies behind everything that is in
    use."""
    if _trim is not None:
        _trim(0)
