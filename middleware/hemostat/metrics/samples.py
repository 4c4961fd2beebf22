"""The description of a metric, and the values that a subsystem gives the collector.

The `samples()` of a subsystem yields one value for each series that it has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias


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


class Sample(NamedTuple):
    """The current value of one series of a counter or a gauge."""

    name: str
    """A name from `names`."""
    labels: tuple[str, ...]
    """The values of the labels, in the order in which `catalogue` declares them."""
    value: float


class HistogramSample(NamedTuple):
    """The current state of one series of a histogram."""

    name: str
    labels: tuple[str, ...]
    edges: tuple[float, ...]
    """The upper edges of the buckets, ascending, without +Inf."""
    counts: list[int]
    """The number of values in each bucket (not cumulative), then of the values above the last edge."""
    total: float
    """The sum of the values; what is not finite is exported as 0."""


AnySample: TypeAlias = Sample | HistogramSample
