"""What the report's figures say about causes, as sentences with their evidence. Pure.

A sentence is written for the largest cause of a topic. Where the interval of its figure includes 0, it says so. ± is
95 % by request (Student's t), without a correction for the choice of the largest (`NOTE`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hemostat_calibration.statistics.streaming import student_975
from hemostat_calibration.thresholds.curve import student_quantile

NOTE = (
    "± is 95 %, by request. Each sentence names the largest of several causes: chosen as the largest on these texts, "
    "its figure is likely to be somewhat smaller on others. Whether one stands out is judged by an interval that holds "
    "for all of them together."
)
MIN_GROUP_REQUESTS = 5
"""Tokens of fewer requests are no group: a standard error by request says nothing about them."""
MIN_SHARE = 0.1
"""Of the error in 1 % of the channels, from which on channels are called dominant."""
MIN_CHANNEL_RATIO = 20.0
"""Of a channel's magnitude to the median, from which on it is called an outlier."""
MIN_SINK_RATIO = 10.0
"""Of the first position's norm to the median, from which on it is called a sink."""
NOISE_MULTIPLE = 3.0
"""Costs below so many times the noise floor are not distinguished from rounding."""

Row = Mapping[str, Any]
Finding = dict[str, Any]

_GROUPS = (
    ("position", "by_position", "Tokens at the positions {} of the text"),
    ("token class", "by_class", "Tokens of the class “{}”"),
    ("entropy", "by_entropy", "Tokens at which the compressed model's entropy is {} nats"),
    ("prompt", "by_form", "Texts of the kind “{}”"),
    ("prompt", "by_prompt_length", "Texts after prompts of {}"),
)


def findings(report: Row) -> list[Finding]:
    """topic, text, value, half_width (95 %, by request), unit, tokens, requests; in the order of the report."""
    result = [*_groups(report)]
    layers, outliers, routing = report["layers"], report["outliers"], report["routing"]
    if "skipped" not in layers:
        result += [*_layers(layers), *_modules(layers)]
    if "skipped" not in outliers:
        result += [*_weights(outliers), *_activations(outliers), *_sinks(outliers)]
    if "skipped" not in routing and routing["layers"]:
        result += [*_routing(routing)]
    return result


def _finding(
    topic: str, text: str, value: float, error: float | None, unit: str, tokens: int, requests: int
) -> Finding:
    return {
        "topic": topic,
        "text": text,
        "value": value,
        "half_width": half_width(error, requests),
        "unit": unit,
        "tokens": tokens,
        "requests": requests,
    }


def half_width(error: float | None, requests: int) -> float | None:
    """Of a 95 % interval, from the standard error over so many requests; None without one."""
    return None if error is None or requests < 2 else student_975(requests - 1) * error


def plus_minus(value: float, error: float | None, requests: int, digits: int = 4) -> str:
    """`0.1234 ± 0.0056`, 95 % from the standard error over so many requests; without one the value alone."""
    half = half_width(error, requests)
    return f"{value:.{digits}f}" if half is None else f"{value:.{digits}f} ± {half:.{digits}f}"


def clear(value: float, error: float | None, requests: int, chosen_of: int = 1) -> bool:
    """The 95 % interval does not include 0. chosen_of: the value is the largest of so many, among which the 5 % are
    shared out (Bonferroni)."""
    if error is None or requests < 2:
        return False
    return abs(value) > student_quantile(0.05 / chosen_of, requests - 1) * error


def _groups(report: Row) -> Iterator[Finding]:
    for topic, key, subject in _GROUPS:
        rows = [
            row
            for row in report.get(key, ())
            if row["excess"]["value"] is not None and row["requests"] >= MIN_GROUP_REQUESTS
        ]
        if not rows:
            continue
        known = [
            row
            for row in rows
            if clear(row["excess"]["value"], row["excess"]["se_by_request"], row["requests"], chosen_of=len(rows))
        ]
        above = [row for row in known if row["excess"]["value"] > 0]
        if not above:
            most = max(rows, key=lambda row: row["excess"]["value"])
            excess = most["excess"]
            text = (
                f"{subject.format(most['name'])} differ most from the others in mean KLD, by "
                f"{plus_minus(excess['value'], excess['se_by_request'], most['requests'])} nats: not clearly."
            )
        else:
            # The group that adds most to the total beyond its share of the tokens.
            most = max(above, key=lambda row: row["excess"]["value"] * row["tokens"])
            excess = most["excess"]
            more = plus_minus(excess["value"], excess["se_by_request"], most["requests"])
            text = (
                f"{subject.format(most['name'])} have a mean KLD of {most['kld']['value']:.4f} nats"
                f"{_of(most['kld'])}, {more} more than the others; "
                f"they are {most['tokens']} of {report['tokens']} tokens and hold "
                f"{100 * (most['share_of_kld'] or 0):.0f} % of the KLD."
            )
        yield _finding(topic, text, excess["value"], excess["se_by_request"], "nats", most["tokens"], most["requests"])


