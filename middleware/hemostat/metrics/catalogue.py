"""Every metric on /metrics: type, unit, help text and labels, in the groups of the reference page."""

from __future__ import annotations

from hemostat.metrics import engines, names
from hemostat.metrics.samples import Metric

GROUPS: dict[str, tuple[Metric, ...]] = {
    "The proxy": (
        Metric(names.REQUESTS, "counter", "requests", "Requests answered by the proxy.", ("route", "outcome")),
        Metric(
            names.REPEATED_REQUESTS,
            "counter",
            "requests",
            "Requests that were sent upstream again as the client wrote them, because of what had been added to them.",
            ("reason",),
        ),
        Metric(
            names.PROXY_OVERHEAD_SECONDS,
            "histogram",
            "seconds",
            "Time that the relay itself adds to a request, on its way up and on the first bytes' way back.",
        ),
        Metric(
            names.CLOSED_CONNECTIONS,
            "counter",
            "connections",
            "Connections of clients that were refused, or closed while they waited for a request, because of a limit.",
            ("limit",),
        ),
        Metric(names.RELAYS, "gauge", "processes", "Relay processes connected."),
        Metric(
            names.MODEL_INFO,
            "gauge",
            "1",
            "1 for each name of the compressed model, with the reference that it is compared with.",
            ("model", "reference"),
        ),
        Metric(
            names.CONFIG_LAST_RELOAD_SUCCESSFUL,
            "gauge",
            "0 or 1",
            "0 where the last SIGHUP found a configuration that is not valid, or not usable, and changed nothing.",
        ),
        Metric(
            names.CLIENT_LIMITED_REQUESTS,
            "counter",
            "requests",
            "Requests refused with 429, by the limit of `client_limits` that they exceeded.",
            ("limit",),
        ),
        Metric(
            names.ACCESS_LOG_DROPPED_LINES,
            "counter",
            "lines",
            "Lines of the access log that could not be written, or not fast enough.",
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
            "Fraction of the requests that is sampled: shadow.rate, or what can be scored; absent without a reference.",
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
            names.EFFECTIVE_REQUESTS,
            "gauge",
            "requests",
            "Requests divided by their variance inflation: the number of independent requests with "
            "the same information; 0 where that is not known.",
            ("kind", "figure"),
        ),
        Metric(
            names.VARIANCE_INFLATION_RATIO,
            "gauge",
            "ratio",
            "Variance of sums of a figure over requests, as a factor of that of independent requests; absent where not "
            "known.",
            ("kind", "figure"),
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
            names.KIND_DRAFT_ACCEPTANCE_RATIO,
            "gauge",
            "ratio",
            "Expected acceptance of the compressed model as a draft of its reference, by kind: 1 - total variation.",
            ("kind", "bound"),
        ),
        Metric(
            names.PLACE_KL_NATS,
            "counter",
            "nats",
            f"Sum of KL(reference||compressed) over {names.PLACE_KL_TOKENS}, by the place of the token in its text: a "
            "lower bound.",
            ("division", "place"),
        ),
        Metric(
            names.PLACE_KL_TOKENS,
            "counter",
            "tokens",
            "Scored tokens with a finite KL(reference||compressed), by their place in the text. A token counts once in "
            "each division, so do not sum over divisions.",
            ("division", "place"),
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
            names.TOP1_AGREEMENT_TOKENS,
            "counter",
            "tokens",
            "Scored tokens at which both models' likeliest id is known to be the same. Its share is of "
            "hemostat_top1_known_tokens_total.",
            ("stage", "arm", "decoding"),
        ),
        Metric(
            names.TOP1_KNOWN_TOKENS,
            "counter",
            "tokens",
            "Scored tokens at which it is known if both models' likeliest id is the same; in the stage calibrated, "
            "without the tokens at which the profile's effect is unknown.",
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
            names.RECOVERED_DISTRIBUTION_RATIO,
            "gauge",
            "ratio",
            "Share of the tokens at which the compressed model's whole distribution was recovered from its logits at "
            "the anchors, so that figures are exact.",
            (),
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
    ),
    "Divergence under a grammar": (
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
            "Total variation between the mix of kinds in the last complete window and that of the baseline, 0 to 1.",
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
            "Fraction of KL(reference||compressed) that the profile removes, on the same tokens, by kind and of all "
            'kinds together (kind="all").',
            ("kind",),
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
            "Mean gain in total variation where an adapter serves the kind: the figure by which adapters are judged.",
            ("kind", "weighting"),
        ),
        Metric(
            names.PROFILE_KIND_EVIDENCE_RATIO,
            "gauge",
            "ratio",
            "Evidence for the candidate that is nearest to its promotion in a kind, as a fraction of the required "
            "evidence (log scale; 1: proven).",
            ("kind",),
        ),
        Metric(names.PROFILE_DECISIONS, "counter", "decisions", "Decisions about profiles.", ("decision", "reason")),
        Metric(
            names.LEARNED_TOKENS,
            "counter",
            "tokens",
            "Tokens that contextual profiles were learned from, by source.",
            ("source",),
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
            "Adapters that should be loaded at the engines, are loaded, and are ready for requests.",
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
            names.ADAPTER_BUILDS,
            "counter",
            "builds",
            "Attempts to make an adapter, by outcome.",
            ("outcome",),
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
            names.ADAPTER_JUDGED,
            "counter",
            "requests",
            "Held-out requests by whether their exact distances were computed on copies of both models: judged, or why "
            "they were used without.",
            ("outcome",),
        ),
    ),
    "The engines": engines.UPSTREAM_METRICS,
    "Canaries": engines.CANARY_METRICS,
    "The live gate": engines.GATE_METRICS,
    "The engine's plugin": engines.PLUGIN_METRICS,
    "What clients got, of all generations": (
        Metric(
            names.RESPONSES_FINISHED,
            "counter",
            "choices",
            "Choices of all generations, sampled or not, by arm and finish_reason.",
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
            "Of all generations, those that end in repetitions of one block of text.",
            ("arm",),
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
            names.INTERNAL_ERRORS,
            "counter",
            "requests",
            "Requests for which a part of Hemostat failed, without an effect on the client: a bug, see the log.",
            ("part",),
        ),
        Metric(names.STORE_ERRORS, "counter", "operations", "Reads and writes that the store refused."),
        Metric(
            names.RECORDS_LOST,
            "counter",
            "requests",
            "Scored requests that could not be written to `records.path`, such as to a full disk; it is tried again.",
        ),
    ),
}
"""The metrics of the relays and of the control process, by subject."""

METRICS: dict[str, Metric] = {metric.name: metric for metrics in GROUPS.values() for metric in metrics}
"""All metrics by name."""
