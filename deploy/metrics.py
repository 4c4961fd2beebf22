"""The page docs/reference/metrics.md, of what the code exports (`hemostat.metrics.catalogue.GROUPS`).

This file explains the values of labels; the code defines which values exist. tests/deploy/test_docs.py checks that both
agree.
"""

from __future__ import annotations

from hemostat.adapters.live.builder import BuildFailure
from hemostat.adapters.live.client import BuildOutcome
from hemostat.adapters.live.judge import JUDGED, JudgeDropReason
from hemostat.adapters.serving.probes import AGREEMENT, ERROR, FAILED, ISOLATION, PASSED, WAITING
from hemostat.canaries.engine import BASELINE, ENGINES, PREFIX, SHORT, TEXTS, WEIGHTS
from hemostat.canaries.judge import EQUAL, EXCEEDED
from hemostat.canaries.judge import FAILED as COULD_NOT_TELL
from hemostat.gate.live.measuring import BAD_ANSWERS, OWN_ANSWERS, STABLE_TOKENS
from hemostat.ipc import ends
from hemostat.ipc.messages import OVERHEAD_BUCKETS, REST_GRAMMAR_KIND, REST_KIND
from hemostat.measurement import figures
from hemostat.measurement.by_decoding import STRATEGIES
from hemostat.measurement.by_place import CONTEXTS, POSITIONS
from hemostat.measurement.coverage import UNREAD_KIND
from hemostat.measurement.figures import MODELS
from hemostat.measurement.measurements import DECODING_KINDS, DIRECTIONS, STAGES
from hemostat.measurement.thinking import CUT, ENDED, NONE, STOPPED
from hemostat.metrics import names, reasons
from hemostat.metrics.catalogue import GROUPS
from hemostat.metrics.reasons import UNJUDGED, FailedPart, Unscored
from hemostat.metrics.samples import Metric
from hemostat.openai import routes
from hemostat.profiles.decisions import Decision, Reason
from hemostat.relay import outcomes
from hemostat_calibration.alarm import AlarmTest
from hemostat_calibration.canary_cause import Cause
from hemostat_calibration.divergence.places import ANSWER, THINKING
from hemostat_calibration.outcomes import LENGTH, Outcome
from hemostat_calibration.records import Arm

Values = dict[str, str]
"""Value of a label -> its meaning."""

ELSE = ""

