"""How the console writes figures: what a test looks for on the page."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any


def fixed(x: float, digits: int) -> str:
    return f"{x:.{digits}f}".replace("-", "−")


def nats(x: float) -> str:
    """Three decimals; of what is smaller than 0.01, two digits."""
    if x == 0 or abs(x) >= 0.01:
        return fixed(x, 3)
    if abs(x) < 1e-5:
        digits, _, power = f"{x:.1e}".partition("e")
        return f"{digits}e{int(power)}".replace("-", "−")
    return fixed(x, 1 - math.floor(math.log10(abs(x))))


def percent(x: float | None, digits: int = 1) -> str:
    return "–" if x is None else f"{fixed(100 * x, digits)} %"


UNKNOWN = "interval not known yet"


def interval(ends: list[float] | list[None], show: Callable[[float], str] = nats) -> str:
    low, high = ends
    if low is not None and high is not None:
        return f"[{show(low)}, {show(high)}]"
    return f"at least {show(low)}" if low is not None else f"at most {show(high)}" if high is not None else UNKNOWN


def divergence_interval(figure: dict[str, Any]) -> str:
    """Of a figure that has a largest possible value, up to which its interval goes after few effective requests."""
    high = figure["ci95"][1]
    if high is None or high >= figure["cap"]:
        return figure.get("no_interval") or UNKNOWN
    return interval(figure["ci95"])
