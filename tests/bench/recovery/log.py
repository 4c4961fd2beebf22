"""Progress, on standard error."""

from __future__ import annotations

import sys
import time

_BEGAN = time.monotonic()


def say(line: str) -> None:
    print(f"{time.monotonic() - _BEGAN:7.1f} s  {line}", file=sys.stderr, flush=True)
