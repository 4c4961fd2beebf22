"""Every metric on /metrics: type, unit, help text and labels, in the groups of docs/metrics.md (made from here
by `make docs`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hemostat.metrics import names


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric with all of its series."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    """Of the value; of a counter also what is counted."""
    help: str
    labels: tuple[str, ...] = ()
    """In the order in which a sample gives their values."""


GROUPS: dict[str, tuple[Metric, ...]] = {
    "The proxy": (
        Metric(names.REQUESTS, "counter", "requests", "Requests answered by the proxy.", ("route", "outcome")),
        Metric(
            names.PROXY_OVERHEAD_SECONDS,
            "histogram",
            "seconds",
            "Time that the relay itself adds to a request, on its way up and on the first bytes' way back.",
        ),
        Metric(names.RELAYS, "gauge", "processes", "Relay processes connected."),
        Metric(
            names.REPLICA_LEADS,
            "gauge",
            "0 or 1",
            "1 where decisions are made: of the replicas that share a store, on one at a time.",
        ),
        Metric(
            names.MODEL_INFO,
            "gauge",
            "1",
            "1 for each name of the compressed model, with the reference that it is compared with.",
            ("model", "reference"),
        ),
    ),
    "The shadow": (
        Metric(
            names.SHADOW_REQUESTS,
            "counter",
            "requests",
            "Sampled requests by outcome: shadowed (captured), scored, skipped (not scorable), dropped.",
            ("outcome", "reason"),
        ),
        Metric(
            names.SHADOW_RATE_RATIO,
            "gauge",
            "ratio",
            "Fraction of the requests that is sampled (shadow.rate); absent without a reference.",
        ),
        Metric(names.SHADOW_QUEUE_DEPTH, "gauge", "captures", "Captures waiting for the reference."),
        Metric(names.SHADOW_LAG_SECONDS, "gauge", "seconds", "Age of the oldest waiting capture."),
        Metric(names.REFERENCE_UP, "gauge", "0 or 1", "1 while the reference scores; absent without a reference."),
        Metric(names.REFERENCE_TOKENS, "counter", "tokens", "Prompt and output tokens that the reference has scored."),
        Metric(names.SCORED_TOKENS, "counter", "tokens", "Output tokens scored by both models.", ("arm", "decoding")),
    ),
    "Coverage": (
        Metric(
            names.SAMPLED_REQUESTS,
            "counter",
            "requests",
            "Sampled requests that have ended: scored or not, and whether their generated tokens are known.",
            ("outcome", "reason", "tokens"),
        ),
        Metric(
            names.SAMPLED_TOKENS,
            "counter",
            "tokens",
            "Generated tokens of sampled requests that have ended, as far as known; scored over all is the coverage.",
            ("outcome", "reason"),
        ),
        Metric(
            names.KIND_SAMPLED_REQUESTS,
            "counter",
            "requests",
            "Sampled requests that have ended, by kind; one of n choices counts 1/n.",
            ("kind", "outcome"),
        ),
        Metric(
            names.KIND_SAMPLED_TOKENS,
            "counter",
            "tokens",
            "Generated tokens of sampled requests that have ended, by kind, as far as known.",
            ("kind", "outcome"),
        ),
    ),
    "Divergence": (
        Metric(
            names.DIVERGENCE,
            "gauge",
            "nats; total_variation and top1_agreement: a ratio",
            "Mean of a headline figure and the ends of its asymptotic 95 % interval.",
            ("figure", "stage", "edge"),
        ),
        Metric(
            names.TOKEN_KL_NATS,
            "histogram",
            "nats",
            "KL divergence per token between the two models' distributions, nats; a lower bound from the top ids.",
            ("direction", "stage", "arm"),
        ),
        Metric(
            names.TOKEN_TOTAL_VARIATION,
            "histogram",
            "ratio",
            "Total variation per token between the two models' distributions; a lower bound from the top ids.",
            ("stage", "arm"),
        ),
        Metric(
            names.KL_NATS,
            "counter",
            "nats",
            f"Sum of KL(reference||compressed) over tokens, a lower bound; divide by {names.KL_TOKENS}.",
            ("route", "label", "strategy"),
        ),
        Metric(
            names.KL_TOKENS,
            "counter",
            "tokens",
            "Scored tokens with a finite KL(reference||compressed).",
            ("route", "label", "strategy"),
        ),
        Metric(
            names.KIND_KL_NATS,
            "counter",
            "nats",
            f"Sum of KL(reference||served) over tokens by kind, a lower bound; divide by {names.KIND_KL_TOKENS}.",
            ("kind", "arm"),
        ),
        Metric(
            names.KIND_KL_TOKENS,
            "counter",
            "tokens",
            "Scored tokens by kind, with a finite KL(reference||served).",
            ("kind", "arm"),
        ),
        Metric(
            names.KIND_GAIN_NATS,
            "gauge",
            "nats",
            "Mean gain in KL by kind on held-out units, of the profile that serves there or in `observe` would.",
            ("kind", "weighting"),
        ),
        Metric(
            names.KIND_RECOVERED_DIVERGENCE_RATIO,
            "gauge",
            "ratio",
            "Fraction of KL(reference||compressed) that the profile removes, by kind, on the same tokens.",
            ("kind",),
        ),
        Metric(
            names.POSITION_KL_NATS,
            "counter",
            "nats",
            f"Sum of KL(reference||compressed) over {names.POSITION_KL_TOKENS},"
            " by position in the output: a lower bound.",
            ("position",),
        ),
        Metric(
            names.POSITION_KL_TOKENS,
            "counter",
            "tokens",
            "Scored tokens with a finite KL(reference||compressed), by position in the output.",
            ("position",),
        ),
        Metric(
            names.CONTEXT_KL_NATS,
            "counter",
            "nats",
            f"Sum of KL(reference||compressed) over {names.CONTEXT_KL_TOKENS},"
            " by number of tokens before them: a lower bound.",
            ("context",),
        ),
        Metric(
            names.CONTEXT_KL_TOKENS,
            "counter",
            "tokens",
            "Scored tokens with a finite KL(reference||compressed), by number of tokens before them.",
            ("context",),
        ),
        Metric(
            names.PHASE_KL_NATS,
            "counter",
            "nats",
            f"Sum of KL(reference||compressed) over {names.PHASE_KL_TOKENS},"
            " by phase of a reasoning model: a lower bound.",
            ("phase",),
        ),
        Metric(
            names.PHASE_KL_TOKENS,
            "counter",
            "tokens",
            "Scored tokens with a finite KL(reference||compressed), by phase of a reasoning model.",
            ("phase",),
        ),
        Metric(
            names.THINKING_REQUESTS,
            "counter",
            "requests",
            "Scored requests of a reasoning model (its markers are known), by how their thinking ended.",
            ("arm", "end"),
        ),
        Metric(
            names.THINKING_TOKENS,
            "counter",
            "tokens",
            "Tokens of thinking in scored requests, markers included.",
            ("arm",),
        ),
        Metric(
            names.CONDITIONAL_DIVERGENCE,
            "gauge",
            "the figure's",
            "Divergence per token of requests that a grammar restricts, conditional on the ids that it allows, with "
            "the 95% interval (edge low and high); these requests are in no other figure of divergence.",
            ("figure", "edge"),
        ),
        Metric(
            names.CONDITIONAL_TOKENS,
            "counter",
            "tokens",
            "Scored tokens of requests that a grammar restricts; bound: exact where every allowed id is known on both "
            "sides.",
            ("arm", "bound"),
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
        Metric(
            names.CONDITIONAL_KIND_RECOVERED_DIVERGENCE_RATIO,
            "gauge",
            "ratio",
            f"As {names.KIND_RECOVERED_DIVERGENCE_RATIO}, of kinds that a grammar restricts, conditional on the ids "
            "that it allows.",
            ("kind",),
        ),
        Metric(
            names.TOP1_AGREEMENT_TOKENS,
            "counter",
            "tokens",
            "Scored tokens at which both models' likeliest id is the same.",
            ("stage", "arm", "decoding"),
        ),
        Metric(
            names.COVERED_MASS_RATIO,
            "gauge",
            "ratio",
            "Mean probability mass of each model on the ids for which both gave a value.",
            ("model",),
        ),
        Metric(
            names.SURVIVAL_HALF_LIFE_TOKENS,
            "gauge",
            "tokens",
            "Tokens after which half of the sampled texts would differ from the reference's; +Inf beyond the data.",
            ("edge",),
        ),
        Metric(
            names.NOISE_FLOOR_NATS,
            "gauge",
            "nats",
            "KL divergence of a model from itself (decode or batch shape against another), nats; a lower bound.",
            ("model", "direction"),
        ),
        Metric(
            names.NOISE_FLOOR_REQUESTS,
            "counter",
            "requests",
            "Requests that a model was to score against itself, by outcome.",
            ("model", "outcome"),
        ),
        Metric(
            names.DISTANCE_REQUESTS,
            "counter",
            "requests",
            "Held-out requests whose exact distances were needed to judge an adapter, by outcome.",
            ("outcome",),
        ),
    ),
    "The alarm": (
        Metric(
            names.HEMORRHAGE_ALARM,
            "gauge",
            "0 or 1",
            '1 while this alarm is raised. The change test is of all kinds together: kind="all".',
            ("test", "kind"),
        ),
        Metric(
            names.HEMORRHAGE_EVIDENCE_RATIO,
            "gauge",
            "ratio",
            "Evidence of a test against its null hypothesis, as a fraction of the alarm level; 1 raises the alarm.",
            ("test", "kind"),
        ),
        Metric(
            names.ALARM_BASELINE_RATIO,
            "gauge",
            "ratio",
            "Fraction of the change test's baseline of this kind that has been learned; the kind is tested from 1 on.",
            ("kind",),
        ),
        Metric(
            names.ALARM_SPREAD_RATIO,
            "gauge",
            "ratio",
            "Difference of the logits in recent requests, as a factor of the baseline's; all: in the baseline's mix.",
            ("kind",),
        ),
        Metric(
            names.WORKLOAD_CHANGED,
            "gauge",
            "0 or 1",
            "1 while the mix of kinds is proven to differ from that of the baseline: information, not an alarm.",
        ),
        Metric(
            names.WORKLOAD_DISTANCE_RATIO,
            "gauge",
            "ratio",
            "Total variation between the mix of kinds now and that of the baseline, 0 to 1.",
        ),
    ),
    "Calibration": (
        Metric(
            names.CALIBRATION_REQUESTS,
            "counter",
            "requests",
            "Requests that a profile could apply to, by arm and by the reason for the arm.",
            ("arm", "reason"),
        ),
        Metric(
            names.RECOVERED_DIVERGENCE_RATIO,
            "gauge",
            "ratio",
            "Fraction of KL(reference||compressed) that the profile removes, on the same tokens.",
        ),
        Metric(
            names.PROFILE_INFO,
            "gauge",
            "1",
            "1 for the profile that serves most, or in mode observe would serve (identity if there is none).",
            ("version", "family"),
        ),
        Metric(
            names.PROFILE_KIND_INFO,
            "gauge",
            "1",
            "1 for the profile that serves a kind of traffic, or in `observe` would; identity where none does.",
            ("kind", "version"),
        ),
        Metric(
            names.PROFILE_KIND_GAIN_NATS,
            "gauge",
            "nats",
            "Mean gain in KL per token of the profile that serves a kind (or in mode observe would) over identity, on "
            "the held-out requests of its window; averaged by request and by token.",
            ("kind", "weighting"),
        ),
        Metric(
            names.PROFILE_KIND_TOTAL_VARIATION_GAIN,
            "gauge",
            "ratio",
            "The same of the total variation, where an adapter serves the kind: by this it is judged.",
            ("kind", "weighting"),
        ),
        Metric(
            names.PROFILE_KIND_EVIDENCE_RATIO,
            "gauge",
            "ratio",
            "Evidence for the candidate that is nearest to its promotion in a kind, as a part of what is needed (log "
            "scale; 1: proven).",
            ("kind",),
        ),
        Metric(
            names.PROFILE_PROMOTIONS,
            "counter",
            "profiles",
            "Profiles that were promoted (in mode observe: would serve).",
        ),
        Metric(names.PROFILE_ROLLBACKS, "counter", "profiles", "Profiles rolled back."),
        Metric(names.PROFILE_DECISIONS, "counter", "decisions", "Decisions about profiles.", ("decision", "reason")),
        Metric(
            names.LEARNED_TOKENS,
            "counter",
            "tokens",
            "Tokens that contextual profiles were learned from, by source.",
            ("source",),
        ),
        Metric(
            names.LEARNER_DROPPED,
            "counter",
            "requests",
            "Requests that were not passed to the learner, by reason.",
            ("reason",),
        ),
        Metric(
            names.FEATURES_DROPPED,
            "counter",
            "requests",
            "Scored requests without usable features from the engine, by reason.",
            ("reason",),
        ),
    ),
    "Adapters at the engine": (
        Metric(
            names.ADAPTERS,
            "gauge",
            "adapters",
            "Adapters that should be loaded at the engines, are loaded, and may be asked for.",
            ("state",),
        ),
        Metric(names.ADAPTER_LOADS, "counter", "attempts", "Attempts to load an adapter at the upstream.", ("result",)),
        Metric(
            names.ADAPTER_PROBES,
            "counter",
            "probes",
            "Probes of the upstream with adapters, by result.",
            ("probe", "result"),
        ),
    ),
    "Adapters": (
        Metric(
            names.ADAPTER_TEXT_TOKENS,
            "counter",
            "tokens",
            "Tokens of prompts and answers that were collected for adapters, in memory.",
        ),
        Metric(
            names.ADAPTER_BUILDS,
            "counter",
            "builds",
            "Attempts to make an adapter, by what came of them.",
            ("outcome",),
        ),
        Metric(
            names.ADAPTER_BUILD_SECONDS,
            "gauge",
            "seconds",
            "Time that the last adapter took to be made; absent before the first one.",
        ),
        Metric(names.ADAPTER_RANK, "gauge", "ranks", "Largest rank of a layer of the last adapter that was made."),
        Metric(
            names.ADAPTER_BYTES,
            "gauge",
            "bytes",
            "Size of the last adapter that was made, and of the compressed layers that it corrects.",
            ("form",),
        ),
        Metric(
            names.ADAPTER_HELD_OUT_RECOVERED_RATIO,
            "gauge",
            "ratio",
            "Part of KL(reference‖compressed) that the last adapter recovers on texts which its build held out.",
        ),
        Metric(
            names.ADAPTER_BUILDER_RESTARTS,
            "counter",
            "restarts",
            "Starts of the process that makes an adapter, after it had ended early.",
        ),
        Metric(
            names.ADAPTER_JUDGED,
            "counter",
            "requests",
            "Held-out requests whose exact distances were computed on copies of both models.",
        ),
        Metric(
            names.ADAPTER_JUDGE_DROPPED,
            "counter",
            "requests",
            "Held-out requests that went on without exact distances, by reason.",
            ("reason",),
        ),
        Metric(
            names.ADAPTER_COPIES_BYTES, "gauge", "bytes", "Memory of the copies that judge adapters; 0: none is loaded."
        ),
    ),
    "The engine's plugin": (
        Metric(names.ENGINES, "gauge", "engines", "Engines whose plugin reports."),
        Metric(names.ENGINE_EVENTS, "counter", "events", "Events counted by the engine plugins.", ("reason",)),
        Metric(
            names.ENGINE_TAPS_DROPPED,
            "counter",
            "runs",
            "Taps from engines that were not used in time or exceeded the buffer.",
        ),
        Metric(
            names.ENGINE_FEATURES_DROPPED,
            "counter",
            "runs",
            "Runs of a request's positions whose features exceeded the control process's buffer.",
        ),
    ),
    "What clients got, of all generations": (
        Metric(
            names.RESPONSES_FINISHED,
            "counter",
            "choices",
            "Choices of all generations that passed by, sampled or not, by arm and finish_reason.",
            ("arm", "reason"),
        ),
        Metric(
            names.OUTPUT_TOKENS,
            "counter",
            "tokens",
            "Output tokens of all generations, by usage or else by the stream's events.",
            ("arm",),
        ),
        Metric(
            names.REPETITION_LOOPS,
            "counter",
            "responses",
            "Of all generations, those that end in one block of text over and over.",
            ("arm",),
        ),
        Metric(
            names.OUTCOME_CONVERSATIONS,
            "counter",
            "conversations",
            "Conversations that count in the comparison of arms, by whether their first answer of this kind was good.",
            ("kind", "arm", "outcome", "result"),
        ),
        Metric(
            names.OUTCOME_DIFFERENCE,
            "gauge",
            "ratio",
            "Share of bad answers, treated minus control, with its interval; of `length`: mean tokens, relative to the "
            "control arm.",
            ("kind", "outcome", "edge"),
        ),
        Metric(
            names.OUTCOME_HARM,
            "gauge",
            "0 or 1",
            "1 from the proof that a profile harms an outcome of this kind until an operator releases the kind.",
            ("kind",),
        ),
        Metric(
            names.STRUCTURED_OUTPUTS,
            "counter",
            "outputs",
            "Of all generations, JSON and tool calls that were asked for: valid, invalid, or cut at the length limit.",
            ("arm", "kind", "outcome"),
        ),
    ),
    "Failures of Hemostat itself; all of these should stay 0": (
        Metric(
            names.CALIBRATION_ERRORS,
            "counter",
            "requests",
            "Scored requests that calibration could neither learn from nor judge by: a bug, see the log.",
        ),
        Metric(names.STORE_ERRORS, "counter", "operations", "Reads and writes that the store refused."),
        Metric(
            names.OUTCOME_REPORTS,
            "counter",
            "responses",
            "Outcomes of requests in an arm that relays reported to the control process, or dropped while it was away.",
            ("result",),
        ),
        Metric(
            names.OUTCOME_ERRORS,
            "counter",
            "responses",
            "Responses whose outcome could not be judged: a bug, see the log.",
        ),
        Metric(
            names.TRACING_ERRORS,
            "counter",
            "requests",
            "Requests that could not be traced or logged: a bug, see the log.",
        ),
    ),
}
"""The metrics of the relays and of the control process, by subject."""

METRICS: dict[str, Metric] = {metric.name: metric for metrics in GROUPS.values() for metric in metrics}
"""By name."""
