"""The dashboards' panels that are empty in the live run (test_live.py): those about adapters, a reasoning model's
thinking, a candidate and an outlier engine. A real Prometheus scrapes what the metrics' catalogue exports."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, start_http_server
from tests.support.dashboards import ALL, EMPTY_LIVE, Query, about_adapters, queries
from tests.support.prometheus import Prometheus, config, needs, prometheus
from tests.support.stack import wait_for

from hemostat.metrics import names
from hemostat.metrics.collector import HemostatCollector
from hemostat.metrics.samples import Sample
from hemostat_lab.demo.vllm_server import free_port

QUERIES = [query for query in queries() if about_adapters(query) or query.where in EMPTY_LIVE]
VALUES = {"namespace": "compose", "model": "m", "route": "/v1/chat/completions"}


def samples() -> Iterator[Sample]:
    """Counters grow by 1 at each scrape."""
    count = next(SCRAPES)
    yield Sample(names.MODEL_INFO, ("m", "r"), 1.0)
    yield Sample(names.ADAPTER_HELD_OUT_RECOVERED_RATIO, (), 0.67)
    yield Sample(names.ADAPTER_RANK, (), 16)
    for form, size in (("stored", 5.5e6), ("engine", 9.8e6), ("quantized_layers", 56.4e6)):
        yield Sample(names.ADAPTER_BYTES, (form,), size)
    for weighting in ("request", "token"):
        yield Sample(names.PROFILE_KIND_TOTAL_VARIATION_GAIN, ("chat text sampled", weighting), 0.16)
    for state in ("wanted", "loaded", "ready"):
        yield Sample(names.ADAPTERS, (state,), 1)
    yield Sample(names.ADAPTER_PROBES, ("isolation", "failed"), count)
    yield Sample(names.ADAPTER_LOADS, ("refused",), count)
    yield Sample(names.ADAPTER_JUDGED, ("judged",), count)
    yield Sample(names.ADAPTER_JUDGED, ("busy",), count)
    yield Sample(names.ADAPTER_BUILDS, ("proposed",), count)
    for engine, odd in (("a:8000", 0.0), ("b:8000", 1.0)):
        yield Sample(names.ENGINE_OUTLIER, (engine,), odd)
    yield Sample(names.GATE_EXCESS_RATIO, ("stable_tokens",), 0.02)
    for phase, nats in (("thinking", 0.25), ("answer", 0.5)):
        yield Sample(names.PLACE_KL_NATS, ("phase", phase), nats * count)
        yield Sample(names.PLACE_KL_TOKENS, ("phase", phase), count)
    for arm in ("control", "treated"):
        for end, requests in (("ended", 5), ("cut", 2), ("stopped", 1), ("none", 100)):
            yield Sample(names.THINKING_REQUESTS, (arm, end), requests * count)
        yield Sample(names.THINKING_TOKENS, (arm,), 40 * 8 * count)


SCRAPES = itertools.count(1)
EXPECTED = {
    "Evidence that an engine is an outlier (B)": {("b:8000",): 1.0},
    "Excess of the candidate in the live gate (A)": {("stable_tokens",): 0.02},
    "KL by phase, last 30 minutes (A)": {("thinking",): 0.25, ("answer",): 0.5},
    "Thinking that does not end, by arm, last 30 minutes (A)": {("control",): 3 / 8, ("treated",): 3 / 8},
    "Tokens of thinking per answer, by arm, last 30 minutes (A)": {("control",): 40.0, ("treated",): 40.0},
}
"""By the values of the legend's labels."""


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    registry = CollectorRegistry()
    registry.register(HemostatCollector([samples]))
    port = free_port()
    server, thread = start_http_server(port, "127.0.0.1", registry)
    try:
        targets = {"hemostat:8081": f"127.0.0.1:{port}"}
        with prometheus(config(targets), tmp_path_factory.mktemp("panels") / "prometheus") as started:
            rate = f"rate({names.ADAPTER_JUDGED}[1m])"  # known from two scrapes
            wait_for("two scrapes", lambda: bool(started.query(rate)))
            yield started
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def test_every_panel_about_adapters_is_here() -> None:
    assert len({query.where.rpartition(" (")[0] for query in QUERIES if about_adapters(query)}) == 7


@needs("prometheus", "prometheus")
@pytest.mark.parametrize("query", QUERIES, ids=str)
def test_every_query_returns_data(scraped: Prometheus, query: Query) -> None:
    """With all variables at All, and with one value chosen of each; the other values' data stay out."""
    for expression in (query.with_values(ALL), query.with_values(VALUES)):
        series = scraped.query(expression)
        assert series, f"no data: {expression}"
        assert any(query.legend <= set(sample["metric"]) for sample in series)
    for variable in ("namespace", "model"):
        if f"${variable}" in query.expression:
            assert scraped.query(query.with_values(VALUES | {variable: "other"})) == [], variable


@needs("prometheus", "prometheus")
@pytest.mark.parametrize("where", EMPTY_LIVE)
def test_the_values_of_a_query_that_is_empty_live(scraped: Prometheus, where: str) -> None:
    (query,) = [query for query in QUERIES if query.where == where]
    series = scraped.query(query.with_values(VALUES))
    result = {tuple(sample["metric"].values()): float(sample["value"][1]) for sample in series}
    assert result == pytest.approx(EXPECTED[where])
