"""What is said of one metric."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric with all of its series."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    """Of the value; of a counter also what is counted."""
    help: str
    labels: tuple[str, ...] = ()
    """In the order in which a sample gives their values."""
