"""Numbers of tapped requests, as the engine's plugin sends them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def sent(values: Sequence[float | None] | Any) -> bytes:
    """Of `TapRun.versions`; None: the engine has no value."""
    return np.array([np.nan if value is None else value for value in values], "<f8").tobytes()


def received(data: bytes) -> list[float]:
    """The reverse."""
    numbers: list[float] = np.frombuffer(data, "<f8").tolist()
    return numbers
