"""The sweep's section of the HTML page: its plots as SVG, and tables.

The plots are curves on a logarithmic scale, with bands and thresholds, and the front of size against KL.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from hemostat.report import svg
from hemostat.report.page import Plot, Section, Table
from hemostat_lab.doctor.sweep.terminal import (
    HEADS,
    THRESHOLD_HEADS,
    comparison,
    point_rows,
    summary,
    threshold_rows,
)

SHAPES = ((0, 1.0), (4, 1.0), (3, 1.0), (5, 1.0), (4, 0.35), (5, 0.4), (3, 0.3), (8, 0.5))
"""(corners, radius between the corners): a circle, polygons and stars, as many as there are kinds of points."""
LABEL_GAP = 30.0
Y_NAME = "KL(r‖c), nats per token (log scale)"


@dataclass(frozen=True, slots=True)
class Mark:
    """A threshold at a setting; interval: its ends, None where it has none."""

    name: str
    at: float
    interval: tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class Scatter:
    """Points of one kind: (x, y above 0, name)."""

    name: str
    points: Sequence[tuple[float, float, str]]


def curve_plot(
    title: str,
    x: Sequence[float],
    y: Sequence[tuple[float, float | None, float | None]],
    marks: Sequence[Mark],
    floor: float | None,
    x_name: str,
) -> str:
    """y: (value, low, high), all above 0 or None. Settings that fall (bits) run from the largest to the least."""
    values = [value for value, _, _ in y]
    least = min([*values, *([floor] if floor else [])])
    lows = [max(low, 0.3 * least) if low is not None else value for value, low, _ in y]
    highs = [high if high is not None else value for value, _, high in y]
    parts, to_y = _log_grid([*values, *lows, *highs, *([floor] if floor else [])])
    ends = (max(x), min(x)) if x[0] > x[-1] else (min(x), max(x))
    to_x = _scale(ends[0], ends[1], svg.LEFT + 24, svg.WIDTH - svg.RIGHT - 24)
    bottom = svg.HEIGHT - svg.BOTTOM
    labelled = -math.inf
    for at in x:
        if to_x(at) - labelled >= LABEL_GAP:
            labelled = to_x(at)
            parts.append(svg.text(labelled, bottom + 16, f"{at:g}", "middle"))
    for mark in marks:
        if mark.interval is not None:
            left, right = sorted(to_x(end) for end in mark.interval)
            parts.append(
                f'<rect class="band s1" x="{left:.1f}" y="{svg.TOP}" width="{max(right - left, 1.0):.1f}" '
                f'height="{bottom - svg.TOP}"/>'
            )
        kind = "line s1" if mark.interval is not None else "line s2"
        parts.append(svg.line(to_x(mark.at), svg.TOP, to_x(mark.at), bottom, kind))
    if floor:
        parts.append(svg.line(svg.LEFT, to_y(floor), svg.WIDTH - svg.RIGHT, to_y(floor), "line s3"))
    places = [to_x(at) for at in x]
    parts.append(svg.band(places, [to_y(low) for low in lows], [to_y(high) for high in highs], 0))
    parts.append(svg.polyline(places, [to_y(value) for value in values], 0))
    legend = [("line s0", "KL(r‖c), band: 95 % by request"), *(_legend(mark) for mark in marks)]
    legend += [("line s3", "noise floor")] if floor else []
    for n, (kind, name) in enumerate(legend):
        at = svg.HEIGHT + 18 * n + 4
        parts.append(svg.line(svg.LEFT, at, svg.LEFT + 36, at, kind))
        parts.append(svg.text(svg.LEFT + 44, at + 4, name, "start"))
    parts += svg.axis_names(x_name, Y_NAME)
    thresholds = "".join(f" {mark.name} at {mark.at:.3g}." for mark in marks)
    description = f"KL by {x_name}: from {values[0]:.3g} at {x[0]:g} to {values[-1]:.3g} at {x[-1]:g}.{thresholds}"
    return svg.plot(title, description, parts, svg.HEIGHT + 18 * len(legend))


def _legend(mark: Mark) -> tuple[str, str]:
    if mark.interval is None:
        return "line s2", mark.name
    return "line s1", f"{mark.name}, with its 95 % interval"


def scatter_plot(title: str, kinds: Sequence[Scatter], front: Sequence[tuple[float, float]], x_name: str) -> str:
    """Kinds differ by shape as well as by colour; `front` is a line. Every point has its name as a tooltip."""
    every = [point for kind in kinds for point in kind.points]
    parts, to_y = _log_grid([y for _, y, _ in every] or [1.0])
    highest = max([100.0, *(x for x, _, _ in every)])
    to_x = _scale(0.0, highest, svg.LEFT, svg.WIDTH - svg.RIGHT)
    bottom = svg.HEIGHT - svg.BOTTOM
    parts += [svg.text(to_x(at), bottom + 16, f"{at}", "middle") for at in range(0, int(highest) + 1, 20)]
    if front:
        parts.append(svg.polyline([to_x(a) for a, _ in front], [to_y(b) for _, b in front], 0))
    for n, kind in enumerate(kinds):
        for x, y, name in kind.points:
            parts.append(_shape(n, to_x(x), to_y(y), f"{name}: {x:.1f} %, {y:.3g} nats"))
        at = svg.HEIGHT + 18 * n + 4
        parts.append(_shape(n, svg.LEFT + 18, at, kind.name))
        parts.append(svg.text(svg.LEFT + 44, at + 4, kind.name, "start"))
    parts += svg.axis_names(x_name, Y_NAME)
    description = f"{len(every)} points of {len(kinds)} kinds; {len(front)} of them on the front."
    return svg.plot(title, description, parts, svg.HEIGHT + 18 * len(kinds))


def _shape(kind: int, x: float, y: float, tooltip: str) -> str:
    """Kinds have different shapes, so that colour is not needed."""
    corners, inner = SHAPES[kind % len(SHAPES)]
    title = f"<title>{escape(tooltip)}</title>"
    if not corners:
        return f'<circle class="point s{kind % 4}" cx="{x:.1f}" cy="{y:.1f}" r="4">{title}</circle>'
    radii = [5.5, 5.5 * inner] * corners if inner < 1.0 else [5.0] * corners
    turn = [2.0 * math.pi * n / len(radii) - math.pi / 2.0 for n in range(len(radii))]
    ends = [(x + r * math.cos(a), y + r * math.sin(a)) for a, r in zip(turn, radii, strict=True)]
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in ends)
    return f'<polygon class="point s{kind % 4}" points="{points}">{title}</polygon>'


def _log_grid(values: Sequence[float]) -> tuple[list[str], Callable[[float], float]]:
    """Lines and labels at powers of ten around the values, and the function from a value to its coordinate."""
    low = math.floor(math.log10(max(min(values), 1e-12)) + 1e-9)
    high = max(math.ceil(math.log10(max(values)) - 1e-9), low + 1)
    to_y = _scale(float(low), float(high), svg.HEIGHT - svg.BOTTOM, svg.TOP)
    parts = []
    for power in range(low, high + 1):
        parts.append(svg.line(svg.LEFT, to_y(power), svg.WIDTH - svg.RIGHT, to_y(power), "grid"))
        parts.append(svg.text(svg.LEFT - 8, to_y(power) + 4, f"{10.0**power:g}", "end"))
    return parts, lambda value: to_y(math.log10(max(value, 10.0**low)))


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (end - start) * (value - low) / ((high - low) or 1.0)


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
