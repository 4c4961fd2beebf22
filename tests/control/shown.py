"""How the console writes figures: what a test looks for on the page."""

from __future__ import annotations

import math


def fixed(x: float, digits: int) -> str:
    return f"{x:.{digits}f}".replace("-", "−")


def nats(x: float) -> str:
    """Three decimals; of what is smaller than 0.01, two digits."""
    return fixed(x, min(8, 1 - math.floor(math.log10(abs(x)))) if 0 < abs(x) < 0.01 else 3)


def percent(x: float, digits: int = 1) -> str:
    return f"{fixed(100 * x, digits)} %"


def interval(ends: list[float]) -> str:
    return f"[{nats(ends[0])}, {nats(ends[1])}]"
