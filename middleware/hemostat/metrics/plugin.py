"""The metrics of Hemostat's plugin in the engines."""

from __future__ import annotations

from hemostat.metrics import names
from hemostat.metrics.metric import Metric

METRICS = (
    Metric(names.ENGINE_EVENTS, "counter", "events", "Events counted by the engine plugins.", ("reason",)),
    Metric(
        names.ENGINE_TAPS_DROPPED,
        "counter",
        "runs",
        "Taps from engines that were not used in time or exceeded the buffer.",
    ),
    Metric(
        names.ENGINE_ANSWERS,
        "counter",
        "answers",
        "Whole answers (ids and log-probabilities) of tapped requests from vLLM's API servers, by reason.",
        ("reason",),
    ),
    Metric(
        names.ENGINE_ANSWERS_PAUSED,
        "gauge",
        "0 or 1",
        "1: too many answers got lost, so that sampled requests ask for logprobs in their responses for some time.",
    ),
)