ARMS: Values = {
    Arm.CONTROL: "randomly assigned to get no profile, while a profile serves",
    Arm.TREATED: "randomly assigned, and the profile was requested from the engine",
    Arm.NONE: "in no comparison: no profile serves, or the request cannot be scored, opted out, is pinned, or has "
    "another technical reason",
}
SHADOW_REASONS: dict[str, Values] = {
    outcome: {reason.value: reason.meaning for reason in Unscored if reason.outcome is outcome}
    for outcome in (reasons.Outcome.SKIPPED, reasons.Outcome.DROPPED)
}
ENGINE_EVENTS: Values = {
    "requests_bound": "requests for which the engine held the requested profile",
    "requests_unknown": "requests that named a version that the engine does not hold; no profile is applied",
    "requests_declined": "requests with parameters that exclude a profile; no profile is applied",
    "requests_refused": "requests with malformed `vllm_xargs` of Hemostat, or with unsigned ones that only "
    "Hemostat may use",
    "rows_applied": "tokens that a profile was applied to",
    "rows_clamped": "shadowed tokens at which `calibration.clamp_nats` took effect",
    "rows_kl_clamped": "tokens at which a profile's limit of 2 nats of KL took effect",
    "rows_masked": "tokens without a profile: an anchor was masked (a grammar, a logit_bias) or the map overflowed",
    "steps_misfit": "engine steps whose logits do not have the size of the profile's vocabulary",
    "features_dropped": "positions whose features exceeded the buffer",
    "sets_unknown": "positions of which it is not known which ids a grammar allows: the buffer was full, or vLLM "
    "decodes speculatively or masks in a way that is not known",
    "taps_sent": "positions reported to the control process",
    "taps_dropped": "positions that were not reported, because the control process did not run or was slow",
    "profiles_refused": "profiles that do not fit this engine",
    "profiles_failed": "profiles that failed while they were applied; each is off in its engine until that restarts",
    "profiles_missing": "versions that the control process no longer has",
    "fetch_errors": "fetches of a profile that failed",
    "report_errors": "reports to the control process that failed",
    "agent_errors": "bugs in the plugin's thread, see vLLM's log",
    "adapters_loaded": "adapters of Hemostat's that were loaded",
    "adapters_failed": "adapters that could not be loaded, see vLLM's log",
    "adapters_evicted": "adapters of Hemostat's that were unloaded to free a slot",
}
CALIBRATION_REASONS: Values = {
    "assigned": "randomly, to `control` or `treated`",
    "off": "`calibration.mode` is `off`",
    "no_profile": "none serves",
    "unknown": "the engine does not hold the version",
    "opted_out": "the client sent `X-Hemostat-Calibration: off`, or `X-Hemostat-Shadow: off`",
    "pinned": "the client named a version",
    "own_logits": "the client changes logits itself (logit_bias, penalties)",
    "own_xargs": "the client named a profile itself, in `vllm_xargs.hemostat`",
    "other_model": "profiles are for another of the served models",
    "refused": "vLLM refused the request as Hemostat had changed it, and it was sent again unchanged",
    "own_adapter": "the profile is an adapter and the client asked for another model, such as an adapter of its own",
    "not_applied": "the profile is an adapter, and the answer says that another model answered",
    **{
        ", ".join(
            UNJUDGED[1:]
        ): "as for `hemostat_shadow_requests_total`: it cannot be scored, and only what can be judged is treated"
    },
}
HEADLINES: Values = {
    "kl_nats": "KL(reference‖compressed)",
    "kl_nats_upper": "KL(reference‖compressed)",
    "kl_nats_estimate": "KL(reference‖compressed) without truncation bias, for requests whose sampling is known",
    "reverse_kl_nats": "KL(compressed‖reference)",
    "reverse_kl_nats_estimate": "KL(compressed‖reference) without truncation bias",
    "js_nats": "Jensen-Shannon divergence",
    "total_variation": "the probability that two draws, coupled as well as possible, differ",
    "top1_agreement": "fraction of the tokens at which the likeliest id is the same",
}
"""Figures of hemostat_divergence. The kind (a bound, an estimate, exact) is added; all are exact where both sides gave
the whole vocabulary."""
KINDS = {"lower": "a lower bound", "upper": "an upper bound", "estimate": "an estimate", "exact": "exact"}
EDGES: Values = {"mean": "the estimate", "low": "lower end of the asymptotic 95 % interval", "high": "upper end"}
ROUTE_VALUES = f"{', '.join(f'`{route}`' for route in routes.LABELS.values())}, else `{routes.OTHER}`"

CONDITIONAL = (names.CONDITIONAL_KIND_KL_NATS, names.CONDITIONAL_KIND_KL_TOKENS, names.CONDITIONAL_KIND_GAIN_NATS)
SAMPLED = (names.SAMPLED_REQUESTS, names.SAMPLED_TOKENS, names.KIND_SAMPLED_TOKENS)
SAMPLED_OUTCOMES: Values = {
    "scored": "both models have scored its tokens",
    "skipped": "cannot be scored",
    "dropped": "could have been scored, but there was no room, or something failed",
}

