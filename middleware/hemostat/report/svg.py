"""Plots as SVG text: no script, no network. Colours and fonts come from the page's style sheet, by class.

Every plot has a title and a description for screen readers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 280
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 16, 48
ROW_HEIGHT = 26
"""The height of a horizontal bar with its gap."""
LABEL_WIDTH = 150
"""The width of the labels next to horizontal bars."""
CHARACTER_WIDTH = 6.6
"""Approximate width of a character of a label."""


@dataclass(frozen=True, slots=True)
class Series:
    """A line: y at x, with a band from `low` to `high` where given."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


def bar_chart(
    title: str, labels: Sequence[str], values: Sequence[float], errors: Sequence[float | None], x_name: str, y_name: str
) -> str:
    """A vertical bar for each label, with ± its error; bars of negative values point down."""
    ends = [abs(e or 0.0) for e in errors]
    low = min(0.0, *(v - e for v, e in zip(values, ends, strict=True)))
    high = max(0.0, *(v + e for v, e in zip(values, ends, strict=True)))
    ticks, y = _axis(low, high, HEIGHT - BOTTOM, TOP)
    step = (WIDTH - LEFT - RIGHT) / len(values)
    parts = list(_y_grid(ticks, y))
    every = label_step(labels, step)
    for n, (label, value, error) in enumerate(zip(labels, values, errors, strict=True)):
        middle = LEFT + (n + 0.5) * step
        top, bottom = sorted((y(value), y(0.0)))
        parts.append(_rectangle(middle - 0.38 * step, top, 0.76 * step, bottom - top, f"{label}: {value:.4g}"))
        if error:
            parts.append(_whisker(middle, y(value - error), y(value + error)))
        if n % every == 0:
            parts.append(text(middle, HEIGHT - BOTTOM + 16, label, "middle"))
    parts += axis_names(x_name, y_name)
    return plot(title, _describe(labels, values, y_name), parts, HEIGHT)


def horizontal_bar_chart(
    title: str, labels: Sequence[str], values: Sequence[float], errors: Sequence[float | None], x_name: str
) -> str:
    """Horizontal bars, for long labels."""
    height = ROW_HEIGHT * len(values) + TOP + BOTTOM
    ends = [abs(e or 0.0) for e in errors]
    low = min(0.0, *(v - e for v, e in zip(values, ends, strict=True)))
    high = max(0.0, *(v + e for v, e in zip(values, ends, strict=True)))
    ticks, x = _axis(low, high, LABEL_WIDTH, WIDTH - RIGHT)
    parts = []
    for tick in ticks:
        parts.append(line(x(tick), TOP, x(tick), height - BOTTOM, "grid"))
        parts.append(text(x(tick), height - BOTTOM + 16, _number(tick), "middle"))
    for n, (label, value, error) in enumerate(zip(labels, values, errors, strict=True)):
        middle = TOP + (n + 0.5) * ROW_HEIGHT
        left, right = sorted((x(value), x(0.0)))
        parts.append(
            _rectangle(left, middle - 0.36 * ROW_HEIGHT, right - left, 0.72 * ROW_HEIGHT, f"{label}: {value:.4g}")
        )
        if error:
            parts.append(line(x(value - error), middle, x(value + error), middle, "whisker"))
        parts.append(text(LABEL_WIDTH - 8, middle + 4, label, "end"))
    parts.append(text((LABEL_WIDTH + WIDTH) / 2, height - 10, x_name, "middle"))
    return plot(title, _describe(labels, values, x_name), parts, height)


