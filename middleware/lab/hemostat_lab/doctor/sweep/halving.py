"""Successive halving: which points are measured on more texts (Jamieson and Talwalkar, arXiv 1502.07943).

All points are measured on a few texts; then at most half of them on as many more, and so on, so that each rung costs
about the same. Their procedure looks for the best arm; here the points go on on which a decision depends, the most
pressing first: a statement that is undecided, a threshold (the settings around it), the front of bytes against KL.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from hemostat_calibration.thresholds.breaks import Existence
from hemostat_calibration.thresholds.statements import Verdict
from hemostat_lab.doctor.sweep.analysis import RUNGS, Statement, Threshold, near_front
from hemostat_lab.doctor.sweep.points import PLAIN, UNCHANGED, Point
from hemostat_lab.doctor.sweep.results import Results

FIRST_TEXTS = 8


def rungs(texts: int) -> list[tuple[int, int]]:
    """The texts of each rung: as many as all rungs before have, from `FIRST_TEXTS` on, as far as there are texts.

    >>> rungs(60)
    [(0, 8), (8, 16), (16, 32)]
    """
    ends = [FIRST_TEXTS * 2**n for n in range(RUNGS)]
    result = [(begin, min(end, texts)) for begin, end in zip([0, *ends], ends, strict=False) if begin < texts]
    return result


def promoted(
    results: Results,
    points: Sequence[Point],
    thresholds: Sequence[Threshold],
    statements: Sequence[Statement],
    shares: Mapping[Point, float],
) -> list[Point]:
    """The points of the next rung, at most half of `points`, in their order; the unchanged model is always one."""
    wanted = [UNCHANGED]
    for statement in statements:
        if statement.verdict is Verdict.UNDECIDED:
            wanted += [point for pair in statement.comparisons for point in (pair.better, pair.worse)]
    for threshold in thresholds:
        wanted += points_near(threshold)
    wanted += near_front(results, [point for point in points if point.drawing == PLAIN and point != UNCHANGED], shares)
    wanted += [point for point in points if point.drawing != PLAIN]
    chosen = [point for point in dict.fromkeys(wanted) if point in points][: max(len(points) // 2, 2)]
    return [point for point in points if point in chosen]


def points_near(threshold: Threshold) -> list[Point]:
    """The settings that decide where the line leaves its floor and where it breaks; all where it is undecided."""
    if threshold.found is None:
        return list(threshold.points)
    if threshold.found.existence is Existence.UNDECIDED:
        return list(threshold.points)
    near: set[int] = set()
    if threshold.leaves_floor is not None:
        near |= {threshold.leaves_floor - 1, threshold.leaves_floor}
    if threshold.found.existence is Existence.FOUND:
        settings = dict(zip(threshold.line.points, threshold.line.settings, strict=True))
        measured = [settings[point] for point in threshold.points]
        first = int(np.searchsorted(measured, threshold.found.low))
        last = int(np.searchsorted(measured, threshold.found.high))
        near |= set(range(first - 1, last + 1))
    return [point for n, point in enumerate(threshold.points) if n in near]
