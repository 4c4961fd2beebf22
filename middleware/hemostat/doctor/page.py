"""What the HTML page of the report is made of. A section is a template below this package with its values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Table:
    """The first cell of a row is its heading; the last `text_columns` cells are text that may wrap."""

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 0


@dataclass(frozen=True, slots=True)
class Card:
    """One figure in large type."""

    title: str
    value: str
    note: str


@dataclass(frozen=True, slots=True)
class Plot:
    """`svg` is markup; texts in it are escaped."""

    caption: str
    svg: str


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page. template: a file below `hemostat.doctor`. values: what it shows."""

    template: str
    values: Mapping[str, Any]