def _of(row: Row) -> str:
    return "" if row["of"] == "exact" else f" ({row['of']})"


def _layers(layers: Row) -> Iterator[Finding]:
    tokens, requests, base = layers["tokens"], layers["requests"], layers["mean_kld"]
    known = [row for row in layers["restored"] if row["won_nats"] is not None and row["alone_nats"] is not None]
    single = [row for row in known if row["kind"] == "layer"]
    size = {"unit": "nats", "tokens": tokens, "requests": requests}
    if single and base:
        best = max(single, key=lambda row: row["won_nats"])
        won, error = best["won_nats"], best["won_se_by_request"]
        stands_out = clear(won, error, requests, chosen_of=len(single))
        unclear = "" if stands_out else " The largest of so many may be chance: no single layer stands out."
        text = (
            f"Restore one: with {best['name']} restored and all else compressed, the mean KLD of {base:.4f} nats falls "
            f"by {plus_minus(won, error, requests)} ({100 * won / base:.0f} %), the most of {len(single)} layers."
            f"{unclear}"
        )
        yield _finding("layer", text, won, error, **size)
        worst = max(single, key=lambda row: row["alone_nats"])
        cost, error = worst["alone_nats"], worst["alone_se_by_request"]
        text = (
            f"Restore all but one: with {worst['name']} compressed and all else restored, the mean KLD is "
            f"{plus_minus(cost, error, requests)} nats, the most of {len(single)} layers.{_noise(cost, layers)}"
        )
        yield _finding("layer", text, cost, error, **size)
    if layers["additivity"] is not None and layers["additivity"]["excess"] is not None and base:
        yield _additivity(layers["additivity"], base, size)
    kinds = [row for row in known if row["kind"] == "kind"]
    if kinds:
        best = max(kinds, key=lambda row: row["won_nats"])
        text = (
            f"Of the kinds of module, restoring {best['name']} takes away most: "
            f"{plus_minus(best['won_nats'], best['won_se_by_request'], requests)} nats."
        )
        yield _finding("kind of module", text, best["won_nats"], best["won_se_by_request"], **size)


def _routing(routing: Row) -> Iterator[Finding]:
    rows, tokens, requests, base = routing["layers"], routing["tokens"], routing["requests"], routing["mean_kld"]
    won, error = routing["won_nats"], routing["won_se_by_request"]
    least = min(rows, key=lambda row: row["same"])
    text = (
        f"Routing: layer {least['layer']} of those with experts chooses the same {least['per_token']} of "
        f"{least['experts']} experts at {100 * least['same']:.1f} % of {least['positions']} positions, the fewest of "
        f"{len(rows)} layers."
    )
    if won is not None and base is not None:
        unclear = "" if clear(won, error, requests) else ": not clearly"
        text += (
            f" With the reference's choices in all layers, the mean KLD of {base:.4f} nats falls by "
            f"{plus_minus(won, error, requests)}{unclear}."
        )
        yield _finding("routing", text, won, error, "nats", tokens, requests)
    unreached = sum(row["unreached"]["reference"]["experts"] for row in rows)
    if unreached:
        text = (
            f"No token of these texts reached {unreached} of {sum(row['experts'] for row in rows)} experts in the "
            "reference: nothing here is about them, and a method that measures inputs knows nothing of theirs."
        )
        yield _finding("routing", text, float(unreached), None, "experts", tokens, requests)


def _additivity(row: Row, base: float, size: dict[str, Any]) -> Finding:
    excess, error = row["excess"], row["excess_se_by_request"]
    requests = size["requests"]
    total = plus_minus(row["sum_alone"], row["sum_alone_se_by_request"], requests)
    parts = (
        f"Compressed one at a time, the {row['parts']} parts cost {total} nats together; compressed all at once "
        f"{base:.4f}. "
    )
    if not clear(excess, error, requests):
        text = f"{parts}The effects add up: the difference of {plus_minus(excess, error, requests)} includes 0."
    elif excess > 0:
        text = f"{parts}The errors amplify each other: {plus_minus(excess, error, requests)} nats arise only together."
    else:
        text = f"{parts}The errors cancel in part: {plus_minus(-excess, error, requests)} nats less than their sum."
    return _finding("additivity", text, excess, error, **size)


def _noise(cost: float, layers: Row) -> str:
    floor = layers["noise_floor"]
    if floor is None or cost >= NOISE_MULTIPLE * floor:
        return ""
    return f" That is not distinguished from rounding: the noise floor is {floor:.4f} nats."


