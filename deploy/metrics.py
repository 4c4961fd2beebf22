"""`make docs`: writes deploy/METRICS.md from what the code exports (`hemostat.metrics.collector.GROUPS`).

What a label's value means stands here; which values there are is the code's, and a test holds the two together.
"""

from __future__ import annotations

from pathlib import Path

from hemostat.ipc.messages import OVERHEAD_BUCKETS
from hemostat.measurement import figures
from hemostat.measurement.by_decoding import STRATEGIES
from hemostat.measurement.measurements import DECODINGS, DIRECTIONS, STAGES
from hemostat.metrics.collector import FAMILIES, GROUPS, Family
from hemostat.openai import routes
from hemostat.relay import counters, outcomes
from hemostat.shadow.noise_floor import MODELS
from hemostat_calibration.alarm import Kind
from hemostat_calibration.records import Arm

PAGE = Path(__file__).with_name("METRICS.md")

Values = dict[str, str]
"""Value of a label -> what it says."""

ELSE = ""

ARMS: Values = {
    Arm.CONTROL: "drawn by lot to be left as it is, while a profile serves",
    Arm.TREATED: "drawn by lot, and the profile was asked of the engine",
    Arm.NONE: "in no comparison: no profile serves, opted out, pinned, or left out for a technical reason",
}
SHADOW_REASONS: dict[str, Values] = {
    "skipped": {
        "opted_out": "the client sent `X-Hemostat-Shadow: off`",
        "on_not_allowed": "the client sent `on`, and `shadow.allow_on` is not set",
        "route": "neither `/v1/chat/completions` nor `/v1/completions`",
        "encoded": "the request's or the answer's body is compressed",
        "body_too_large": "longer than a request is held to be read; it went on unread",
        "bad_json": "the request is no JSON object",
        "invalid": "a parameter is not what it should be; vLLM says so to the client",
        "lora": "the model is an adapter that the reference does not serve under the same name",
        "n": "several choices or prompts in one request",
        "beam_search": "beam search",
        "structured_output": "vLLM takes logprobs after the grammar's mask",
        "forced_tool": "likewise, where a tool call is forced",
        "echo": "the prompt would be in the answer",
        "prompt_logprobs": "the client asks for the prompt's logprobs itself",
        "client_logprobs": "the client asks for logprobs or token ids itself",
        "hidden_reasoning": "vLLM hides the reasoning's token ids",
        "multimodal": "images, audio or embeddings in the prompt",
        "too_long": "longer than `shadow.max_tokens`",
        "logprobs_refused": "vLLM refused what was asked for on top; raise its `--max-logprobs` to `shadow.top_k`",
        "upstream_error": "the answer is an error",
        "incomplete": "the answer broke off, or the client left",
        "empty": "no token in the answer",
        "no_logprobs": "the answer came without what was asked for",
        "token_count_mismatch": "fewer or more ids than tokens counted by vLLM",
        "tool_tokens_lost": "vLLM's tool parser swallowed tokens",
        "response_too_large": "more bytes than are held for stripping",
        "unreadable": "the answer is not what vLLM sends",
        "unknown_model": "the answer names a model that the server does not list",
        "mixed_profile": "the profile changed in the middle of the answer",
        "applied_unknown": "the engine has not said which profile it applied",
        "reference_too_long": "longer than the reference reads",
        "reference_no_adapter": "the reference does not serve the adapter any more",
        "invalid_…": "the record failed a check of its form (`ids`, `mass`, …): a bug here or in vLLM, see the log",
    },
    "dropped": {
        "queue_full": "more is sampled than the reference reads: lower `shadow.rate` or raise `shadow.max_queue`",
        "link_full": "the control process takes captures too slowly, or is away",
        "hook_error": "a bug in the interception, see the log; the client was served",
        "reference_not_ready": "the reference was not ready when the capture came, or its turn came",
        "breaker_open": "the reference failed five times in a row and is left alone for ten seconds",
        "internal_error": "a bug, see the log",
        "reference_…": "the reference failed: `down`, `timeout`, `busy`, `refused`, `out_of_memory`, …, see the log",
    },
}
ENGINE_EVENTS: Values = {
    "requests_bound": "requests for which the profile asked for was there",
    "requests_unknown": "requests that named a version that the engine does not hold: identity",
    "requests_declined": "requests with parameters that a profile does not go with: identity",
    "requests_refused": "requests with malformed `vllm_xargs` of ours",
    "rows_applied": "tokens that a profile was applied to",
    "rows_clamped": "shadowed tokens at which `calibration.clamp_nats` took effect",
    "rows_kl_clamped": "tokens at which `calibration.clamp_kl_nats` took effect",
    "rows_masked": "tokens at which an anchor was masked (a grammar, a logit_bias) or the map overflowed: identity",
    "steps_misfit": "engine steps whose logits are not the profile's vocabulary",
    "features_dropped": "positions whose features did not fit",
    "taps_sent": "positions told to the control process",
    "taps_dropped": "positions that were not told, as the control process was away or slow",
    "profiles_refused": "profiles that do not fit this engine",
    "profiles_missing": "versions that the control process no longer has",
    "fetch_errors": "fetches of a profile that failed",
    "report_errors": "reports to the control process that failed",
    "agent_errors": "bugs of the plugin's thread, see vLLM's log",
}
CALIBRATION_REASONS: Values = {
    "assigned": "by lot, into `control` or `treated`",
    "off": "`calibration.mode` is off",
    "no_profile": "none serves",
    "unknown": "the engine does not hold the version",
    "opted_out": "the client sent `X-Hemostat-Calibration: off`",
    "pinned": "the client named a version",
    "forced": "`calibration.force`",
    "own_logits": "the client shifts logits itself (logit_bias, penalties)",
    "own_parameters": "`apply: request`, and the client set temperature or logit_bias",
    "refused": "vLLM refused the request with the profile, and it was sent again as it came",
    "lora, beam_search, multimodal, invalid, bad_json, body_too_large": "as among the shadow's reasons",
}
HEADLINES: Values = {
    "kl_nats": "KL(reference‖compressed)",
    "kl_nats_upper": "the same, from the other side",
    "kl_nats_estimate": "the same without truncation, where a request's sampling is known",
    "reverse_kl_nats": "KL(compressed‖reference)",
    "reverse_kl_nats_estimate": "the same without truncation",
    "js_nats": "Jensen-Shannon divergence",
    "total_variation": "the chance that two draws, coupled as well as possible, differ",
    "top1_agreement": "part of the tokens whose likeliest id is the same",
}
"""Of hemostat_divergence. The kind (a bound, an estimate, exact) is told beside; all are exact where both sides gave
the whole vocabulary."""
KINDS = {"lower": "a lower bound", "upper": "an upper bound", "estimate": "an estimate", "exact": "exact"}
EDGES: Values = {"mean": "the estimate", "low": "lower end of the 95 % interval", "high": "upper end"}
ROUTES = f"{', '.join(f'`{route}`' for route in routes.LABELS.values())}, else `{routes.OTHER}`"

