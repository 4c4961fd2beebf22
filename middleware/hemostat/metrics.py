"""Prometheus exposition: a Collector that reads state when it is scraped; nothing is registered at import."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Protocol

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from hemostat.measure import Measurements
from hemostat.messages import OVERHEAD_BUCKETS, Stats

RELAY_COUNTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "hemostat_requests": ("Requests answered by the proxy.", ("route", "outcome")),
    "hemostat_shadow_requests": (
        "Sampled requests by what became of them: shadowed (captured), scored, skipped (cannot be scored), dropped.",
        ("outcome", "reason"),
    ),
    "hemostat_calibration_requests": (
        "Requests for which a profile was in question, by arm and by why they stand in it.",
        ("arm", "reason"),
    ),
    "hemostat_responses_finished": (
        "Choices of all generations that passed by, sampled or not, by arm and finish_reason.",
        ("arm", "reason"),
    ),
    "hemostat_output_tokens": ("Their tokens, by usage or else by the stream's events.", ("arm",)),
    "hemostat_repetition_loops": ("Of them, responses that end in one block of text over and over.", ("arm",)),
    "hemostat_structured_outputs": (
        "Of them, JSON and tool calls that were asked for: valid, invalid, or cut at the length limit.",
        ("arm", "kind", "outcome"),
    ),
    "hemostat_outcome_errors": ("Responses whose outcome could not be judged: a bug, see the log.", ()),
}
"""Counters that relays report (without `_total`): help and label names in the order of their values."""


class State(Protocol):
    """What the collector reads; every attribute is cheap."""

    measurements: Measurements

    def relay_totals(self) -> Stats: ...

    def gauges(self) -> Iterable[tuple[str, str, dict[str, str], float]]:
        """name, help, labels, value."""

    def counters(self) -> Iterable[tuple[str, str, dict[str, str], float]]:
        """name without `_total`, help, labels, value."""


class HemostatCollector(Collector):
    """Everything on /metrics but the process's own figures."""

    def __init__(self, state: State) -> None:
        self._state = state

    def collect(self) -> Iterator[Metric]:
        totals = self._state.relay_totals()
        counters: dict[str, CounterMetricFamily] = {}
        for name, (text, labels) in RELAY_COUNTERS.items():
            counters[name] = CounterMetricFamily(name, text, labels=labels)
        own: dict[tuple[str, tuple[str, ...]], float] = {}
        for name, text, labels_of, value in self._state.counters():
            if name not in counters:
                counters[name] = CounterMetricFamily(name, text, labels=tuple(labels_of))
            own[name, tuple(labels_of.values())] = own.get((name, tuple(labels_of.values())), 0.0) + value
        for full_name, series in totals.counters.items():
            name = full_name.removesuffix("_total")
            if name in counters:
                for joined, value in series.items():
                    key = (name, tuple(joined.split("\x1f")))
                    own[key] = own.get(key, 0.0) + value
        for (name, values), value in own.items():
            counters[name].add_metric(values, value)
        yield from counters.values()

        yield _histogram(
            "hemostat_proxy_overhead_seconds",
            "Time that the relay itself adds to a request, on its way up and on the first bytes' way back.",
            OVERHEAD_BUCKETS,
            # Before the first relay has reported there is no figure: a 0 would look as though they had been reset.
            [((), totals.overhead_buckets, totals.overhead_sum)] if totals.overhead_buckets else [],
        )
        for name, text, labels_of_it, edges, rows in self._state.measurements.histograms():
            yield _histogram(name, text, edges, rows, labels_of_it)

        gauges: dict[str, GaugeMetricFamily] = {}
        for name, text, labels_of, value in self._state.gauges():
            if name not in gauges:
                gauges[name] = GaugeMetricFamily(name, text, labels=tuple(labels_of))
            gauges[name].add_metric(tuple(labels_of.values()), value)
        yield from gauges.values()


def _histogram(
    name: str,
    text: str,
    edges: Iterable[float],
    series: Iterable[tuple[tuple[str, ...], list[int], float]],
    labels: tuple[str, ...] = (),
) -> HistogramMetricFamily:
    """`series`: label values, plain (not cumulative) counts with one more for what is above the last edge, sum."""
    family = HistogramMetricFamily(name, text, labels=labels)
    bounds = [*(repr(float(edge)) for edge in edges), "+Inf"]
    for values, counts, total in series:
        cumulative = 0
        buckets = []
        for bound, count in zip(bounds, [*counts, *[0] * (len(bounds) - len(counts))], strict=True):
            cumulative += count
            buckets.append((bound, cumulative))
        family.add_metric(values, buckets, total if math.isfinite(total) else 0.0)
    return family
