"""Results of a sweep without a model: figures of texts in which the loss is a known function of the point."""

from __future__ import annotations

import numpy as np

from hemostat_lab.doctor.options import Axis
from hemostat_lab.doctor.pair import FLOOR, Scored
from hemostat_lab.doctor.sweep.outcomes import Outcome
from hemostat_lab.doctor.sweep.points import FULL_BITS, PLAIN, UNCHANGED, Point, grid, lines
from hemostat_lab.doctor.sweep.results import Results

LAYERS = 16
AXES = tuple(Axis)
LINES = lines(AXES, LAYERS)
POINTS = grid(AXES, LAYERS)
FACTOR = {"unstructured": 1.0, "n:4": 1.5, "rows": 5.0}


def loss(point: Point) -> float:
    """Nats: breaks at 4 bits, 65 % (unstructured, n:4), 45 % (rows); dropped layers lose in proportion."""
    bits = 0.001 * (FULL_BITS - point.bits) + 3.0 * max(FULL_BITS - point.bits - 12.0, 0.0)
    at = 0.45 if point.pattern == "rows" else 0.65
    sparsity = FACTOR[point.pattern] * (0.2 * point.sparsity + 20.0 * max(point.sparsity - at, 0.0))
    return bits + sparsity + 0.5 * point.layers


def scored(point: Point, texts: int, seed: int = 0) -> list[Scored]:
    rng = np.random.default_rng(seed)
    result = []
    for index in range(texts):
        tokens = 12 + index % 5
        factor = rng.gamma(8.0, 1.0 / 8.0)
        kl = 0.002 + loss(point) * factor * rng.gamma(20.0, 1.0 / 20.0, tokens)
        cut = np.inf if point.drawing.top_p < 1.0 else 1.0
        figures = {
            "kl_rc": kl * cut,
            "kl_cr": kl,
            "tv": np.minimum(np.sqrt(kl / 2.0), 0.99),
            "same_top": (kl < 0.5).astype(float),
            "logp_r": np.full(tokens, -1.0),
            "logp_c": -1.0 - kl,
        }
        if point == UNCHANGED:
            figures |= {FLOOR: np.full(tokens, 0.002), "kl_rc": np.zeros(tokens), "kl_cr": np.zeros(tokens)}
            figures |= {"tv": np.zeros(tokens), "same_top": np.ones(tokens), "logp_c": figures["logp_r"]}
        result.append(Scored(index, np.arange(tokens, dtype=np.int32), figures))
    return result


def results(texts: int = 16, points: list[Point] | None = None) -> Results:
    made = Results()
    for point in POINTS if points is None else points:
        good = loss(point) < 0.5 and point.drawing == PLAIN
        outcomes = [Outcome(n, None if n % 2 else good, good and n % 4 < 2) for n in range(8)]
        made.add(point, scored(point, texts), outcomes)
    return made


def shares(points: list[Point] = POINTS) -> dict[Point, float]:
    """Returns what `alterations.stored_share` counts, without scales."""
    result = {}
    for point in points:
        kept, index = 1.0 - point.sparsity, 0.0
        if point.sparsity and point.pattern == "n:4":
            index = min(1.0, 2.0 * kept)
        elif point.sparsity and point.pattern == "unstructured":
            index = 1.0
        result[point] = (kept * point.bits + index) / FULL_BITS
    return result