def _modules(layers: Row) -> Iterator[Finding]:
    modules = layers["modules"]
    rows = [row for row in modules["rows"] if row["alone_nats"] is not None]
    total = sum(row["alone_nats"] for row in rows)
    if len(rows) < 2 or total <= 0:
        return
    size = {"unit": "nats", "tokens": modules["tokens"], "requests": modules["requests"]}
    worst = max(rows, key=lambda row: row["alone_nats"])
    cost, error = worst["alone_nats"], worst["alone_se_by_request"]
    text = (
        f"Of {len(rows)} linear layers compressed alone, layer {worst['layer']} {worst['module']} costs most: "
        f"{plus_minus(cost, error, modules['requests'])} nats, {100 * cost / total:.0f} % of their sum."
        f"{_noise(cost, layers)}"
    )
    yield _finding("module", text, cost, error, **size)


def _weights(outliers: Row) -> Iterator[Finding]:
    rows = [row for row in outliers["modules"] if row.get("inputs_share") is not None]
    if not rows:
        return
    ways = [(row[f"{side}s_share"], row, f"{side} channels", row[side]) for row in rows for side in ("input", "output")]
    share, row, side, channel = max(ways, key=lambda way: way[0])
    if share >= MIN_SHARE:
        text = (
            f"Outliers of weights: in layer {row['layer']} {row['module']} 1 % of the {side} hold {100 * share:.0f} % "
            f"of the error (weighted by the activations), the most of {len(rows)} linear layers; the largest is "
            f"{channel}."
        )
    else:
        text = (
            f"No channel's error dominates: 1 % of the channels hold at most {100 * share:.0f} % of a linear layer's "
            f"error (layer {row['layer']} {row['module']}, {side})."
        )
    yield _finding("outliers of weights", text, share, None, "share", outliers["positions"], outliers["requests"])


def _activations(outliers: Row) -> Iterator[Finding]:
    rows = [row for row in outliers["modules"] if row.get("channel_ratio") is not None]
    if not rows:
        return
    evidence = outliers["positions"], outliers["requests"]
    most = max(rows, key=lambda row: row["channel_ratio"])
    ratio = most["channel_ratio"]
    count = sum(row["channel_ratio"] >= MIN_CHANNEL_RATIO for row in rows)
    place = f"layer {most['layer']} {most['module']}, channel {most['channel']}"
    if count:
        text = (
            f"Outliers of activations: {count} of {len(rows)} linear layers read a channel of at least "
            f"{MIN_CHANNEL_RATIO:g} times the median magnitude; the largest is {ratio:.0f} times it ({place})."
        )
    else:
        text = f"No channel of activations stands far out: the largest is {ratio:.1f} times the median ({place})."
    yield _finding("outliers of activations", text, ratio, None, "ratio", *evidence)
    worst = max(rows, key=lambda row: row["crest"])
    crest = plus_minus(worst["crest"], worst["crest_se_by_request"], outliers["requests"], 1)
    text = (
        f"A token's largest input is {crest} times its root mean square in layer {worst['layer']} "
        f"{worst['module']}, the most of all: 8-bit rounding by token (W8A8) has "
        f"there an error of {100 * worst['int8_error']:.1f} % of the inputs."
    )
    yield _finding("outliers of activations", text, worst["crest"], worst["crest_se_by_request"], "ratio", *evidence)


def _sinks(outliers: Row) -> Iterator[Finding]:
    rows: Sequence[Row] = [row for row in outliers["sinks"] if row["first_norm_ratio"] is not None]
    if not rows:
        return
    evidence = outliers["positions"], outliers["requests"]
    most = max(rows, key=lambda row: row["first_norm_ratio"])
    ratio, error = most["first_norm_ratio"], most["first_norm_ratio_se_by_request"]
    attended = [row for row in rows if row["first_attention"] is not None]
    attention = ""
    if attended:
        top = max(attended, key=lambda row: row["first_attention"])
        share = plus_minus(
            100 * top["first_attention"], _scaled(top["first_attention_se_by_request"]), outliers["requests"], 0
        )
        attention = f" Layer {top['layer']} gives it {share} % of the attention, the most of all."
    times = plus_minus(ratio, error, outliers["requests"], 0 if ratio >= MIN_SINK_RATIO else 1)
    if ratio >= MIN_SINK_RATIO:
        text = (
            f"The first position is an attention sink: after layer {most['layer']} its hidden state is "
            f"{times} times as large as the median of the others.{attention}"
        )
    else:
        text = (
            f"No attention sink by size: the first position's hidden state is at most {times} "
            f"times the median of the others (after layer {most['layer']}).{attention}"
        )
    yield _finding("attention sink", text, ratio, error, "ratio", *evidence)


def _scaled(error: float | None) -> float | None:
    return None if error is None else 100 * error