def line_chart(title: str, series: Sequence[Series], x_name: str, y_name: str, y_top: float | None = None) -> str:
    """Lines that differ by dashes as well as by colour."""
    height = HEIGHT + 18 * len(series)
    high = y_top if y_top is not None else max(v for curve in series for v in (*curve.y, *curve.high))
    ticks, y = _axis(0.0, high, HEIGHT - BOTTOM, TOP)
    x_ticks, x = _axis(0.0, max(v for curve in series for v in curve.x), LEFT, WIDTH - RIGHT, ends_at_high=True)
    parts = list(_y_grid(ticks, y))
    parts += [text(x(tick), HEIGHT - BOTTOM + 16, _number(tick), "middle") for tick in x_ticks]
    for n, curve in enumerate(series):
        if len(curve.low):
            parts.append(band([x(a) for a in curve.x], [y(b) for b in curve.low], [y(b) for b in curve.high], n))
        parts.append(polyline([x(a) for a in curve.x], [y(b) for b in curve.y], n))
        at = HEIGHT + 18 * n + 4
        parts.append(polyline([LEFT, LEFT + 36], [at, at], n))
        parts.append(text(LEFT + 44, at + 4, curve.name, "start"))
    parts += axis_names(x_name, y_name)
    ranges = "; ".join(f"{curve.name}: from {curve.y[0]:.3g} to {curve.y[-1]:.3g}" for curve in series)
    return plot(title, f"{y_name} by {x_name}. {ranges}.", parts, height)


def _axis(
    low: float, high: float, start: float, end: float, ends_at_high: bool = False
) -> tuple[list[float], Callable[[float], float]]:
    """Ticks at round values that include `low` and `high`, and the function from a value to its coordinate.

    ends_at_high: the axis ends at `high`, not at a tick.
    """
    span = (high - low) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(m for m in (1, 2, 5, 10) if span / (m * step) <= 6)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) if high > low else 1
    if ends_at_high:
        last = math.floor(high / step + 1e-9)
    ticks = [n * step for n in range(first, last + 1)]
    bottom, top = first * step, (low + span if ends_at_high else last * step)
    return ticks, lambda value: start + (end - start) * (value - bottom) / (top - bottom)


def _y_grid(ticks: Sequence[float], y: Callable[[float], float]) -> Iterator[str]:
    for tick in ticks:
        yield line(LEFT, y(tick), WIDTH - RIGHT, y(tick), "grid")
        yield text(LEFT - 8, y(tick) + 4, _number(tick), "end")


def axis_names(x_name: str, y_name: str) -> Iterator[str]:
    yield text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, x_name, "middle")
    middle = (TOP + HEIGHT - BOTTOM) / 2
    yield f'<text transform="translate(14 {middle:.0f}) rotate(-90)" text-anchor="middle">{escape(y_name)}</text>'


def _number(value: float) -> str:
    return f"{value:.6g}".replace("-", "−")


def _describe(labels: Sequence[str], values: Sequence[float], name: str) -> str:
    if len(values) > 12:
        most = max(range(len(values)), key=lambda n: values[n])
        return f"{name}: {len(values)} bars, the highest {values[most]:.3g} at {labels[most]}."
    return f"{name}: " + ", ".join(f"{label} {v:.3g}" for label, v in zip(labels, values, strict=True)) + "."


def plot(title: str, description: str, parts: Sequence[str], height: float) -> str:
    name = re.sub(r"[^a-z]+", "-", title.lower())
    return (
        f'<svg role="img" viewBox="0 0 {WIDTH} {height:.0f}" aria-labelledby="{name}-t {name}-d">'
        f'<title id="{name}-t">{escape(title)}</title><desc id="{name}-d">{escape(description)}</desc>'
        + "".join(parts)
        + "</svg>"
    )


def text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def polyline(x: Sequence[float], y: Sequence[float], series: int) -> str:
    """A line through points at coordinates x, y, in the style of the series of that number."""
    return f'<polyline class="line s{series % 4}" points="{_points(x, y)}"/>'


def band(x: Sequence[float], low: Sequence[float], high: Sequence[float], series: int) -> str:
    """The area between two lines of coordinates."""
    points = _points([*x, *reversed(x)], [*high, *reversed(low)])
    return f'<polygon class="band s{series % 4}" points="{points}"/>'


def _points(x: Sequence[float], y: Sequence[float]) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))


def label_step(labels: Sequence[str], width: float) -> int:
    """Returns n such that every nth label has room next to the other ones, at distances of `width`."""
    return max(1, math.ceil(max(map(len, labels)) * CHARACTER_WIDTH * 1.2 / width))


def _whisker(x: float, y1: float, y2: float) -> str:
    return line(x, y1, x, y2, "whisker")


def _rectangle(x: float, y: float, width: float, height: float, tooltip: str) -> str:
    return (
        f'<rect class="bar" x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.5):.1f}" height="{max(height, 0.5):.1f}">'
        f"<title>{escape(tooltip)}</title></rect>"
    )
