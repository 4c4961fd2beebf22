"""Thresholds, the paper's statements and the Pareto front, from what has been measured, and what is measured next.

The statements are the ones in the tables of arXiv 2503.23924 ("Model Hemorrhage and the Robustness Limits of Large
Language Models"), which are of larger models.

Successive halving (Jamieson and Talwalkar, arXiv 1502.07943): all points are measured on a few texts; then at most half
of them on as many more, and so on, so that each rung costs about the same. Their procedure looks for the best arm; here
the points go on on which a decision depends, the most pressing first: a statement that is undecided, a threshold (the
settings around it), the front of bytes against KL.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from hemostat_calibration.thresholds.breaks import Break, Existence, find_break
from hemostat_calibration.thresholds.curve import Curve, leaves_floor
from hemostat_calibration.thresholds.statements import (
    Difference,
    Verdict,
    always_better,
    breaks_within,
    difference,
)
from hemostat_lab.doctor.pair import Floats
from hemostat_lab.doctor.sweep.points import (
    FULL_BITS,
    PLAIN,
    QUANTIZATION,
    SEMI_STRUCTURED,
    STRUCTURED,
    UNCHANGED,
    UNSTRUCTURED_PRUNING,
    Line,
    Point,
)
from hemostat_lab.doctor.sweep.results import Results, kl_interval

RESAMPLES = 1000
MIN_BREAK_POINTS = 3
"""Settings of a curve besides the unchanged model."""
MIN_RELATIVE_BYTES = 0.9
"""Two points have equal size where the one that is said to be better has at most the other's bytes and at least this
part of them."""
RUNGS = 3
"""Of successive halving; a statement is looked at after each."""
COLLAPSED = 3.0
"""KL(r‖c) in nats, a perplexity 20 times as high: where both points have lost that much, they are not compared."""


@dataclass(frozen=True, slots=True)
class Threshold:
    """Of a line. leaves_floor, doubles: indices among `points` of the least setting from which the loss is shown to be
    above the noise floor, and the perplexity to be doubled; None: at none. `found` is in the line's settings."""

    line: Line
    points: Sequence[Point]
    leaves_floor: int | None
    doubles: int | None
    found: Break | None

    def shown(self, setting: float) -> float:
        """A setting in the unit of the line: between two of them, in proportion."""
        start = float(FULL_BITS) if self.line.unit == "bits" else 0.0
        return float(np.interp(setting, [0.0, *self.line.settings], [start, *self.line.shown]))


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two points of equal size and how much larger the second one's KL(r‖c) is."""

    better: Point
    worse: Point
    found: Difference


@dataclass(frozen=True, slots=True)
class Statement:
    text: str
    verdict: Verdict
    evidence: str
    comparisons: Sequence[Comparison] = ()


def threshold(results: Results, line: Line, seed: int) -> Threshold | None:
    """None where too little has been measured."""
    result = results.curve(line)
    if result is None:
        return None
    curve, points = result
    first, doubled = (leaves_floor(results.excess(line, points, level)) for level in (0.0, math.log(2.0)))
    kink = find_break(curve, resamples(curve, seed)) if len(points) >= MIN_BREAK_POINTS else None
    return Threshold(line, points, first, doubled, kink)


def resamples(curve: Curve, seed: int) -> Floats:
    """How often each request is drawn, [B, R]: among those that the same settings have scored (the rungs), as many as
    there are, so that no setting loses its requests."""
    rng = np.random.default_rng(seed)
    counts = np.zeros((RESAMPLES, len(curve.tokens)))
    _, rung = np.unique(curve.measured, axis=1, return_inverse=True)
    for block in np.unique(rung):
        chosen = np.flatnonzero(rung == block)
        counts[:, chosen] = rng.multinomial(len(chosen), np.full(len(chosen), 1.0 / len(chosen)), RESAMPLES)
    return counts


