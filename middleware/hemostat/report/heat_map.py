"""A heat map as SVG text, with the rules of `svg`: one hue in steps of opacity, a legend, a tooltip for each cell."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from hemostat.report import svg

Cell = tuple[str, str]
"""(row, column)"""

HALVINGS = 6
"""Levels below the largest value, each down to half of the one before; the last has all that is smaller."""
CELL_HEIGHT = 26
LEGEND_HEIGHT = 40
LABEL_WIDTH = 160
TEXT_OPACITY = 0.3
"""The opacity of the strongest cell that has text: text on it has a contrast of at least 4.5 to 1."""


def heat_map(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Mapping[Cell, float],
    x_name: str,
    unit: str,
    tooltips: Mapping[Cell, str],
    texts: Mapping[Cell, str] | None = None,
) -> str:
    """A cell for each value; where there is none the cell is empty. The scale halves from level to level: it begins at
    the largest value. Negative values count as 0. texts: shown inside of the cells."""
    height = len(rows) * CELL_HEIGHT + svg.TOP + svg.BOTTOM + LEGEND_HEIGHT
    width = (svg.WIDTH - LABEL_WIDTH - svg.RIGHT) / len(columns)
    highest = max((value for value in values.values() if math.isfinite(value)), default=0.0)
    strongest = TEXT_OPACITY if texts else 1.0
    parts = []
    for i, row in enumerate(rows):
        y = svg.TOP + i * CELL_HEIGHT
        parts.append(svg.text(LABEL_WIDTH - 8, y + CELL_HEIGHT / 2 + 4, row, "end"))
        for j, column in enumerate(columns):
            cell = row, column
            if cell not in values:
                continue
            x = LABEL_WIDTH + j * width
            opacity = strongest * _strength(values[cell], highest)
            parts.append(
                f'<rect class="heat" x="{x:.1f}" y="{y:.1f}" width="{max(width - 1, 0.5):.1f}" '
                f'height="{CELL_HEIGHT - 1}" fill-opacity="{opacity:.2f}">'
                f"<title>{escape(tooltips[cell])}</title></rect>"
            )
            if texts and cell in texts:
                parts.append(svg.text(x + width / 2, y + CELL_HEIGHT / 2 + 4, texts[cell], "middle"))
    bottom = svg.TOP + len(rows) * CELL_HEIGHT
    every = svg.label_step(columns, width)
    parts += [
        svg.text(LABEL_WIDTH + (j + 0.5) * width, bottom + 16, columns[j], "middle")
        for j in range(0, len(columns), every)
    ]
    parts.append(svg.text((LABEL_WIDTH + svg.WIDTH) / 2, bottom + 34, x_name, "middle"))
    if not texts:
        parts += _legend(highest, unit, bottom + svg.BOTTOM)
    return svg.plot(title, _describe(values, unit), parts, height)


def _strength(value: float, highest: float) -> float:
    """1 for the highest half of the range, less for each halving."""
    if not value > 0.0 or highest <= 0.0:
        return 0.05
    level = min(math.floor(math.log2(highest / value)) if math.isfinite(value) else 0, HALVINGS - 1)
    return 1.0 - level / HALVINGS


def _legend(highest: float, unit: str, y: float) -> list[str]:
    parts = []
    width = (svg.WIDTH - LABEL_WIDTH - svg.RIGHT) / HALVINGS
    for level in range(HALVINGS):
        x = LABEL_WIDTH + level * width
        opacity = 1.0 - level / HALVINGS
        parts.append(f'<rect class="heat" x="{x:.1f}" y="{y}" width="14" height="14" fill-opacity="{opacity:.2f}"/>')
        least = f"from {highest / 2 ** (level + 1):.2g}" if level < HALVINGS - 1 else "less"
        parts.append(svg.text(x + 18, y + 12, least, "start"))
    parts.append(svg.text(LABEL_WIDTH - 8, y + 12, unit, "end"))
    return parts


def _describe(values: Mapping[Cell, float], unit: str) -> str:
    if not values:
        return "no values"
    most = sorted(values, key=lambda cell: -values[cell])[:3]
    return f"{len(values)} cells, {unit}; the highest: " + ", ".join(
        f"{row}, {column}: {values[row, column]:.3g}" for row, column in most
    )
