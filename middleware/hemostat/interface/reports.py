"""The figures of a comparison of two models, for programs and notebooks."""

from __future__ import annotations

import asyncio
import html
import math
from collections.abc import Coroutine, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hemostat.config.packages import require
from hemostat.scoring.offline import summary
from hemostat_calibration.errors import HemostatError

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    from matplotlib.axes import Axes

    from hemostat.scoring.spool.objects import ObjectPath

T = TypeVar("T")
ALL = "all"
"""The name of the group of all requests."""


@dataclass(frozen=True, slots=True)
class ReportRow:
    """One figure of one group of requests. low, high: its interval of 95 %; NaN while it is not known."""

    group: str
    figure: str
    mean: float
    low: float
    high: float
    bound: str
    """It says if the mean is exact, an estimate, or a lower or an upper bound; "" for a figure that is never a
    bound."""
    requests: int
    tokens: int


class Report:
    """The figures of a comparison. `report["kl_nats"]` is the row of one figure over all requests.

    document: all that is known, JSON-ready, as `hemostat report --json` writes it.

    >>> import numpy as np, hemostat
    >>> reference = np.log([[0.5, 0.4, 0.1], [0.6, 0.3, 0.1]])
    >>> report = hemostat.compare(reference, reference)
    >>> report
    compared 1 request, 2 tokens: KL(reference‖compressed) 0 nats per token
    >>> [row.figure for row in report.rows()][:3]
    ['kl_nats', 'reverse_kl_nats', 'js_nats']
    >>> report.to_arrow().column_names
    ['group', 'figure', 'mean', 'low', 'high', 'bound', 'requests', 'tokens']
    """

    def __init__(self, document: Mapping[str, Any]) -> None:
        self.document = dict(document)

    @classmethod
    def read(cls, folder: str | Path | ObjectPath, *, key: str = "plain", cycle_hours: float = 24.0) -> Report:
        """Returns the report of a folder that `hemostat score` has written. The arguments are the options of `hemostat
        report`. Raises HemostatError, which says what to change."""
        require("spool")
        from hemostat.scoring.offline.evidence import read_evidence  # noqa: PLC0415  an extra
        from hemostat.scoring.spool.keys import read_key  # noqa: PLC0415
        from hemostat.scoring.spool.objects import location  # noqa: PLC0415

        return cls(wait(read_evidence(location(folder), read_key(key), cycle_hours)))

    def rows(self) -> Iterator[ReportRow]:
        """Yields the figures of all requests, and then the figures of each kind of traffic, which has fewer."""
        yield from _rows(ALL, self.document["raw"])
        for kind in self.document["by_kind"]:
            yield from _rows(kind["kind"] or "unknown", kind["raw"])

    def __getitem__(self, figure: str) -> ReportRow:
        for row in self.rows():
            if row.figure == figure:
                return row
        raise KeyError(f"{figure}: the figures are {', '.join(summary.FIGURES)}")

    def to_arrow(self) -> pa.Table:
        """Returns the rows as a table of pyarrow."""
        require("spool")
        import pyarrow as pa  # noqa: PLC0415  an extra

        return pa.Table.from_pylist([asdict(row) for row in self.rows()])

    def to_pandas(self) -> pd.DataFrame:
        """Returns the rows as a data frame of pandas, which has to be installed."""
        _need("pandas")
        import pandas as pd  # noqa: PLC0415  no dependency

        return pd.DataFrame([asdict(row) for row in self.rows()])

    def plot(self, figure: str = "kl_nats", ax: Axes | None = None) -> Axes:
        """Draws one figure of each group with its interval, by matplotlib, which has to be installed. Returns the axes.
        ax: where to draw; None: in a new picture."""
        rows = [row for row in self.rows() if row.figure == figure]
        if not rows:
            raise KeyError(f"{figure}: the figures are {', '.join(summary.FIGURES)}")
        _need("matplotlib")
        from matplotlib import pyplot  # noqa: PLC0415  no dependency

        if ax is None:
            _, ax = pyplot.subplots()
        places = range(len(rows))
        errors = [[max(row.mean - row.low, 0.0) for row in rows], [max(row.high - row.mean, 0.0) for row in rows]]
        ax.errorbar([row.mean for row in rows], places, xerr=errors, fmt="o", capsize=3)
        ax.set_yticks(places, [row.group for row in rows])
        ax.invert_yaxis()
        ax.set_xlabel(summary.FIGURES[figure])
        return ax

    def __repr__(self) -> str:
        requests, tokens = self.document["scored"], self.document["tokens"]
        what = f"compared {requests} request{'' if requests == 1 else 's'}, {tokens} tokens"
        return f"{what}: KL(reference‖compressed) {summary.rows(self.document['raw'])[0][1]} nats per token"

    def _repr_html_(self) -> str:
        """Returns the tables for a notebook."""
        figures = summary.rows(self.document["raw"])
        parts = [f"<p>{html.escape(repr(self))}</p>", _table(("figure", "mean", "95 % interval", "bound"), figures)]
        if self.document["by_kind"]:
            heads = ("kind of traffic", "requests", "tokens", "KL, nats")
            parts.append(_table(heads, summary.kinds(self.document)))
        return "".join(parts)


def _rows(group: str, raw: Mapping[str, Any]) -> Iterator[ReportRow]:
    for name in summary.FIGURES:
        if name not in raw:  # a kind has only some of them
            continue
        mean, (low, high), bound = summary.figure(raw, name)
        known, begins, ends = (math.nan if value is None else value for value in (mean, low, high))
        yield ReportRow(group, name, known, begins, ends, bound, raw["requests"], raw["tokens"])


def _table(heads: tuple[str, ...], rows: list[tuple[str, str, str, str]]) -> str:
    head = "".join(f"<th>{html.escape(text)}</th>" for text in heads)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _need(package: str) -> None:
    """Raises HemostatError if a package is not installed that is no dependency of Hemostat."""
    import importlib.util  # noqa: PLC0415

    if importlib.util.find_spec(package) is None:
        raise HemostatError(f"{package} is not installed; install it, for example with pip")


def wait(work: Coroutine[Any, Any, T]) -> T:
    """Returns the result of a coroutine, also in a notebook, whose own event loop runs."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()
