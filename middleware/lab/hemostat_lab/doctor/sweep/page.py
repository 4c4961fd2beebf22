"""The sweep's section of the HTML page: curves with bands and thresholds, the front of size against KL, tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hemostat.report.page import Plot, Section, Table
from hemostat_lab.doctor.sweep.plots import Mark, Scatter, curve_plot, scatter_plot
from hemostat_lab.doctor.sweep.terminal import (
    HEADS,
    THRESHOLD_HEADS,
    comparison,
    point_rows,
    summary,
    threshold_rows,
)

Row = Mapping[str, Any]


def sweep_section(report: Row) -> Section | None:
    if "sweep" not in report:
        return None
    sweep = report["sweep"]
    return Section(
        "sweep/section.html.jinja",
        {
            "summary": summary(report),
            "statements": _statements(sweep["statements"]),
            "thresholds": Table(
                "Where each curve leaves its noise floor and where it breaks", THRESHOLD_HEADS, threshold_rows(sweep)
            ),
            "curves": [*_curves(sweep), _front(sweep)],
            "points": Table("All points; * on the front of size and KL", HEADS, point_rows(sweep)),
        },
    )


def _statements(statements: Sequence[Row]) -> Table:
    rows = [
        [
            statement["statement"],
            statement["verdict"],
            "; ".join([statement["evidence"], *map(comparison, statement["comparisons"])]),
        ]
        for statement in statements
    ]
    return Table("The statements of arXiv 2503.23924, on this model", ("statement", "verdict", "evidence"), rows, 1)


def _curves(sweep: Row) -> Iterator[Plot]:
    floor = sweep["floor"]
    for curve in sweep["curves"]:
        rows = [row for row in curve["points"] if row["kl_rc"]["value"]]
        if not rows:
            continue
        marks = []
        if curve["leaves_floor"] is not None:
            marks.append(Mark("above the noise floor", curve["leaves_floor"], None))
        if curve["break"] is not None and "at" in curve["break"]:
            marks.append(Mark("break", curve["break"]["at"], tuple(curve["break"]["ci95"])))
        yield Plot(
            f"KL(r‖c) by {curve['unit']}: {curve['name']}",
            curve_plot(
                f"Sweep of {curve['name']}",
                [row["setting"] for row in rows],
                [(row["kl_rc"]["value"], row["kl_rc"]["low"], row["kl_rc"]["high"]) for row in rows],
                marks,
                floor,
                curve["unit"],
            ),
        )


def _front(sweep: Row) -> Plot:
    by_kind: dict[str, list[Row]] = {}
    names = {row["name"]: curve["name"] for curve in sweep["curves"] for row in curve["points"]}
    for row in sweep["table"]:
        if row["kl_rc"]["value"] and not row["decoding"] and row["name"] != "unchanged":
            by_kind.setdefault(names.get(row["name"], "other"), []).append(row)
    kinds = [
        Scatter(name, [(100.0 * row["bytes_share"], row["kl_rc"]["value"], row["name"]) for row in rows])
        for name, rows in by_kind.items()
    ]
    front = [
        (100.0 * row["bytes_share"], row["kl_rc"]["value"])
        for name in sweep["front"]
        for row in sweep["table"]
        if row["name"] == name and row["kl_rc"]["value"]
    ]
    title = "Size against KL(r‖c), with the front"
    return Plot(title, scatter_plot(title, kinds, front, "size of the linear layers, % of 16 bits"))