PAPER_BREAKS = (
    (STRUCTURED, 0.4, 0.6, "structured pruning breaks at about 50 % sparsity (40 to 60 %)"),
    (UNSTRUCTURED_PRUNING, 0.6, 0.8, "unstructured pruning breaks at 60 to 80 % sparsity"),
    (QUANTIZATION, 12.0, 14.0, "quantization breaks below 3 to 4 bits (between 4 and 2 bits)"),
)
"""Line, the range of its break in settings, the statement."""
PAPER_ORDER = (QUANTIZATION, UNSTRUCTURED_PRUNING, SEMI_STRUCTURED, STRUCTURED)
"""From the least loss to the largest, at equal size."""


def statements(
    results: Results, thresholds: Mapping[str, Threshold], lines: Sequence[Line], shares: Mapping[Point, float]
) -> list[Statement]:
    """The paper's four statements, the last one in three parts; those whose lines were swept."""
    result = []
    for name, low, high, text in PAPER_BREAKS:
        if name in thresholds:
            limit = thresholds[name]
            if limit.found is None:
                result.append(Statement(text, Verdict.UNDECIDED, "too few settings were measured"))
            else:
                result.append(Statement(text, breaks_within(limit.found, low, high), describe_break(limit)))
    by_name = {line.name: results.measured(line.points) for line in lines}
    for better, worse in pairwise(PAPER_ORDER):
        if better in by_name and worse in by_name:
            text = f"at equal size {better} loses less than {worse}"
            alone = {point: results.alone(point) for point in (*by_name[better], *by_name[worse])}
            pairs = [
                (a, b)
                for a, b in equal_size(by_name[better], by_name[worse], shares)
                if min(alone[a].means()[0], alone[b].means()[0]) < COLLAPSED
            ]
            comparisons = [Comparison(a, b, difference(alone[a], alone[b])) for a, b in pairs]
            verdict = always_better([(alone[a], alone[b]) for a, b in pairs], looks=RUNGS)
            count = "1 pair" if len(pairs) == 1 else f"{len(pairs)} pairs"
            evidence = f"{count} of equal size" if pairs else "no two points have equal size"
            result.append(Statement(text, verdict, evidence, comparisons))
    return result


def equal_size(
    better: Sequence[Point], worse: Sequence[Point], shares: Mapping[Point, float]
) -> list[tuple[Point, Point]]:
    """For each of `worse` the point of `better` with the most bytes that has no more than it."""
    pairs = []
    for point in worse:
        fitting = [
            candidate
            for candidate in better
            if MIN_RELATIVE_BYTES * shares[point] <= shares[candidate] <= shares[point] + 1e-9
        ]
        if fitting:
            pairs.append((max(fitting, key=lambda candidate: shares[candidate]), point))
    return pairs


def describe_break(limit: Threshold) -> str:
    assert limit.found is not None
    if limit.found.existence is Existence.UNDECIDED:
        return "whether there is a break is undecided"
    if limit.found.existence is Existence.NONE:
        return "no break: the loss never rises more than twice as fast as before"
    at, low, high = (limit.shown(value) for value in (limit.found.at, limit.found.low, limit.found.high))
    if limit.line.unit == "sparsity":
        return f"at {100 * at:.0f} % [{100 * low:g}, {100 * high:g}]"
    return f"at {at:.1f} {limit.line.unit} [{low:g}, {high:g}]"


def pareto_front(results: Results, points: Sequence[Point], shares: Mapping[Point, float]) -> list[Point]:
    """Points that no other one beats in both bytes and KL(r‖c), by ascending bytes."""
    front: list[Point] = []
    least = math.inf
    values = {point: results.alone(point).means()[0] for point in points}
    for point in sorted(points, key=lambda candidate: (shares[candidate], values[candidate])):
        if values[point] < least:
            front.append(point)
            least = values[point]
    return front


def near_front(results: Results, points: Sequence[Point], shares: Mapping[Point, float]) -> list[Point]:
    """Points that may be on the front: the low end of their interval is below the high ends of all that are not
    larger."""
    ends = {point: kl_interval(list(results.texts[point].values())) for point in points}
    return [
        point
        for point in points
        if all(ends[point][0] <= ends[other][1] for other in points if shares[other] <= shares[point])
    ]


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