LABELS: dict[str, dict[str, Values | str]] = {
    "arm": {"": ARMS},
    "decision": {
        "": {
            "propose": "the calibrator has made a candidate",
            "promote": "it serves, or in `observe` would",
            "drop": "a candidate was given up",
            "roll_back": "a serving profile was taken back",
            "import": "an operator brought one",
            "pin, unpin, mode": "an operator's word",
        }
    },
    "decoding": {"": dict(zip(DECODINGS, ("temperature 0", "any other, or not known"), strict=True))},
    "direction": {
        "": dict(zip(DIRECTIONS, ("KL(reference‖compressed)", "KL(compressed‖reference)"), strict=True)),
    },
    "edge": {"": EDGES},
    "family": {"": "of the profile: `temperature_bias`, `contextual`, or `identity`"},
    "figure": {
        "": {
            **{name: f"{text}; {KINDS[figures.FIGURES[name].kind]}" for name, text in HEADLINES.items()},
            "top1_disagreement": "what of it is missing; exact; only with stage `excess`",
        }
    },
    "kind": {"": {"json": "a JSON answer was asked for", "tool_call": "tools were offered, and called"}},
    "label": {"": "what the client sent as `X-Hemostat-Label`, of those configured; else empty"},
    "model": {
        "": "the served name",
        "hemostat_covered_mass_ratio": {name: f"the {name} model" for name in MODELS},
        "hemostat_noise_floor_nats": {name: f"the {name} model" for name in MODELS},
        "hemostat_noise_floor_requests_total": {name: f"the {name} model" for name in MODELS},
    },
    "outcome": {
        "hemostat_requests_total": {
            counters.OK: "complete, status below 400",
            counters.CLIENT_ERROR: "complete, the upstream's status is 4xx",
            counters.SERVER_ERROR: "complete, the upstream's status is 5xx",
            counters.REFUSED: "refused by the proxy itself, the client's fault",
            counters.UPSTREAM_FAILED: "the upstream could not be reached, broke off or spoke nonsense",
            counters.CLIENT_GONE: "the client left",
        },
        "hemostat_shadow_requests_total": {
            "shadowed": "captured; each of these ends as one of the others",
            "scored": "both models have spoken about its tokens",
            "skipped": "cannot be scored",
            "dropped": "could have been, but there was no room, or something failed",
        },
        "hemostat_noise_floor_requests_total": {
            "scored": "done",
            "busy": "more waited than are kept",
            ELSE: "why it failed",
        },
        "hemostat_structured_outputs_total": {
            "valid": "it parses",
            "invalid": "it does not",
            "cut": "it ended at the length limit",
        },
    },
    "reason": {
        "hemostat_calibration_requests_total": CALIBRATION_REASONS,
        "hemostat_engine_events_total": ENGINE_EVENTS,
        "hemostat_features_dropped_total": {
            "no_tap": "the engine said nothing about the request",
            "not_sent": "it sent no features",
            "other_anchors": "they are of other ids than asked for",
            "shape": "they do not fit the tokens",
            "not_finite": "not numbers",
            "masked": "no row of them can be used",
        },
        "hemostat_learner_dropped_total": {
            "not_ready": "the learner is starting, or there is none",
            "nothing_to_learn": "the record brings no features",
            "busy": "too much waits",
        },
        "hemostat_profile_decisions_total": {
            "evidence": "held-out requests spoke for it",
            "harm": "held-out requests spoke against it",
            "unsupported": "within a window its gain was not proven anew",
            "learned": "a candidate of the calibrator",
            "operator": "an operator's word",
            "other_model": "the served model is another one now",
            ELSE: "why a candidate was given up",
        },
        "hemostat_responses_finished_total": (
            f"vLLM's finish_reason: {', '.join(f'`{name}`' for name in sorted(outcomes.REASONS))}, else `other`"
        ),
    },
    "reference": {"": "name of the reference model"},
    "route": {"": ROUTES},
    "scope": {"": "the label, route or model that the profile is for"},
    "source": {"": "what a token brought to learn from: the reference's hidden state (`hidden…`) or its list alone"},
    "stage": {
        "": dict(
            zip(
                STAGES,
                ("what the compressed model said", "after the profile that served, or in `observe` would have"),
                strict=True,
            )
        ),
        "hemostat_divergence": {
            "raw": "what the compressed model said",
            "excess": "that, less what both models differ from themselves by (the noise floor); once both are known",
        },
    },
    "strategy": {
        "": f"the request's decoding: {', '.join(f'`{name}`' for name in STRATEGIES)}; cut is top-p, top-k, min-p"
    },
    "test": {
        "": {
            Kind.BUDGET: "further from the reference than `alarm.budget_nats` allows",
            Kind.CHANGE: "no longer what the first `alarm.baseline_tokens` were",
        }
    },
    "version": {"": "a digest of the profile; `identity` for none"},
}
"""By label, and by metric where it is not the same for all ("")."""

