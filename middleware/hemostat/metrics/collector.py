"""The Prometheus collector: asks every subsystem for its samples at each scrape. Nothing is registered at import."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from hemostat.metrics.catalogue import METRICS
from hemostat.metrics.samples import AnySample, HistogramSample

KINDS = ("counter", "histogram", "gauge")
"""The kinds of metrics, in the order in which the exposition lists them."""


class HemostatCollector(Collector):
    """Collects everything on /metrics. Every metric is exported from the start; a series, once some source has a sample
    of it.

    sources: each yields its samples, cheaply; samples of one series from several sources are added up.
    """

    def __init__(self, sources: Iterable[Callable[[], Iterable[AnySample]]]) -> None:
        self._sources = tuple(sources)

    def collect(self) -> Iterator[Metric]:
        values: dict[str, dict[tuple[str, ...], float]] = {name: {} for name in METRICS}
        histograms: dict[str, list[HistogramSample]] = {}
        for source in self._sources:
            for sample in source():
                if isinstance(sample, HistogramSample):
                    histograms.setdefault(sample.name, []).append(sample)
                else:
                    series = values[sample.name]
                    series[sample.labels] = series.get(sample.labels, 0.0) + sample.value
        for name, metric in sorted(METRICS.items(), key=lambda item: KINDS.index(item[1].kind)):
            if metric.kind == "histogram":
                yield _histogram(name, histograms.get(name, ()))
                continue
            kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            exported = kind(name, metric.help, labels=metric.labels)
            for labels, value in values[name].items():
                exported.add_metric(labels, value)
            yield exported


def _histogram(name: str, series: Iterable[HistogramSample]) -> HistogramMetricFamily:
    exported = HistogramMetricFamily(name, METRICS[name].help, labels=METRICS[name].labels)
    for sample in series:
        bounds = [*(repr(float(edge)) for edge in sample.edges), "+Inf"]
        cumulative = 0
        buckets = []
        for bound, count in zip(bounds, [*sample.counts, *[0] * (len(bounds) - len(sample.counts))], strict=True):
            cumulative += count
            buckets.append((bound, cumulative))
        exported.add_metric(sample.labels, buckets, sample.total if math.isfinite(sample.total) else 0.0)
    return exported
