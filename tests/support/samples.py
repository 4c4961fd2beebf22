"""Metric samples as tests look them up."""

from __future__ import annotations

from collections.abc import Iterable

from hemostat.metrics.samples import AnySample, HistogramSample, Sample


def values(samples: Iterable[AnySample]) -> dict[tuple[str, ...], float]:
    """Of the counters and gauges: the metric's name, then its label values -> value."""
    result = [sample for sample in samples if isinstance(sample, Sample)]
    by_series = {(sample.name, *sample.labels): sample.value for sample in result}
    assert len(by_series) == len(result), "no series twice"
    return by_series


def histograms(samples: Iterable[AnySample]) -> dict[tuple[str, ...], HistogramSample]:
    """The metric's name, then its label values -> the series."""
    result = [sample for sample in samples if isinstance(sample, HistogramSample)]
    by_series = {(sample.name, *sample.labels): sample for sample in result}
    assert len(by_series) == len(result), "no series twice"
    return by_series
