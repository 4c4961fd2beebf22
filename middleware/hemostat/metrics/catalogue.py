"""Every metric on /metrics: type, unit, help text and labels, in the groups of deploy/METRICS.md (made from here
by `make docs`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hemostat.metrics import names


@dataclass(frozen=True, slots=True)
class Family:
    """One metric with all of its series."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    """Of the value; of a counter also what is counted."""
    help: str
    labels: tuple[str, ...] = ()
    """In the order in which a sample gives their values."""


GROUPS: dict[str, tuple[Family, ...]] = {
    "The proxy": (
        Family(names.REQUESTS, "counter", "requests", "Requests answered by the proxy.", ("route", "outcome")),
        Family(
            names.PROXY_OVERHEAD_SECONDS,
            "histogram",
            "seconds",
            "Time that the relay itself adds to a request, on its way up and on the first bytes' way back.",
        ),
        Family(names.RELAYS, "gauge", "processes", "Relay processes connected."),
        Family(
            names.REPLICA_LEADS,
            "gauge",
            "0 or 1",
            "1 where decisions are made: of the replicas that share a store, on one at a time.",
        ),
        Family(
            names.MODEL_INFO,
            "gauge",
            "1",
            "1 for each name of the compressed model, with the reference that it is compared with.",
            ("model", "reference"),
        ),
    ),
    "The shadow": (
        Family(
            names.SHADOW_REQUESTS,
            "counter",
            "requests",
            "Sampled requests by what became of them: shadowed (captured), scored, skipped (not scorable), dropped.",
            ("outcome", "reason"),
        ),
        Family(
            names.SHADOW_RATE_RATIO,
            "gauge",
            "ratio",
            "Part of the requests that is sampled (shadow.rate); absent without a reference.",
        ),
        Family(names.SHADOW_QUEUE_DEPTH, "gauge", "captures", "Captures waiting for the reference."),
        Family(names.SHADOW_LAG_SECONDS, "gauge", "seconds", "Age of the oldest waiting capture."),
        Family(names.REFERENCE_UP, "gauge", "0 or 1", "1 while the reference scores; absent without a reference."),
        Family(names.REFERENCE_TOKENS, "counter", "tokens", "Prompt and output tokens that the reference has scored."),
        Family(names.SCORED_TOKENS, "counter", "tokens", "Output tokens scored by both models.", ("arm", "decoding")),
    ),
    "Divergence": (
        Family(
            names.DIVERGENCE,
            "gauge",
            "nats; total_variation and top1_agreement: a ratio",
            "Mean of a headline figure and the ends of its 95 % interval, which is valid at every look.",
            ("figure", "stage", "edge"),
        ),
        Family(
            names.TOKEN_KL_NATS,
            "histogram",
            "nats",
            "KL divergence per token between the two models' distributions, nats; a lower bound from the top ids.",
            ("direction", "stage", "arm"),
        ),
        Family(
            names.TOKEN_TOTAL_VARIATION,
            "histogram",
            "ratio",
            "Total variation per token between the two models' distributions; a lower bound from the top ids.",
            ("stage", "arm"),
        ),
        Family(
            names.KL_NATS,
            "counter",
            "nats",
            f"Sum of KL(reference||compressed) over tokens, a lower bound; divide by {names.KL_TOKENS}.",
            ("route", "label", "strategy"),
        ),
        Family(
            names.KL_TOKENS,
            "counter",
            "tokens",
            "Scored tokens with a finite KL(reference||compressed).",
            ("route", "label", "strategy"),
        ),
        Family(
            names.TOP1_AGREEMENT_TOKENS,
            "counter",
            "tokens",
            "Scored tokens at which both models' likeliest id is the same.",
            ("stage", "arm", "decoding"),
        ),
        Family(
            names.COVERED_MASS_RATIO,
            "gauge",
            "ratio",
            "Mean probability mass of each model on the ids for which both gave a value.",
            ("model",),
        ),
        Family(
            names.SURVIVAL_HALF_LIFE_TOKENS,
            "gauge",
            "tokens",
            "Tokens after which half of the sampled texts would differ from the reference's; +Inf beyond the data.",
            ("edge",),
        ),
        Family(
            names.NOISE_FLOOR_NATS,
            "gauge",
            "nats",
            "KL divergence of a model from itself (decode or batch shape against another), nats; a lower bound.",
            ("model", "direction"),
        ),
        Family(
            names.NOISE_FLOOR_REQUESTS,
            "counter",
            "requests",
            "Requests that a model was to score against itself, by what became of it.",
            ("model", "outcome"),
        ),
    ),
    "The alarm": (
        Family(
            names.HEMORRHAGE_ALARM,
            "gauge",
            "0 or 1",
            "1 while the test on this route has gone off; see alarm.alpha for how often that happens for nothing.",
            ("test", "route"),
        ),
        Family(
            names.HEMORRHAGE_EVIDENCE_RATIO,
            "gauge",
            "ratio",
            "Evidence of a test against 'nothing is wrong', as a part of what raises the alarm; 1 raises it.",
            ("test", "route"),
        ),
        Family(
            names.ALARM_BASELINE_RATIO,
            "gauge",
            "ratio",
            "Part of the baseline of a change test that has been learned; it tests once this is 1.",
            ("route",),
        ),
    ),
    "Calibration": (
        Family(
            names.CALIBRATION_REQUESTS,
            "counter",
            "requests",
            "Requests for which a profile was in question, by arm and by why they stand in it.",
            ("arm", "reason"),
        ),
        Family(
            names.RECOVERED_DIVERGENCE_RATIO,
            "gauge",
            "ratio",
            "Part of KL(reference||compressed) that the profile wins back, on the same tokens.",
        ),
        Family(
            names.PROFILE_INFO,
            "gauge",
            "1",
            "1 for the profile that serves, or in mode observe would (identity when none does).",
            ("version", "family"),
        ),
        Family(
            names.PROFILE_SCOPE_INFO,
            "gauge",
            "1",
            "1 for the profile of its own that a label, route or model is served with (calibration.scope).",
            ("scope", "version"),
        ),
        Family(
            names.PROFILE_PROMOTIONS,
            "counter",
            "profiles",
            "Profiles that the guard let serve, or in mode observe would have.",
        ),
        Family(names.PROFILE_ROLLBACKS, "counter", "profiles", "Profiles taken back."),
        Family(names.PROFILE_DECISIONS, "counter", "decisions", "Decisions about profiles.", ("decision", "reason")),
        Family(
            names.LEARNED_TOKENS,
            "counter",
            "tokens",
            "Tokens that contextual profiles were learned from, by what they brought.",
            ("source",),
        ),
        Family(
            names.LEARNER_DROPPED,
            "counter",
            "requests",
            "Learning requests that the learner was not given, by reason.",
            ("reason",),
        ),
        Family(
            names.FEATURES_DROPPED,
            "counter",
            "requests",
            "Scored requests whose features the engine did not hand out in a usable form, by reason.",
            ("reason",),
        ),
    ),
    "The engine's plugin": (
        Family(names.ENGINES, "gauge", "engines", "Engines whose plugin reports."),
        Family(names.ENGINE_EVENTS, "counter", "events", "What the engine plugins counted.", ("reason",)),
        Family(
            names.ENGINE_TAPS_DROPPED,
            "counter",
            "runs",
            "Runs of the engine's numbers that nobody took in time, or that there was no room for.",
        ),
        Family(
            names.ENGINE_FEATURES_DROPPED,
            "counter",
            "runs",
            "Runs of a request's positions whose features the control process had no room for.",
        ),
    ),
    "What clients got, of all generations": (
        Family(
            names.RESPONSES_FINISHED,
            "counter",
            "choices",
            "Choices of all generations that passed by, sampled or not, by arm and finish_reason.",
            ("arm", "reason"),
        ),
        Family(
            names.OUTPUT_TOKENS,
            "counter",
            "tokens",
            "Output tokens of all generations, by usage or else by the stream's events.",
            ("arm",),
        ),
        Family(
            names.REPETITION_LOOPS,
            "counter",
            "responses",
            "Of all generations, those that end in one block of text over and over.",
            ("arm",),
        ),
        Family(
            names.STRUCTURED_OUTPUTS,
            "counter",
            "outputs",
            "Of all generations, JSON and tool calls that were asked for: valid, invalid, or cut at the length limit.",
            ("arm", "kind", "outcome"),
        ),
    ),
    "Failures of Hemostat itself; all of these should stay 0": (
        Family(
            names.CALIBRATION_ERRORS,
            "counter",
            "requests",
            "Scored requests that calibration could neither learn from nor judge by: a bug, see the log.",
        ),
        Family(names.STORE_ERRORS, "counter", "operations", "Reads and writes that the store refused."),
        Family(
            names.OUTCOME_ERRORS,
            "counter",
            "responses",
            "Responses whose outcome could not be judged: a bug, see the log.",
        ),
        Family(
            names.TRACING_ERRORS,
            "counter",
            "requests",
            "Requests that could not be traced or logged: a bug, see the log.",
        ),
    ),
}
"""The metrics of the relays and of the control process, by subject."""

FAMILIES: dict[str, Family] = {family.name: family for families in GROUPS.values() for family in families}
"""By name."""