HEAD = """# Metrics

<!-- Made by `make docs` from middleware/hemostat/metrics/; do not edit. -->

Everything on `/metrics` of the admin port, for all processes of one Hemostat together. Divergences are in nats. Labels
are bounded: no user, no request id, no prompt is ever one. Counters start again at 0 when Hemostat does. A series that
has nothing to say yet is absent. What the figures mean, and what not to conclude: [READING.md](READING.md); what to do
when an alert fires: [RUNBOOK.md](RUNBOOK.md).

Counters and histograms add up over replicas; gauges (`hemostat_divergence` and the like) are each replica's own.
"""


def page() -> str:
    parts = [HEAD]
    for title, families in GROUPS.items():
        parts.append(f"\n## {title}\n\n| metric | type | unit | labels | |\n|---|---|---|---|---|\n")
        parts += [row(name, family) for name, family in families.items()]
    edges = ", ".join(f"{edge:g}" for edge in OVERHEAD_BUCKETS)
    parts.append(f"\nBuckets of `hemostat_proxy_overhead_seconds`: {edges} seconds. Histograms are classic ones.\n")
    parts.append("\n## Labels\n")
    for label, by_metric in LABELS.items():
        for metric, values in by_metric.items():
            of = f" of `{metric}`" if metric else ""
            parts.append(f"\n### {label}{of}\n\n")
            parts.append(f"{values}.\n" if isinstance(values, str) else table(values))
    for outcome, values in SHADOW_REASONS.items():
        parts.append(f"\n### reason of `hemostat_shadow_requests_total`, {outcome}\n\n{table(values)}")
    return "".join(parts)


def row(name: str, family: Family) -> str:
    labels = ", ".join(f"`{label}`" for label in family.labels)
    text = family.help.removesuffix(".").replace("||", "‖").replace("|", "\\|")
    return f"| `{name}` | {family.kind} | {family.unit} | {labels} | {text} |\n"


def table(values: Values) -> str:
    rows = (f"| {', '.join(map(shown, name.split(', ')))} | {text} |\n" for name, text in values.items())
    return "| value | |\n|---|---|\n" + "".join(rows)


def shown(value: str) -> str:
    return "any other" if value == ELSE else f"`{value}`"


def meaning(metric: str, label: str) -> Values | str | None:
    """What METRICS.md says of a label of this metric."""
    if (metric, label) == ("hemostat_shadow_requests_total", "reason"):
        return {reason: text for reasons in SHADOW_REASONS.values() for reason, text in reasons.items()}
    by_metric = LABELS[label]
    return by_metric.get(metric, by_metric.get(""))


if __name__ == "__main__":
    assert all(meaning(name, label) for name, family in FAMILIES.items() for label in family.labels)
    PAGE.write_text(page(), encoding="utf-8")