LABELS: dict[str, dict[str, Values | str]] = {
    "arm": {"": ARMS},
    "bound": {"": {"lower": "at least", "upper": "at most; the same where both sides gave the whole vocabulary"}},
    "decision": {
        "": {
            Decision.PROPOSE: "the calibrator proposed a candidate",
            Decision.PROMOTE: "it serves a kind of traffic, or in `observe` would serve it",
            Decision.DROP: "a candidate was dropped",
            Decision.ROLL_BACK: "a serving profile was rolled back from a kind of traffic",
            Decision.RELEASE: "an operator ended the hold of a kind at identity",
            Decision.IMPORT: "an operator imported a profile",
            Decision.PIN: "an operator pinned a profile for a kind of traffic",
            Decision.UNPIN: "an operator unpinned it",
            Decision.MODE: "an operator changed `calibration.mode`",
        }
    },
    "decoding": {
        "": dict(
            zip(
                DECODING_KINDS,
                (
                    "temperature 0",
                    "decoded with a temperature above 0, or one that is not known; it is not about the sampling of "
                    "requests for shadow scoring",
                ),
                strict=True,
            )
        )
    },
    "direction": {
        "": dict(zip(DIRECTIONS, ("KL(reference‖compressed)", "KL(compressed‖reference)"), strict=True)),
    },
    "cause": {"": {"": "not looked for, or not yet"} | {cause: cause.meaning for cause in Cause}},
    "against": {
        "": {
            BASELINE: "what the engine computed when the set was taken",
            ENGINES: "the last replays of the other engines that serve the same path",
            TEXTS: "what the engine made of the texts, as clients send them, when the set was taken",
            SHORT: "what the engine computed of short sequences, every ten seconds, when their set was taken",
            WEIGHTS: "the first checksums of the weights of the same model, with equal parallelism and kernels",
            PREFIX: "what the engine decoded behind a prefix that is in its prefix cache, when their set was taken",
        }
    },
    "edge": {"": EDGES, names.OUTCOME_DIFFERENCE: {"mean": "the estimate", "low": "lower end", "high": "upper end"}},
    "division": {
        "": {
            "position": "by the position of the token in the output, from 0",
            "context": "by the number of tokens before it, of prompt and output",
            "phase": "by the phase of a reasoning model",
        }
    },
    "place": {
        "": {
            ", ".join(POSITIONS): "positions",
            ", ".join(CONTEXTS): "numbers of tokens",
            THINKING: "what the model writes before its answer, with the markers that enclose it",
            ANSWER: "what follows the thinking",
        }
    },
    "end": {
        "": {
            ENDED: "by the end marker",
            CUT: "it did not end: the length limit cut the output",
            STOPPED: "it did not end: the model ended the output inside its thinking",
            NONE: "there was no thinking",
        }
    },
    "figure": {
        "": {
            **{name: f"{text}; {KINDS[figures.FIGURES[name].kind]}" for name, text in HEADLINES.items()},
        },
        **dict.fromkeys(
            (names.EFFECTIVE_REQUESTS, names.VARIANCE_INFLATION_RATIO),
            'with `kind="all"` a headline figure; of a kind `kl_nats`, `gain` (in the test that is nearest to a '
            "promotion) and `spread` (of the baseline of the alarm's change test)",
        ),
    },
    "kind": {
        "": f"the kind of traffic: one of the `evidence.kinds` that are followed, `{REST_KIND}` for all others, "
        "`all` for all together",
        **dict.fromkeys(
            CONDITIONAL,
            f"the kind of traffic: one that is followed and that a grammar restricts; `{REST_GRAMMAR_KIND}` for all "
            "others that a grammar restricts",
        ),
        names.STRUCTURED_OUTPUTS: {
            "json": "a JSON answer was requested",
            "tool_call": "tools were offered, and called",
        },
        names.KIND_SAMPLED_TOKENS: (
            f"the kind of traffic: one of the `evidence.kinds` most frequent ones of sampled requests, scored or not; "
            f"`{REST_KIND}` for all others; `{UNREAD_KIND}` where the request's body was not read"
        ),
    },
    "form": {
        "": {
            "stored": "as it is stored and sent: int8",
            "engine": "as vLLM holds it: bfloat16, every layer at the largest rank",
            "quantized_layers": "the layers that it corrects, as the compressed checkpoint stores them",
        }
    },
    "label": {"": "the client's `X-Hemostat-Label`, if it is one of the configured `labels`; else empty"},
    "engine": {"": "address of the engine that requests go to, `host:port`; at most 64"},
    "limit": {
        "": {
            "connections": "16,384 connections of a relay process, or what the limit of open files allows",
            "connections_per_client": "`limits.connections_per_client`",
        },
        names.CLIENT_LIMITED_REQUESTS: {
            "rate": "`client_limits.requests_per_second` and `burst`",
            "concurrent": "`client_limits.concurrent`",
        },
    },
    "model": {
        "": "the served name",
        names.COVERED_MASS_RATIO: {name: f"the {name} model" for name in MODELS},
        names.NOISE_FLOOR_NATS: {name: f"the {name} model" for name in MODELS},
        names.NOISE_FLOOR_REQUESTS: {name: f"the {name} model" for name in MODELS},
    },
    "outcome": {
        names.CANARY_REPLAYS: {
            EQUAL: "of a model at an engine: not too far from anything",
            EXCEEDED: "too far; a statement only where the next one is, too",
            COULD_NOT_TELL: "the engine could not be asked, or no set is usable: `canaries` of the status says why",
        },
        names.REQUESTS: {
            ends.OK: "complete, status below 400",
            ends.CLIENT_ERROR: "complete, the upstream's status is 4xx",
            ends.SERVER_ERROR: "complete, the upstream's status is 5xx",
            ends.REFUSED: "an invalid request, refused by the proxy itself",
            ends.OVERLOADED: "answered with 503 and `Retry-After`, since a limit of the relay was reached",
            ends.UPSTREAM_FAILED: "the upstream could not be reached, broke off or sent an invalid answer; or Hemostat "
            "failed while it changed the answer, see `hook_error`",
            ends.CLIENT_GONE: "the client disconnected",
        },
        names.SHADOW_REQUESTS: {
            "shadowed": "captured; each capture later counts as one of the other outcomes, too",
            "scored": "both models have scored its tokens",
            "skipped": "cannot be scored",
            "dropped": "could have been scored, but there was no room, or something failed",
        },
        **dict.fromkeys(SAMPLED, SAMPLED_OUTCOMES),
        names.NOISE_FLOOR_REQUESTS: {
            "scored": "scored",
            "busy": "the queue was full",
            ELSE: "why it failed",
        },
        names.STRUCTURED_OUTPUTS: {
            "valid": "the answer parses",
            "invalid": "the answer does not parse",
            "cut": "the answer ended at the length limit",
        },
        names.ADAPTER_BUILDS: {
            BuildOutcome.PROPOSED: "the adapter is tested",
            BuildOutcome.NOT_ACCEPTED: "the adapter is not tested now",
            BuildFailure.ENDED: "the process was killed, or crashed, several times",
            BuildFailure.STALLED: "the process made no progress",
            BuildFailure.MEMORY: "the process took more than `adapter.memory_mib`",
            BuildFailure.DISK: "its private folder could not be written",
            BuildFailure.REFUSED: "no adapter can be made of these checkpoints or texts; the status says why",
            BuildFailure.INVALID: "the result is damaged, or is not about the checkpoints that serve",
        },
        names.ADAPTER_JUDGED: {
            JUDGED: "the exact distances were computed",
            JudgeDropReason.NOT_READY: "the copies are being loaded, or their process has ended",
            JudgeDropReason.BUSY: "too many requests wait",
            JudgeDropReason.ENDED: "the process of the copies ended while the request waited",
            JudgeDropReason.NO_HIDDEN_STATES: "the reference's hidden states are missing",
            JudgeDropReason.FAILED: "the copies could not compute them",
            JudgeDropReason.OTHER_REFERENCE: "the copies' reference gives the tokens other log-probabilities than the "
            "reference that scored them: see `reference.folder`",
            JudgeDropReason.TOO_LONG: "by how fast the copies have answered so far, the answer would take too long: "
            "`max_tokens` of the judge's status",
        },
        names.OUTCOME_DIFFERENCE: {
            **{outcome: outcome.meaning for outcome in Outcome},
            LENGTH: "the mean number of output tokens",
        },
    },
    "reason": {
        names.REPEATED_REQUESTS: {
            "refused": "the upstream's validation refused what was added; nothing was computed",
            "too_large": "the upstream refused the body as too large",
            "server_error": "a server error; the answer may have been generated, and is generated twice",
            "encoded": "the answer is compressed in a way that cannot be read, and is generated twice",
        },
        names.CALIBRATION_REQUESTS: CALIBRATION_REASONS,
        names.GATE_FAILURES: "why the candidate failed, as for `hemostat_noise_floor_requests_total`; behind `other_`: "
        "why the reference failed, or the engine that serves; `internal_error`: a bug, see the log",
        names.ENGINE_EVENTS: ENGINE_EVENTS,
        names.ENGINE_ANSWERS: {
            "received": "answers that reached the control process",
            "dropped": "answers that were not used in time, or that exceeded the control process's buffer",
            "dropped_at_engine": "answers that vLLM's API server could not record or send, or had no room for",
        },
        names.FEATURES_DROPPED: {
            "no_tap": "the engine reported nothing about the request",
            "not_sent": "the engine sent no features",
            "other_anchors": "the features are of other ids than requested",
            "shape": "the features do not match the tokens",
            "not_finite": "some features are not finite",
            "masked": "every row is masked",
        },
        **dict.fromkeys((names.SAMPLED_REQUESTS, names.SAMPLED_TOKENS), f"as of `{names.SHADOW_REQUESTS}`, below"),
        names.PROFILE_DECISIONS: {
            Reason.EVIDENCE: "held-out requests prove that it helps",
            Reason.HARM: "held-out requests prove that it harms",
            Reason.UNSUPPORTED: "its gain was not proven again within a window",
            Reason.OUTCOMES: "an outcome of answers became worse by more than the margin; the kind is held",
            Reason.SLOT: "an adapter that is better in most of its traffic takes its slot in the engine, or the "
            "engines were started with fewer slots than adapters serve",
            Reason.EVICTED: "another kind of traffic is more frequent and has replaced this one",
            Reason.LEARNED: "proposed by the calibrator",
            Reason.OPERATOR: "an operator's decision",
            Reason.OTHER_MODEL: "the served model has changed",
            Reason.LOST: "at a restart, the store does not hold the profile, or it cannot be read",
            Reason.SETTINGS: "at a restart, the settings have changed and do not allow it: the event says which",
            Reason.PROBE: "the engine does not apply it as a copy of the model does",
            Reason.NEWER: "a newer candidate takes its place",
            Reason.UNPROVEN: "not proven within the number of requests after which a candidate is replaced",
        },
        names.RESPONSES_FINISHED: (
            f"vLLM's finish_reason: {', '.join(f'`{name}`' for name in sorted(outcomes.FINISH_REASONS))}, else `other`"
        ),
    },
    "result": {
        names.ADAPTER_LOADS: {
            "loaded": "it is loaded; several engines behind one address take several attempts",
            "refused": "the upstream refused it; the status says why",
            "failed": "the upstream did not answer, or `adapter.folder` could not be written",
        },
        names.ADAPTER_PROBES: {
            PASSED: "the engine behaves as required",
            FAILED: "it does not: no request uses the adapter, or any adapter",
            ERROR: "the upstream did not answer, or with an error",
            WAITING: "the copy of the model did not answer",
        },
    },
    "part": {
        "": {
            FailedPart.CALIBRATION: "calibration could neither learn from a scored request nor judge by it",
            FailedPart.OUTCOME: "the outcome of a response could not be judged",
            FailedPart.TRACING: "a request could not be traced or logged",
        }
    },
    "probe": {
        "": {
            ISOLATION: "adapters do not affect requests without one in the same batch",
            AGREEMENT: "the engine's log-probabilities, with an adapter and without, are those of our copy",
        }
    },
    "reference": {"": "name of the reference model"},
    "route": {"": ROUTE_VALUES},
    "source": {"": "what the token was learned from: the reference's hidden state (`hidden…`) or only its list of ids"},
    "stage": {
        "": dict(
            zip(
                STAGES,
                (
                    "the compressed model's distribution",
                    "after the profile that served, or in `observe` would have served",
                ),
                strict=True,
            )
        ),
        names.DIVERGENCE: {
            "raw": "the compressed model's distribution",
            "excess": "raw minus what noise adds to it (half of how far each model is from itself), for KL and JS; "
            "present once both are known",
        },
    },
    "state": {
        "": {
            "wanted": "they serve, or are tested",
            "loaded": "the engine lists them; of several engines, the one that lists most",
            "ready": "the engine has them, and the probes have passed: requests use them; of several engines, the "
            "one with most",
        },
        names.GATE_STATE: {
            "none": "no candidate is compared",
            "running": "the candidate is compared, and there is no verdict yet",
            "pass": "the candidate may replace what serves",
            "fail": "the candidate may not replace what serves",
            "undecided": "the gate has ended without a verdict: the candidate or the models are others now",
        },
    },
    "question": {
        "": {
            STABLE_TOKENS: "on the tokens that were served: its distance from the reference, less the distance of the "
            "model that serves (`expect: same`: its distance from that model)",
            OWN_ANSWERS: "the same where each model answers by itself",
            BAD_ANSWERS: "the difference of the shares of answers that are empty, errors, or end in a repetition",
        }
    },
    "strategy": {
        "": f"the request's decoding: {', '.join(f'`{name}`' for name in STRATEGIES)}; cut is top-p, top-k, min-p"
    },
    "test": {
        "": {
            AlarmTest.BUDGET: "the divergence is larger than `alarm.budget_nats` allows",
            AlarmTest.CHANGE: "requests no longer match their kinds' baselines, the first `alarm.baseline_requests`",
        }
    },
    "tokens": {"": {"known": "by their ids, or by the response's usage", "unknown": "neither says how many"}},
    "version": {
        "": "digest of the profile; `identity` for none",
        names.ENGINE_PLUGINS: "the version of `hemostat-vllm`; `unknown` where a plugin does not say it, because it is "
        "older than 0.3",
    },
    "fits": {
        "": {
            "yes": "its major and minor version are those of this Hemostat",
            "no": "they are not, or the plugin does not say its version",
        }
    },
    "weighting": {"": {"token": "every token counts the same", "request": "every request counts the same"}},
}
"""By label, then by metric; the key "" is for all other metrics."""

