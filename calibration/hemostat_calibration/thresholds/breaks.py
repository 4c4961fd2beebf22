"""Finds the break of a curve: the setting from which on the figure rises several times faster than before.

The figure is KL(r‖c) in nats per token along the reference's own text, whose expectation is the logarithm of the
perplexity ratio. On that scale:

Whether there is a break. For each setting k between the first and the last, the way from it to a later setting j is
compared with the way up to it: C_kj = (y_j − y_k)/(x_j − x_k) − MIN_RATIO · (y_k − y_0)/(x_k − x_0). A line has all
C_kj < 0. There is a break where some C_kj is above 0, none where all are below, both at 97.5 % with Bonferroni's
correction over the pairs; otherwise it is undecided, as it is where the last setting is not above the first one.

Where it is. Least squares of a continuous line with one kink ψ at which its slope rises (Hinkley, Biometrika 56, 1969;
Muggeo, Statistics in Medicine 22, 2003), on the settings up to the end of the steepest step: beyond it the figure
saturates, since a model that knows nothing is only so far away. The interval is the bootstrap's over requests (a
request keeps its values at all settings), with percentiles that are expanded for few requests (Hesterberg, The American
Statistician 69, 2015). Where all ψ between two settings fit equally well, both ends of them count. Between two settings
the shape of the curve is not known, so the interval is extended to whole settings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from statistics import NormalDist

import numpy as np

from hemostat_calibration.arrays import Floats
from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.thresholds.curve import ALPHA, Curve, student_quantile

MIN_RATIO = 2.0
"""A break is a rise that is more than this many times as fast as before."""
KNOTS_PER_STEP = 16
"""The number of candidates for ψ between two settings."""
TIE = 1e-9
"""The relative difference in the sum of squares up to which two ψ fit equally well."""


class Existence(StrEnum):
    FOUND = "found"
    NONE = "none"
    UNDECIDED = "undecided"


@dataclass(frozen=True, slots=True)
class Break:
    """A break of a curve.

    existence: if it was found. at, low, high: its place and its interval, in units of the settings; NaN unless it was
    found. raw_low, raw_high: the interval before it was extended to whole settings.
    """

    existence: Existence
    at: float = math.nan
    low: float = math.nan
    high: float = math.nan
    raw_low: float = math.nan
    raw_high: float = math.nan


def find_break(curve: Curve, counts: Floats) -> Break:
    """Returns the break of the curve. counts: float64 [B, R], how often each request was drawn in each resample. Raises
    InvalidArgumentError with fewer than four settings.

    >>> x = np.arange(6.0)
    >>> rise = np.maximum(x - 2.5, 0.0) * 4.0 + 0.1 * x
    >>> noise = 0.01 * np.sin(np.arange(60.0)).reshape(6, 10)
    >>> result = find_break(Curve(x, rise[:, None] + noise, np.ones(10)), np.ones((1, 10)))
    >>> result.existence.value, round(result.at, 1), result.low, result.high
    ('found', 2.5, 2.0, 3.0)
    """
    if len(curve.settings) < 4:
        raise InvalidArgumentError("a break needs at least four settings")
    existence = break_existence(curve)
    if existence is not Existence.FOUND:
        return Break(existence)
    low, high = kink(curve.settings, curve.means()[None])
    drawn = curve.means(counts)
    lows, highs = kink(curve.settings, drawn[~np.isnan(drawn).any(axis=1)])
    tail = expanded_tail(int(curve.measured.sum(axis=1).min()))
    raw_low = min(float(np.quantile(lows, tail)), float(low[0]))
    raw_high = max(float(np.quantile(highs, 1.0 - tail)), float(high[0]))
    x = curve.settings
    return Break(
        existence,
        0.5 * float(low[0] + high[0]),
        float(x[np.searchsorted(x, raw_low + 1e-9, side="right") - 1]),
        float(x[np.searchsorted(x, raw_high - 1e-9, side="left")]),
        raw_low,
        raw_high,
    )


def break_existence(curve: Curve) -> Existence:
    """Returns if there is a break, by paired contrasts of the steps with Bonferroni's correction.

    >>> x = np.arange(5.0)
    >>> noise = 0.01 * np.sin(np.arange(50.0)).reshape(5, 10)
    >>> break_existence(Curve(x, x[:, None] + noise, np.ones(10))).value
    'none'
    """
    x, levels = curve.settings, len(curve.settings)
    rise = np.zeros(levels)
    rise[[0, -1]] = (-1.0, 1.0)
    if curve.contrast(rise, ALPHA)[1] <= 0.0:
        return Existence.UNDECIDED
    pairs = [(k, j) for k in range(1, levels - 1) for j in range(k + 1, levels)]
    bounds = []
    for k, j in pairs:
        weights = np.zeros(levels)
        weights[[k, j]] += np.array([-1.0, 1.0]) / (x[j] - x[k])
        weights[[0, k]] += MIN_RATIO * np.array([1.0, -1.0]) / (x[k] - x[0])
        _, low, high = curve.contrast(weights, ALPHA / len(pairs))
        bounds.append((low, high))
    if any(low > 0.0 for low, _ in bounds):
        return Existence.FOUND
    return Existence.NONE if all(high <= 0.0 for _, high in bounds) else Existence.UNDECIDED


def kink(settings: Floats, means: Floats) -> tuple[Floats, Floats]:
    """Returns the least and the largest of the ψ that fit best, float64 [B] each. means: float64 [B, L].

    >>> x = np.array([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    >>> low, high = kink(x, np.maximum(x - 2.25, 0.0)[None])
    >>> low.tolist(), high.tolist()
    ([2.25], [2.25])
    """
    slopes = np.diff(means, axis=1) / np.diff(settings)
    last = slopes.argmax(axis=1) + 1
    low, high = np.full(len(means), np.nan), np.full(len(means), np.nan)
    for end in np.unique(last).tolist():
        rows = last == end
        if end == 1:
            low[rows], high[rows] = settings[0], settings[1]
            continue
        x = settings[: end + 1]
        knots = np.concatenate([np.linspace(a, b, KNOTS_PER_STEP, endpoint=False) for a, b in pairwise(x)])[1:]
        errors = _squared_errors(x, knots, means[rows, : end + 1])
        scale = ((means[rows, : end + 1] - means[rows, : end + 1].mean(axis=1, keepdims=True)) ** 2).sum(axis=1)
        best = errors <= errors.min(axis=0) + TIE * scale
        low[rows] = knots[best.argmax(axis=0)]
        high[rows] = knots[len(knots) - 1 - best[::-1].argmax(axis=0)]
    return low, high


def _squared_errors(x: Floats, knots: Floats, y: Floats) -> Floats:
    """Returns the squared errors, [K, B], of the best line with a kink at each knot that rises faster after it. y: [B,
    L]."""
    after = np.maximum(x - knots[:, None], 0.0)
    design = np.stack([np.ones_like(after), np.broadcast_to(x, after.shape), after], axis=2)
    inverse = np.linalg.pinv(design)
    rise = y @ inverse[:, 2, :, None]
    left = y @ (np.eye(len(x)) - (design @ inverse).transpose(0, 2, 1))
    errors: Floats = np.where(rise[..., 0] > 0.0, (left**2).sum(axis=2), np.inf)
    return errors


def expanded_tail(requests: int) -> float:
    """Returns the percentile for a 95 % interval of m requests: the normal distribution function at −√(m/(m − 1))
    t_{m−1}.

    >>> round(expanded_tail(10), 4), round(expanded_tail(10**6), 4)
    (0.0086, 0.025)
    """
    return NormalDist().cdf(-math.sqrt(requests / (requests - 1)) * student_quantile(ALPHA, requests - 1))
