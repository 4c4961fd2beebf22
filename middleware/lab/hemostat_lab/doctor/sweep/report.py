"""The sweep as JSON values. KL in nats per token; sizes as a share of the linear layers' 16 bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hemostat_calibration.thresholds.breaks import Existence
from hemostat_lab.doctor.pair import json_number
from hemostat_lab.doctor.sweep.analysis import Statement, Threshold, describe_break, pareto_front
from hemostat_lab.doctor.sweep.points import UNCHANGED, Point
from hemostat_lab.doctor.sweep.results import Results, figures, kl_rc, outcomes

ENOUGH_BASE = 0.5
"""Share of the tasks that the reference has to do, for their loss to mean something."""


def sweep_report(
    results: Results,
    points: Sequence[Point],
    thresholds: Sequence[Threshold],
    statements: Sequence[Statement],
    shares: Mapping[Point, float],
    given: tuple[str, Results] | None,
) -> dict[str, Any]:
    """points: those that were measured."""
    # Only what changes the weights or the layers has a size of its own.
    sized = [point for point in points if point.drawing.name == "" and point != UNCHANGED]
    front = pareto_front(results, sized, shares)
    result = {
        "table": [_row(results, point, point.name, shares[point], point in front) for point in points],
        "curves": [_curve(results, threshold, shares) for threshold in thresholds],
        "statements": [_statement(statement) for statement in statements],
        "front": [point.name for point in front],
        "floor": results.mean_floor(),
        "base_too_low": _weak_bases(outcomes(list(results.outcomes[UNCHANGED].values()))),
    }
    if given is not None:
        result["given"] = _row(given[1], UNCHANGED, given[0], None, False)
    return result


def _row(results: Results, point: Point, name: str, share: float | None, on_front: bool) -> dict[str, Any]:
    return {
        "name": name,
        "bytes_share": share,
        "on_front": on_front,
        "decoding": point.drawing.name,
        **figures(list(results.texts[point].values())),
        "outcomes": outcomes(list(results.outcomes.get(point, {}).values())),
    }


def _weak_bases(base: Mapping[str, Any]) -> list[str]:
    """Outcomes that the reference itself mostly fails."""
    return [name for name, outcome in base.items() if outcome["value"] is not None and outcome["value"] < ENOUGH_BASE]


def _curve(results: Results, threshold: Threshold, shares: Mapping[Point, float]) -> dict[str, Any]:
    shown = dict(zip(threshold.line.points, threshold.line.shown, strict=True))
    rows = []
    for point in threshold.points:
        interval = kl_rc(list(results.texts[point].values()))
        rows.append({"name": point.name, "setting": shown[point], "bytes_share": shares[point], "kl_rc": interval})
    return {
        "name": threshold.line.name,
        "unit": threshold.line.unit,
        "points": rows,
        "leaves_floor": None if threshold.leaves_floor is None else shown[threshold.points[threshold.leaves_floor]],
        "doubles": None if threshold.doubles is None else shown[threshold.points[threshold.doubles]],
        "below": None if not threshold.leaves_floor else shown[threshold.points[threshold.leaves_floor - 1]],
        "break": _break(threshold),
    }


def _break(threshold: Threshold) -> dict[str, Any] | None:
    if threshold.found is None:
        return None
    result: dict[str, Any] = {"existence": threshold.found.existence.value, "text": describe_break(threshold)}
    if threshold.found.existence is Existence.FOUND:
        at, low, high = (
            threshold.shown(value) for value in (threshold.found.at, threshold.found.low, threshold.found.high)
        )
        result |= {"at": at, "ci95": sorted((low, high))}
    return result


def _statement(statement: Statement) -> dict[str, Any]:
    return {
        "statement": statement.text,
        "verdict": statement.verdict.value,
        "evidence": statement.evidence,
        "comparisons": [
            {
                "better": pair.better.name,
                "worse": pair.worse.name,
                "difference": json_number(pair.found.value),
                "ci95": [json_number(pair.found.low), json_number(pair.found.high)],
            }
            for pair in statement.comparisons
        ],
    }
