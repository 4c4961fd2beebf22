"""The report of scored rows: lines for a terminal, and a page."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from hemostat.report.formats import format_cell
from hemostat.report.page import Section, Table, render
from hemostat.scored_record import MAX_WEIGHT

MARKER = b"<title>hemostat report"
FIGURES = {
    "kl_nats": "KL(reference‖compressed), nats per token",
    "reverse_kl_nats": "KL(compressed‖reference), nats per token",
    "js_nats": "Jensen–Shannon divergence, nats per token",
    "total_variation": "total variation",
    "top1_agreement": "same most likely token",
    "covered_mass": "probability that the lists cover",
}
MAX_KINDS = 20


def figure(raw: Mapping[str, Any], name: str) -> tuple[float | None, Sequence[float | None], str]:
    """Returns the mean of a figure, its interval, and its kind (exact, or a bound)."""
    value = raw[name]
    if isinstance(value, dict):
        interval: Sequence[float | None] = value["ci95_seen"] if "ci95_seen" in value else value["ci95"]
        return value["estimate"], interval, str(value["bound"])
    return value, raw["ci95"][name], ""


def rows(raw: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Returns the figures of a group as cells: name, mean, interval, kind."""
    result = []
    for name, text in FIGURES.items():
        value, (low, high), kind = figure(raw, name)
        interval = "" if low is None and high is None else f"[{format_cell(low)}, {format_cell(high)}]"
        result.append((text, format_cell(value), interval, kind))
    return result


def kinds(report: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Returns the kinds with most requests as cells: name, requests, tokens, KL."""
    return [
        (
            kind["kind"] or "unknown",
            str(kind["requests"]),
            str(kind["tokens"]),
            format_cell(figure(kind["raw"], "kl_nats")[0]),
        )
        for kind in report["by_kind"][:MAX_KINDS]
    ]


def notes(report: Mapping[str, Any]) -> list[str]:
    """Returns what a reader has to know of the rows, each as a sentence."""
    result = [f"{count} captures were not scored: {reason}." for reason, count in report["not_scored"].items()]
    if report["segments_left_out"]:
        result.append(
            f"{report['segments_left_out']} of {report['segments']} segments cannot be read and were left out; the log "
            "names them."
        )
    if report["admitted_below_1"]:
        result.append(
            f"{report['admitted_below_1']} captures were admitted with a probability below 1, as the spool was more "
            f"than half full. Each counts in means as 1/probability captures, at most {MAX_WEIGHT:.0f}."
        )
    if report["raw"]["requests"] and figure(report["raw"], "kl_nats")[1][0] is None:
        result.append("There are too few requests for intervals.")
    return result


def headline(report: Mapping[str, Any]) -> str:
    """Returns the report's first line."""
    when = ""
    if report["period"] is not None:
        began, ended = (time.strftime("%Y-%m-%d %H:%M", time.gmtime(report["period"][end])) for end in ("from", "to"))
        when = f", {began} to {ended} UTC"
    reference = report["reference"] or {"model": "no reference"}
    return (
        f"{report['model'] or 'no model'} compared with {reference['model']}{when}: "
        f"{report['scored']} of {report['captures']} captures scored, {report['tokens']} tokens"
    )


def lines(report: Mapping[str, Any]) -> list[str]:
    """Returns the report for a terminal."""
    result = [headline(report), ""]
    result += [
        f"  {name:<44}{mean:>12}  {interval:<24}{kind}".rstrip() for name, mean, interval, kind in rows(report["raw"])
    ]
    if report["by_kind"]:
        result += ["", f"  {'kind of traffic':<44}{'requests':>10}{'tokens':>12}{'KL':>12}"]
        result += [f"  {name:<44}{requests:>10}{tokens:>12}{kl:>12}" for name, requests, tokens, kl in kinds(report)]
    return [*result, *([""] if notes(report) else []), *notes(report)]


def page(report: Mapping[str, Any], version: str) -> str:
    """Returns the report as an HTML page."""
    tables = [
        Table("Figures", ("figure", "mean", "95 % interval", "bound"), rows(report["raw"])),
        Table("Kinds of traffic", ("kind", "requests", "tokens", "KL, nats"), kinds(report)),
    ]
    values = {"headline": headline(report), "tables": tables, "notes": notes(report)}
    return render("hemostat.scoring.offline", "hemostat report", version, [Section("offline.html.jinja", values)])
