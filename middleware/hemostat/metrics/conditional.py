"""Metrics of requests whose tokens a grammar restricts: conditional on the allowed ids, and in no other divergence."""

from __future__ import annotations

from hemostat.metrics import names
from hemostat.metrics.metric import Metric

METRICS: tuple[Metric, ...] = (
    Metric(
        names.CONDITIONAL_DIVERGENCE,
        "gauge",
        "the figure's",
        "Divergence per token of requests that a grammar restricts, conditional on the ids that it allows, with "
        "the 95% interval (edge low and high); these requests are in no other figure of divergence.",
        ("figure", "edge"),
    ),
    Metric(
        names.CONDITIONAL_KIND_KL_NATS,
        "counter",
        "nats",
        f"As {names.KIND_KL_NATS}, of kinds that a grammar restricts, conditional on the ids that it allows.",
        ("kind", "arm"),
    ),
    Metric(
        names.CONDITIONAL_KIND_KL_TOKENS,
        "counter",
        "tokens",
        f"As {names.KIND_KL_TOKENS}, of kinds that a grammar restricts.",
        ("kind", "arm"),
    ),
    Metric(
        names.CONDITIONAL_KIND_GAIN_NATS,
        "gauge",
        "nats",
        f"As {names.KIND_GAIN_NATS}, of kinds that a grammar restricts, conditional on the ids that it allows.",
        ("kind", "weighting"),
    ),
)
