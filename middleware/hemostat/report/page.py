"""The HTML page of a report (Jinja2, extra `report`), and the parts that it consists of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PAGE = "page.html.jinja"


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
    """A part of the page. template: a file of the command's package. values: what it shows."""

    template: str
    values: Mapping[str, Any]


def render(package: str, title: str, version: str, sections: Sequence[Section]) -> str:
    """Returns the whole document. package: where the templates of the sections are."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined  # noqa: PLC0415  an extra

    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package, ""), PackageLoader("hemostat.report", "")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(PAGE).render(
        title=title,
        version=version,
        sections=[environment.get_template(section.template).render(section.values) for section in sections],
    )
