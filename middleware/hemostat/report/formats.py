"""The formats of figures in the terminal and on the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

UNKNOWN = "–"


def format_value(value: float | None, unit: str = "nats") -> str:
    if value is None:
        return UNKNOWN
    return f"{value:.3f} %" if unit == "%" else f"{value:.6f}"


def format_errors(row: Mapping[str, Any]) -> str:
    """`± 0.0123 (0.0045)`: standard error by request (by token); empty for a figure that has none."""
    by_request, by_token = row["se_by_request"], row["se_by_token"]
    if by_request is None and by_token is None:
        return ""
    form = "{:.3f}" if row["unit"] == "%" else "{:.6f}"
    errors = [UNKNOWN if value is None else form.format(value) for value in (by_request, by_token)]
    return f"± {errors[0]} ({errors[1]})"


def format_interval(value: float | None, ends: Sequence[float | None], beyond: str) -> str:
    """`1.8 [1.5, 2.2]`; `beyond` replaces a value outside the range of the data."""
    low, high = (beyond if end is None else f"{end:.1f}" for end in ends)
    return f"{beyond if value is None else f'{value:.1f}'} [{low}, {high}]"


def format_percent(value: float | None, scale: float = 100.0) -> str:
    return UNKNOWN if value is None else f"{scale * value:.1f} %"


def format_cell(value: Any) -> str:
    if value is None:
        return UNKNOWN
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def duration(seconds: float) -> str:
    """Returns a time that is about so long.

    >>> duration(40.0), duration(250.0), duration(9000.0)
    ('40 s', '4 min', '2.5 hours')
    """
    if seconds < 90.0:
        return f"{seconds:.0f} s"
    return f"{seconds / 60.0:.0f} min" if seconds < 5400.0 else f"{seconds / 3600.0:.1f} hours"
