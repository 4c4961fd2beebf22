"""Prometheus exposition: what there is (`FAMILIES`), and a Collector that reads state when it is scraped; nothing is
registered at import. `docs/metrics.md` is made from `FAMILIES`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from hemostat.ipc.messages import OVERHEAD_BUCKETS, Stats
from hemostat.measurement.measurements import Measurements
from hemostat.openai import routes
from hemostat.relay import counters as relay
from hemostat_calibration.records import Arm

Sample = tuple[str, dict[str, str], float]
"""Name as in FAMILIES, labels, value."""


@dataclass(frozen=True, slots=True)
class Family:
    """unit: of the value, or what is counted."""

    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    help: str
    labels: tuple[str, ...] = ()


GROUPS: dict[str, dict[str, Family]] = {
    "The proxy": {
        "hemostat_requests_total": Family(
            "counter", "requests", "Requests answered by the proxy.", ("route", "outcome")
        ),
        "hemostat_proxy_overhead_seconds": Family(
            "histogram",
            "seconds",
            "Time that the relay itself adds to a request, on its way up and on the first bytes' way back.",
        ),
        "hemostat_relays": Family("gauge", "processes", "Relay processes connected."),
        "hemostat_replica_leads": Family(
            "gauge", "0 or 1", "1 where decisions are made: of the replicas that share a store, on one at a time."
        ),
        "hemostat_model_info": Family(
            "gauge",
            "1",
            "1 for each name of the compressed model, with the reference that it is compared with.",
            ("model", "reference"),
        ),
    },
    "The shadow": {
        "hemostat_shadow_requests_total": Family(
            "counter",
            "requests",
            "Sampled requests by what became of them: shadowed (captured), scored, skipped (not scorable), dropped.",
            ("outcome", "reason"),
        ),
        "hemostat_shadow_rate_ratio": Family(
            "gauge", "ratio", "Part of the requests that is sampled (shadow.rate); absent without a reference."
        ),
        "hemostat_shadow_queue_depth": Family("gauge", "captures", "Captures waiting for the reference."),
        "hemostat_shadow_lag_seconds": Family("gauge", "seconds", "Age of the oldest waiting capture."),
        "hemostat_reference_up": Family("gauge", "0 or 1", "1 while the reference scores; absent without a reference."),
        "hemostat_reference_tokens_total": Family(
            "counter", "tokens", "Prompt and output tokens that the reference has scored."
        ),
        "hemostat_scored_tokens_total": Family(
            "counter", "tokens", "Output tokens scored by both models.", ("arm", "decoding")
        ),
    },
    "Divergence": {
        "hemostat_divergence": Family(
            "gauge",
            "nats; total_variation and top1_agreement: a ratio",
            "Mean of a headline figure and the ends of its 95 % interval, which is valid at every look.",
            ("figure", "stage", "edge"),
        ),
        "hemostat_token_kl_nats": Family(
            "histogram",
            "nats",
            "KL divergence per token between the two models' distributions, nats; a lower bound from the top ids.",
            ("direction", "stage", "arm"),
        ),
        "hemostat_token_total_variation": Family(
            "histogram",
            "ratio",
            "Total variation per token between the two models' distributions; a lower bound from the top ids.",
            ("stage", "arm"),
        ),
        "hemostat_kl_nats_total": Family(
            "counter",
            "nats",
            "Sum of KL(reference||compressed) over tokens, a lower bound; divide by hemostat_kl_tokens_total.",
            ("route", "label", "strategy"),
        ),
        "hemostat_kl_tokens_total": Family(
            "counter",
            "tokens",
            "Scored tokens with a finite KL(reference||compressed).",
            ("route", "label", "strategy"),
        ),
        "hemostat_top1_agreement_tokens_total": Family(
            "counter",
            "tokens",
            "Scored tokens at which both models' likeliest id is the same.",
            ("stage", "arm", "decoding"),
        ),
        "hemostat_covered_mass_ratio": Family(
            "gauge", "ratio", "Mean probability mass of each model on the ids for which both gave a value.", ("model",)
        ),
        "hemostat_survival_half_life_tokens": Family(
            "gauge",
            "tokens",
            "Tokens after which half of the sampled texts would differ from the reference's; +Inf beyond the data.",
            ("edge",),
        ),
        "hemostat_noise_floor_nats": Family(
            "gauge",
            "nats",
            "KL divergence of a model from itself (decode or batch shape against another), nats; a lower bound.",
            ("model", "direction"),
        ),
        "hemostat_noise_floor_requests_total": Family(
            "counter",
            "requests",
            "Requests that a model was to score against itself, by what became of it.",
            ("model", "outcome"),
        ),
    },
    "The alarm": {
        "hemostat_hemorrhage_alarm": Family(
            "gauge",
            "0 or 1",
            "1 while the test on this route has gone off; see alarm.alpha for how often that happens for nothing.",
            ("test", "route"),
        ),
        "hemostat_hemorrhage_evidence_ratio": Family(
            "gauge",
            "ratio",
            "Evidence of a test against 'nothing is wrong', as a part of what raises the alarm; 1 raises it.",
            ("test", "route"),
        ),
        "hemostat_alarm_baseline_ratio": Family(
            "gauge",
            "ratio",
            "Part of the baseline of a change test that has been learned; it tests once this is 1.",
            ("route",),
        ),
    },
    "Calibration": {
        "hemostat_calibration_requests_total": Family(
            "counter",
            "requests",
            "Requests for which a profile was in question, by arm and by why they stand in it.",
            ("arm", "reason"),
        ),
        "hemostat_recovered_divergence_ratio": Family(
            "gauge", "ratio", "Part of KL(reference||compressed) that the profile wins back, on the same tokens."
        ),
        "hemostat_profile_info": Family(
            "gauge",
            "1",
            "1 for the profile that serves, or in mode observe would (identity when none does).",
            ("version", "family"),
        ),
        "hemostat_profile_scope_info": Family(
            "gauge",
            "1",
            "1 for the profile of its own that a label, route or model is served with (calibration.scope).",
            ("scope", "version"),
        ),
        "hemostat_profile_promotions_total": Family(
            "counter", "profiles", "Profiles that the guard let serve, or in mode observe would have."
        ),
        "hemostat_profile_rollbacks_total": Family("counter", "profiles", "Profiles taken back."),
        "hemostat_profile_decisions_total": Family(
            "counter", "decisions", "Decisions about profiles.", ("decision", "reason")
        ),
        "hemostat_learned_tokens_total": Family(
            "counter", "tokens", "Tokens that contextual profiles were learned from, by what they brought.", ("source",)
        ),
        "hemostat_learner_dropped_total": Family(
            "counter", "requests", "Learning requests that the learner was not given, by reason.", ("reason",)
        ),
        "hemostat_features_dropped_total": Family(
            "counter",
            "requests",
            "Scored requests whose features the engine did not hand out in a usable form, by reason.",
            ("reason",),
        ),
    },
    "The engine's plugin": {
        "hemostat_engines": Family("gauge", "engines", "Engines whose plugin reports."),
        "hemostat_engine_events_total": Family("counter", "events", "What the engine plugins counted.", ("reason",)),
        "hemostat_engine_taps_dropped_total": Family(
            "counter", "runs", "Runs of the engine's numbers that nobody took in time, or that there was no room for."
        ),
        "hemostat_engine_features_dropped_total": Family(
            "counter", "runs", "Runs of a request's positions whose features the control process had no room for."
        ),
    },
    "What clients got, of all generations": {
        "hemostat_responses_finished_total": Family(
            "counter",
            "choices",
            "Choices of all generations that passed by, sampled or not, by arm and finish_reason.",
            ("arm", "reason"),
        ),
        "hemostat_output_tokens_total": Family(
            "counter", "tokens", "Output tokens of all generations, by usage or else by the stream's events.", ("arm",)
        ),
        "hemostat_repetition_loops_total": Family(
            "counter", "responses", "Of all generations, those that end in one block of text over and over.", ("arm",)
        ),
        "hemostat_structured_outputs_total": Family(
            "counter",
            "outputs",
            "Of all generations, JSON and tool calls that were asked for: valid, invalid, or cut at the length limit.",
            ("arm", "kind", "outcome"),
        ),
    },
    "Failures of Hemostat itself; all of these should stay 0": {
        "hemostat_calibration_errors_total": Family(
            "counter",
            "requests",
            "Scored requests that calibration could neither learn from nor judge by: a bug, see the log.",
        ),
        "hemostat_store_errors_total": Family("counter", "operations", "Reads and writes that the store refused."),
        "hemostat_outcome_errors_total": Family(
            "counter", "responses", "Responses whose outcome could not be judged: a bug, see the log."
        ),
        "hemostat_tracing_errors_total": Family(
            "counter", "requests", "Requests that could not be traced or logged: a bug, see the log."
        ),
    },
}
"""Every metric, by what it is about and its name on /metrics; the relays' and the control process's own."""

FAMILIES: dict[str, Family] = {name: family for group in GROUPS.values() for name, family in group.items()}

_ARMS: list[tuple[str, ...]] = [(str(arm),) for arm in Arm]
FROM_THE_START: dict[str, list[tuple[str, ...]]] = {
    "hemostat_requests_total": [(route, outcome) for route in routes.SCORED for outcome in relay.OUTCOMES],
    "hemostat_shadow_requests_total": [("shadowed", ""), ("scored", ""), ("dropped", "queue_full")],
    "hemostat_responses_finished_total": [(*arm, reason) for arm in _ARMS for reason in ("stop", "length")],
    "hemostat_output_tokens_total": _ARMS,
    "hemostat_repetition_loops_total": _ARMS,
    "hemostat_structured_outputs_total": [
        (*arm, kind, outcome)
        for arm in _ARMS
        for kind in ("json", "tool_call")
        for outcome in ("valid", "invalid", "cut")
    ],
}
"""Series of the relays' counters that are 0 until something is counted: a rate does not see what a series is born with,
and a panel that shows nothing leaves open whether there is nothing to show."""


class State(Protocol):
    """What the collector reads; every attribute is cheap."""

    measurements: Measurements

    def relay_totals(self) -> Stats: ...

    def gauges(self) -> Iterable[Sample]: ...

    def counters(self) -> Iterable[Sample]: ...


class HemostatCollector(Collector):
    """Everything on /metrics. Every family is there from the start; its series are when there is something to say."""

    def __init__(self, state: State) -> None:
        self._state = state

    def collect(self) -> Iterator[Metric]:
        totals = self._state.relay_totals()
        counted: dict[tuple[str, tuple[str, ...]], float] = {}
        for name, labels, value in self._state.counters():
            key = name, _values(name, labels)
            counted[key] = counted.get(key, 0.0) + value
        for name, series in totals.counters.items():
            for joined, value in series.items():
                # A metric without labels has one series, whose joined values are "".
                key = name, tuple(joined.split("\x1f")) if FAMILIES[name].labels else ()
                counted[key] = counted.get(key, 0.0) + value
        # Before the first relay has reported there is no figure: a 0 would look as though they had been reset.
        for name, born in FROM_THE_START.items() if totals.overhead_buckets else ():
            for values in born:
                counted.setdefault((name, values), 0.0)
        counters = {
            name: CounterMetricFamily(name, family.help, labels=family.labels)
            for name, family in FAMILIES.items()
            if family.kind == "counter"
        }
        for (name, values), value in counted.items():
            counters[name].add_metric(values, value)
        yield from counters.values()

        yield _histogram(
            "hemostat_proxy_overhead_seconds",
            OVERHEAD_BUCKETS,
            [((), totals.overhead_buckets, totals.overhead_sum)] if totals.overhead_buckets else [],
        )
        for name, edges, rows in self._state.measurements.histograms():
            yield _histogram(name, edges, rows)

        gauges = {
            name: GaugeMetricFamily(name, family.help, labels=family.labels)
            for name, family in FAMILIES.items()
            if family.kind == "gauge"
        }
        for name, labels, value in self._state.gauges():
            gauges[name].add_metric(_values(name, labels), value)
        yield from gauges.values()


def _values(name: str, labels: dict[str, str]) -> tuple[str, ...]:
    return tuple(labels[label] for label in FAMILIES[name].labels)


def _histogram(
    name: str, edges: Iterable[float], series: Iterable[tuple[tuple[str, ...], list[int], float]]
) -> HistogramMetricFamily:
    """`series`: label values, plain (not cumulative) counts with one more for what is above the last edge, sum."""
    family = HistogramMetricFamily(name, FAMILIES[name].help, labels=FAMILIES[name].labels)
    bounds = [*(repr(float(edge)) for edge in edges), "+Inf"]
    for values, counts, total in series:
        cumulative = 0
        buckets = []
        for bound, count in zip(bounds, [*counts, *[0] * (len(bounds) - len(counts))], strict=True):
            cumulative += count
            buckets.append((bound, cumulative))
        family.add_metric(values, buckets, total if math.isfinite(total) else 0.0)
    return family