HEAD = """# Metrics

Made by `make docs` from `middleware/hemostat/metrics/`. All metrics on `/metrics` of the admin port, for all processes
of one Hemostat. Divergences are in nats. Labels have a bounded number of values and never contain a user, a request id
or a prompt. Counters begin at 0 at a restart. A series without data yet is absent. What the figures mean:
[reading the figures](../reading-the-figures.md); what to do when an alert fires: [the runbook](../runbook.md).

Counters and histograms of several Hemostats can be summed; gauges (`hemostat_divergence` and others) belong to one.
"""


def page() -> str:
    parts = [HEAD]
    for title, metrics in GROUPS.items():
        parts.append(f"\n## {title}\n\n| metric | type | unit | labels | |\n|---|---|---|---|---|\n")
        parts += [row(metric) for metric in metrics]
    edges = ", ".join(f"{edge:g}" for edge in OVERHEAD_BUCKETS)
    parts.append(f"\nBuckets of `{names.PROXY_OVERHEAD_SECONDS}`: {edges} seconds. All histograms are classic ones.\n")
    parts.append("\n## Labels\n")
    for label, by_metric in LABELS.items():
        for metric, values in by_metric.items():
            of = f" of `{metric}`" if metric else ""
            parts.append(f"\n### {label}{of}\n\n")
            parts.append(f"{values}.\n" if isinstance(values, str) else table(values))
    for outcome, values in SHADOW_REASONS.items():
        parts.append(f"\n### reason of `{names.SHADOW_REQUESTS}`, {outcome}\n\n{table(values)}")
    return "".join(parts)


def row(metric: Metric) -> str:
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    text = metric.help.removesuffix(".").replace("||", "‖").replace("|", "\\|")
    return f"| `{metric.name}` | {metric.kind} | {metric.unit} | {labels} | {text} |\n"


def table(values: Values) -> str:
    rows = (f"| {', '.join(map(shown, name.split(', ')))} | {text} |\n" for name, text in values.items())
    return "| value | |\n|---|---|\n" + "".join(rows)


def shown(value: str) -> str:
    return "any other" if value == ELSE else f"`{value}`"


def meaning(metric: str, label: str) -> Values | str | None:
    """Returns the page's text about a label of this metric: a text for each of its values, one text for all of them,
    or None if the page says nothing."""
    if label == "reason" and metric in (names.SHADOW_REQUESTS, names.SAMPLED_REQUESTS, names.SAMPLED_TOKENS):
        return {reason: text for reasons in SHADOW_REASONS.values() for reason, text in reasons.items()}
    by_metric = LABELS[label]
    return by_metric.get(metric, by_metric.get(""))
