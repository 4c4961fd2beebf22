"""The demo's result as a page: what compression cost, what was recovered, where it is lost, and what to do next."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hemostat import __version__
from hemostat.report import svg
from hemostat.report.page import Card, Plot, Section, Table, render
from hemostat_lab.demo import view
from hemostat_lab.demo.checkpoints import Checkpoints
from hemostat_lab.demo.options import PAGE_TITLE
from hemostat_lab.demo.token_classes import ClassLoss

WORSE = 1.25
"""A part of the traffic is named as one that loses most if its KL is this many times the mean of all tokens."""
MIN_TOKENS_NAMED = 500
"""The number of tokens below which a part of the traffic is not named as one that loses most."""
MIN_TOKENS_PLOTTED = 100
"""The number of tokens below which a part of the traffic has no bar: a few answers would look like the worst part."""

Json = Mapping[str, Any]


def page(scene: view.Scene, checkpoints: Checkpoints, classes: Sequence[ClassLoss]) -> str:
    """Returns the page as a document. classes: the loss by class of token; none if it is not known."""
    status = scene.status
    values = {
        "traffic": f"{scene.traffic.ok:,} of {scene.traffic.sent:,} requests were answered; "
        f"{status['tokens_scored']:,} tokens were scored by the reference.",
        "cost": list(_cost_cards(status)),
        "recovered": list(_recovered_lines(scene)),
        "arms": _arms_table(status),
        "plots_shown": list(_plots(status, classes)),
        "where": list(_where_tables(status, classes)),
        "next": list(_next_steps(scene, checkpoints)),
    }
    return render("hemostat_lab.demo", PAGE_TITLE, __version__, [Section("result.html.jinja", values)])


def _cost_cards(status: Json) -> Iterator[Card]:
    raw = status["raw"]
    kl = raw["kl_nats"]
    yield Card("KL, nats per token, at least", view.number(kl["estimate"]), _interval(kl))
    variation = view.figure_of(raw, "total_variation")
    one_in = f"; about one token in {1.0 / variation['estimate']:.1f} differs" if variation["estimate"] else ""
    yield Card("Total variation", view.number(variation["estimate"]), f"{_interval(variation)}{one_in}")
    top1 = view.figure_of(raw, "top1_agreement")
    yield Card("Same most likely token", view.percent(top1["estimate"]), view.share(top1).partition(" % ")[2])
    half_life = status.get("trajectory", {}).get("sampled", {}).get("half_life_tokens")
    if half_life is not None:
        title = "Tokens until half of the sampled texts have parted"
        yield Card(title, view.number(half_life["estimate"], 1), _interval(half_life))


def _interval(figure: Json) -> str:
    """Returns the interval alone, such as `[0.397, 0.428]`."""
    return view.interval(figure).partition(" ")[2]


def _recovered_lines(scene: view.Scene) -> Iterator[str]:
    recovered = scene.status.get("recovered") or {}
    if recovered.get("ratio") is not None:
        ratio, gained = view.share({**recovered, "estimate": recovered["ratio"]}), view.interval(recovered["gain_nats"])
        yield f"On the same tokens of held-out requests the profile removes {ratio} of the KL: {gained} nats."
    for line in (view.promotion_line(scene), view.arms_line(scene.status)):
        if line:
            yield f"{line[0].upper()}{line[1:]}."
    decided = [view.decision_line(event) for event in reversed(scene.decisions)]
    yield from (f"Decision: {line}." for line in decided)
    if scene.first_promotion is None:
        yield "No profile was promoted in this run, so every request was decoded unchanged."
        if background := scene.status.get("background"):
            yield f"At the end of the run: {background}."


def _arms_table(status: Json) -> Table | None:
    """Returns the comparison of the arms; None before the first treated request."""
    arms = status.get("arms", {})
    if "treated" not in arms or "control" not in arms:
        return None
    rows = []
    for name, key, show in (
        ("KL, nats, estimate with the tail", "kl_nats_estimate", view.interval),
        ("total variation", "total_variation", view.interval),
        ("same most likely token", "top1_agreement", view.share),
    ):
        figures = [view.figure_of(arms[arm], key) for arm in ("control", "treated")]
        rows.append((name, *map(show, figures), show(arms["treated_minus_control"].get(key))))
    requests = [f"{arm}, {arms[arm]['requests']:,} requests" for arm in ("control", "treated")]
    caption = "What clients received, by arm: each request is assigned at random; 95 % intervals in brackets"
    return Table(caption, ("", *requests, "treated minus control"), rows)


# --- where it is lost -------------------------------------------------------------------------------------------------


def _where_tables(status: Json, classes: Sequence[ClassLoss]) -> Iterator[Table]:
    places, summaries = status.get("places", {}), _summaries(status)
    kinds = [(kind["kind"], kind["raw"]) for kind in status.get("kinds", [])]
    rows = [(*row, summaries.get(row[0], "")) for row in _rows(kinds)]
    heads = ("requests", "tokens", "KL, nats, at least", "share of the loss")
    yield Table("By kind of traffic", ("kind", *heads, "what serves it, or is missing"), rows, 1)
    for caption, first, found in (
        ("By position in the answer", "tokens before it", "position"),
        ("By length of the context", "tokens before it", "context"),
    ):
        by_place = list(_rows([(row["place"], row) for row in places.get(found, [])]))
        if len(by_place) > 1:
            yield Table(caption, (first, *heads), by_place)
    total = sum(each.kl_nats for each in classes)
    by_class = [
        (each.name, f"{each.tokens:,}", view.number(each.kl_nats / each.tokens), view.percent(each.kl_nats / total))
        for each in classes
        if total
    ]
    if by_class:
        yield Table(
            "By class of the token, without requests that a profile has changed", ("class", *heads[1:]), by_class
        )


def _summaries(status: Json) -> dict[str, str]:
    return {kind["kind"]: kind["summary"] for kind in status.get("calibration", {}).get("kinds", [])}


def _rows(parts: Sequence[tuple[str, Json]]) -> Iterator[tuple[str, ...]]:
    """Yields a row for each part of the traffic that was scored."""
    known = [(name, figures) for name, figures in parts if figures["tokens"] and figures["kl_nats"]["estimate"]]
    total = sum(figures["tokens"] * figures["kl_nats"]["estimate"] for _, figures in known)
    for name, figures in known:
        lost = figures["tokens"] * figures["kl_nats"]["estimate"] / total
        kl = view.interval(figures["kl_nats"])
        yield name or "unknown", f"{figures['requests']:,}", f"{figures['tokens']:,}", kl, view.percent(lost)


def _plots(status: Json, classes: Sequence[ClassLoss]) -> Iterator[Plot]:
    kinds = [
        (kind["kind"], kind["raw"]["kl_nats"]["estimate"])
        for kind in status.get("kinds", [])
        if kind["raw"]["tokens"] >= MIN_TOKENS_PLOTTED
    ]
    positions = status.get("places", {}).get("position", [])
    by_class = [(each.name, each.kl_nats / each.tokens) for each in classes if each.tokens >= MIN_TOKENS_PLOTTED]
    for title, bars in (
        ("KL by kind of traffic", kinds),
        ("KL by position in the answer", [(row["place"], row["kl_nats"]["estimate"]) for row in positions]),
        ("KL by class of the token", by_class),
    ):
        shown = [(label, value) for label, value in bars if value is not None]
        if shown:
            labels, values = [label for label, _ in shown], [value for _, value in shown]
            chart = svg.horizontal_bar_chart(title, labels, values, [None] * len(values), "nats per token, at least")
            yield Plot(title, chart)


# --- what to do next --------------------------------------------------------------------------------------------------


def _next_steps(scene: view.Scene, checkpoints: Checkpoints) -> Iterator[str]:
    status = scene.status
    version = status["profile"]["version"]
    if version != "identity":
        yield (
            f"Profile {version[:8]} is proven here. In front of your own model set adapter.enabled: true and "
            "calibration.mode: auto, and start vLLM with --enable-lora (docs/calibration.md#adapters). Keep "
            "evidence.cycle_hours at its default there: a profile is then promoted only after two cycles of the "
            "traffic, such as days. It is 0 in this demo."
        )
    else:
        yield (
            "Nothing is proven yet: let the demo run longer (leave out --requests). It ends "
            f"{view.REQUESTS_AFTER_PROMOTION} to {view.MOST_AFTER_PROMOTION} requests after a promotion."
        )
    if worst := _worst_kind(status):
        yield worst
    yield (
        f"See which layers and modules lose most, and what it would cost to restore them: hemostat doctor "
        f"{checkpoints.reference} {checkpoints.compressed} --html doctor.html (docs/doctor.md)."
    )
    yield (
        "Compare other ways to compress the model with equal bytes before you repair this one: hemostat compress "
        "(docs/compress.md)."
    )
    yield (
        "Set alarm.budget_nats to the KL that your application accepts, so that an alarm says when compression costs "
        "more (docs/operations.md)."
    )


def _worst_kind(status: Json) -> str:
    """Returns a sentence on the kind of traffic that loses clearly more than the mean; "" if there is none."""
    mean = status["raw"]["kl_nats"]["estimate"]
    known = [kind["raw"] | {"kind": kind["kind"]} for kind in status.get("kinds", [])]
    many = [raw for raw in known if raw["tokens"] >= MIN_TOKENS_NAMED and raw["kl_nats"]["estimate"] is not None]
    worst = max(many, key=lambda raw: raw["kl_nats"]["estimate"], default=None)
    if worst is None or not mean or worst["kl_nats"]["estimate"] < WORSE * mean:
        return ""
    kl = view.interval(worst["kl_nats"])
    return (
        f"{worst['kind']} loses most: {kl} nats per token, against {view.number(mean)} in all traffic. Look at its "
        "answers first, and send it to a model of more bits if it matters most."
    )
