"""Our dashboards as data, and what Grafana makes of their queries."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import promql_parser
from tests.support.prometheus import ROOT

FOLDER = ROOT / "helm" / "hemostat" / "dashboards"
FILES = sorted(FOLDER.glob("*.json"))
ALL = {"namespace": ".*", "model": ".*", "route": ".*"}
"""What the variables stand for when a dashboard is opened: their `allValue`."""
EMPTY_LIVE = {
    "Evidence that an engine is an outlier (B)": "there is one engine",
    "Excess of the candidate in the live gate (A)": "no candidate is compared",
    "KL by phase, last 30 minutes (A)": "the model does not think",
    "Thinking that does not end, by arm, last 30 minutes (A)": "the model does not think",
    "Tokens of thinking per answer, by arm, last 30 minutes (A)": "the model does not think",
}
"""Queries (`Query.where`) whose metrics the live run exports, but without numbers, and why."""

_VARIABLE = re.compile(r"\$(\w+)|\$\{(\w+)[^}]*\}")
_LABEL_VALUES = re.compile(r"label_values\((.*), (\w+)\)")


@dataclass(frozen=True, slots=True)
class Query:
    """One expression of a dashboard. legend: labels that its legend shows."""

    dashboard: str
    where: str
    expression: str
    legend: frozenset[str]

    def __str__(self) -> str:
        return f"{self.dashboard}: {self.where}"

    def with_values(self, values: Mapping[str, str]) -> str:
        """As Grafana sends it."""
        return _VARIABLE.sub(lambda match: values[match[1] or match[2]], self.expression)


def load() -> dict[str, dict[str, Any]]:
    """By the file's name."""
    return {path.stem: json.loads(path.read_text()) for path in FILES}


def panels(dashboard: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Those that show something; no rows."""
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def queries() -> list[Query]:
    """Of all panels, variables and annotations."""
    return [query for name, dashboard in load().items() for query in _of(name, dashboard)]


def about_adapters(query: Query) -> bool:
    """It reads what is exported only where adapters are made or serve."""
    metrics = (selected.metric for selected in used(query.with_values(ALL)))
    return any(re.match(r"hemostat_(adapter|profile_kind_total_variation)", metric) for metric in metrics)


def _of(name: str, dashboard: Mapping[str, Any]) -> Iterator[Query]:
    for panel in panels(dashboard):
        for target in panel["targets"]:
            legend = frozenset(re.findall(r"\{\{(\w+)\}\}", target.get("legendFormat", "")))
            yield Query(name, f"{panel['title']} ({target['refId']})", target["expr"], legend)
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            match = _LABEL_VALUES.fullmatch(variable["query"]["query"])
            assert match, variable["query"]["query"]
            yield Query(name, f"variable {variable['name']}", match[1], frozenset({match[2]}))
    for annotation in dashboard["annotations"]["list"]:
        yield Query(name, f"annotation {annotation['name']}", annotation["target"]["expr"], frozenset())


@dataclass(frozen=True, slots=True)
class Used:
    """A metric and the labels that an expression matches, groups or joins it by."""

    metric: str
    labels: frozenset[str]


def used(expression: str, wanted: frozenset[str] = frozenset()) -> list[Used]:
    """What an expression reads; of its result, the labels `wanted`.

    ValueError where it does not parse or its types do not fit: promql-parser checks both.
    """
    result: list[Used] = []
    _visit(promql_parser.parse(expression), wanted, result)
    return result


def _visit(node: Any, wanted: frozenset[str], uses: list[Used]) -> None:
    """wanted: labels that what stands above this node needs from it."""
    match node:
        case promql_parser.VectorSelector():
            matched = {matcher.name for matcher in node.matchers.matchers}
            uses.append(Used(str(node.name), wanted | matched))
        case promql_parser.MatrixSelector():
            _visit(node.vector_selector, wanted, uses)
        case promql_parser.AggregateExpr():
            grouped = node.modifier.labels if node.modifier is not None else []
            # What is above sees the grouped labels alone: it may want no others.
            _visit(node.expr, frozenset(grouped), uses)
            without = node.modifier is not None and node.modifier.type == promql_parser.AggModifierType.Without
            assert without or wanted <= set(grouped), f"{sorted(wanted)} are gone after {node}"
        case promql_parser.BinaryExpr():
            matching = node.modifier.matching if node.modifier is not None else None
            on = frozenset(matching.labels) if matching is not None else frozenset()
            # A scalar or vector(…) has no labels.
            _visit(node.lhs, wanted | on, uses)
            _visit(node.rhs, on, uses)
        case promql_parser.Call():
            inner = wanted | {"le"} if node.func.name == "histogram_quantile" else wanted
            for argument in node.args:
                _visit(argument, frozenset(inner), uses)
        case promql_parser.ParenExpr() | promql_parser.UnaryExpr() | promql_parser.SubqueryExpr():
            _visit(node.expr, wanted, uses)
        case promql_parser.NumberLiteral() | promql_parser.StringLiteral():
            pass
        case _:
            raise TypeError(f"{type(node)}: not known here")
