"""The values that a subsystem gives the collector: its `samples()` yields one value for each series that it has."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias


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
