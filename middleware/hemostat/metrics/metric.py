"""The description of one metric."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric with all of its series."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    """The unit of the value; for a counter it also says what is counted."""
    help: str
    labels: tuple[str, ...] = ()
    """The names of the labels, in the order in which a sample gives their values."""
