"""The metrics of the engines: as servers that requests go to, and of Hemostat's plugin in them."""

from __future__ import annotations

from hemostat.metrics import names
from hemostat.metrics.samples import Metric

_ENGINE = ("engine",)
UPSTREAM_METRICS = (
    Metric(
        names.UPSTREAM_UP_RATIO,
        "gauge",
        "ratio",
        "Fraction of the relay processes that consider the engine healthy: below 1 some have ejected it.",
        _ENGINE,
    ),
    Metric(
        names.UPSTREAM_DRAINED,
        "gauge",
        "0 or 1",
        "1 while an operator drains the engine, or upstream.outlier excludes it.",
        _ENGINE,
    ),
    Metric(names.UPSTREAM_OUTSTANDING, "gauge", "requests", "Requests in progress at the engine.", _ENGINE),
    Metric(
        names.ENGINE_KL_NATS,
        "counter",
        "nats",
        "KL(reference‖compressed) of the scored tokens of the engine, summed; over its tokens, the mean.",
        _ENGINE,
    ),
    Metric(names.ENGINE_KL_TOKENS, "counter", "tokens", "Scored tokens of the engine with a finite KL.", _ENGINE),
    Metric(
        names.ENGINE_OUTLIER,
        "gauge",
        "0 or 1",
        "1 while the engine is proven to be an outlier; false for any engine with a probability of at most "
        "1 %. Absent where engines are not compared (`outlier_engine` of the status).",
        _ENGINE,
    ),
    Metric(
        names.ENGINE_OUTLIER_EVIDENCE_RATIO,
        "gauge",
        "ratio",
        "Evidence that the engine is an outlier, as a fraction of the required evidence (log scale).",
        _ENGINE,
    ),
)

CANARY_METRICS = (
    Metric(
        names.CANARY_CHANGED,
        "gauge",
        "0 or 1",
        "1 while two replays of the canaries in a row were too far away; of an engine that has not changed, by "
        "chance in less than 1 % of all years. Absent before the first replay.",
        ("engine", "model", "against", "cause"),
    ),
    Metric(
        names.CANARY_DISTANCE_NATS,
        "gauge",
        "nats",
        "Of the last replay: mean |difference of log-probabilities| of a sequence's tokens, median over sequences.",
        ("engine", "model", "against"),
    ),
    Metric(names.CANARY_REPLAYS, "counter", "replays", "Replays of canaries, by outcome.", ("outcome",)),
)

GATE_METRICS = (
    Metric(
        names.GATE_STATE,
        "gauge",
        "0 or 1",
        "1 for the state of the live gate: if its candidate may replace what serves.",
        ("state",),
    ),
    Metric(names.GATE_UNITS, "gauge", "requests", "Requests that have counted in the live gate."),
    Metric(
        names.GATE_EXCESS_RATIO,
        "gauge",
        "ratio",
        "The mean excess of the candidate over what serves, over all kinds of traffic; positive is against it.",
        ("question",),
    ),
    Metric(names.GATE_CANDIDATE_TOKENS, "counter", "tokens", "Tokens that candidates have read and written."),
    Metric(
        names.GATE_FAILURES,
        "counter",
        "requests",
        "Requests of the live gate that failed, by reason.",
        ("reason",),
    ),
)

PLUGIN_METRICS = (
    Metric(
        names.ENGINE_PLUGINS,
        "gauge",
        "engines",
        "Engines whose plugin reports, by its version, and by whether that fits this control process.",
        ("version", "fits"),
    ),
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
        "1 while sampled requests ask for logprobs in their responses, because too many answers were lost.",
    ),
)
