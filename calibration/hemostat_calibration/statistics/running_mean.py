"""Confidence sequences of running means that hold for every number of observations, also under drift.

No limit theorem is involved: except for the range of the observations nothing is assumed, neither one distribution nor
independence. The price is width: an interval is about 8 ranges / t wide even where nothing varies, because a range
that was not used so far may be used by the next observation.

**What is estimated** is not a constant of the traffic, but the mean of what could be expected of the observations so
far: μ_t = (1/t) Σ_{i ≤ t} E[X_i | past]. Where the traffic drifts, μ_t drifts with it, and the interval follows.

**The method** is an empirical-Bernstein confidence sequence (Howard, Ramdas, McAuliffe & Sekhon, "Time-uniform,
nonparametric, nonasymptotic confidence sequences", Annals of Statistics 2021, theorem 4). For ξ ≥ −c and 0 ≤ λ < 1/c

    exp(λ ξ − ψ(λ) ξ²) ≤ 1 + λ ξ,    ψ(λ) = (−log(1 − cλ) − cλ)/c²                  (Fan, Grama & Liu 2015)

With ξ_i = X_i − X̂_i, X̂_i any value of the range that is known before X_i (here the mean so far), it follows that
exp(λ Σ (X_i − E[X_i | past]) − ψ(λ) Σ ξ_i²) is a supermartingale, and so is its mixture over several λ. It ever
reaches 1/α with a probability of at most α (Ville's inequality). The mixture's boundary is solved numerically: it is
narrower than the stitched one of the paper.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from hemostat_calibration.arrays import Floats, frozen
from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.statistics.confidence import ConfidenceInterval

_FRACTIONS = frozen(np.concatenate([[0.95, 0.8], 0.5 * 0.5 ** np.arange(16.0)]))
"""The values of λ·c in the mixture: small ones for many observations (the best one is about √(2 log(1/α) c²/V))."""
_WEIGHTS = frozen(np.full(len(_FRACTIONS), 1.0 / len(_FRACTIONS)))
_PSI = frozen(-np.log1p(-_FRACTIONS) - _FRACTIONS)
ENOUGH = 0.5
"""An interval that is wider than this share of the range is reported as "not enough requests"."""


@dataclass(frozen=True, slots=True)
class RunningMean:
    """Mean of observations between lo and hi, with an interval of their running conditional mean. Its fields are its
    whole state; lo < hi, both finite (InvalidArgumentError).

    observations, total: their number and sum. squares: Σ ((X_i − mean of those before)/(hi − lo))², the first one
    about the value of the range that is nearest to 0.

    >>> running = RunningMean(0.0, 1.0)
    >>> for n in range(400):
    ...     running = running.update(0.2 + 0.1 * (n % 2))
    >>> interval = running.get()
    >>> round(interval.mean, 6), interval.low < 0.25 < interval.high, enough(interval, 0.0, 1.0)
    (0.25, True, True)
    """

    lo: float
    hi: float
    observations: int = 0
    total: float = 0.0
    squares: float = 0.0

    def __post_init__(self) -> None:
        _check_range(self.lo, self.hi)

    @property
    def mean(self) -> float:
        """The sample mean; NaN before the first observation."""
        return self.total / self.observations if self.observations else math.nan

    def update(self, x: float) -> RunningMean:
        """Returns the state with one more observation. Raises InvalidArgumentError if it is NaN or outside lo … hi (by
        more than rounding)."""
        x = _within(x, self.lo, self.hi, 1.0)
        centre = self.mean if self.observations else min(max(0.0, self.lo), self.hi)
        squares = self.squares + ((x - centre) / (self.hi - self.lo)) ** 2
        return RunningMean(self.lo, self.hi, self.observations + 1, self.total + x, squares)

    def get(self, alpha: float = 0.05) -> ConfidenceInterval:
        """Returns the mean, with an interval that contains the mean of the conditional means at all looks at once with
        a probability of at least 1 − alpha. Raises InvalidArgumentError unless 0 < alpha < 1.
        """
        _check_alpha(alpha)
        if not self.observations:
            return ConfidenceInterval(math.nan, self.lo, self.hi)
        reach = float(boundary(np.array(self.squares), 0.5 * alpha)) * (self.hi - self.lo) / self.observations
        return ConfidenceInterval(self.mean, max(self.mean - reach, self.lo), min(self.mean + reach, self.hi))


def enough(interval: ConfidenceInterval, lo: float, hi: float) -> bool:
    """Returns True if the interval is at most half as wide as the range lo … hi.

    >>> enough(ConfidenceInterval(0.2, 0.1, 0.3), 0.0, 1.0), enough(ConfidenceInterval(0.2, 0.0, 0.8), 0.0, 1.0)
    (True, False)
    """
    return interval.high - interval.low <= ENOUGH * (hi - lo)


def boundary(squares: Floats, alpha: float) -> Floats:
    """Returns the value that Σ (X_i − E[X_i | past])/c ever exceeds with a probability of at most alpha, given V = Σ
    ξ_i²/c².

    squares: V, of any shape. The result is the root s of Σ_k w_k exp(λ_k s − ψ(λ_k) V) = 1/alpha, rounded up.

    >>> bool(3.0 < boundary(np.array(0.0), 0.05) < boundary(np.array(10.0), 0.05) < 20.0)
    True
    """
    # Each component alone gives an upper bound of the root, and all of them together at most 1/weight of it.
    spend = -math.log(alpha)
    alone = (spend - np.log(_WEIGHTS) + _PSI * squares[..., None]) / _FRACTIONS
    s: Floats = alone.min(-1)
    # Newton's method on a convex increasing function, from above: it falls monotonically and never passes the root.
    for _ in range(6):
        exponents = np.log(_WEIGHTS) + _FRACTIONS * s[..., None] - _PSI * squares[..., None]
        top = exponents.max(-1, keepdims=True)
        parts = np.exp(exponents - top)
        total = parts.sum(-1)
        excess = top[..., 0] + np.log(total) - spend
        s = s - excess * total / (parts * _FRACTIONS).sum(-1)
    return s


def _within(x: float, lo: float, hi: float, scale: float) -> float:
    slack = 1e-9 * max(abs(lo), abs(hi), scale)
    if not lo - slack <= x <= hi + slack:
        raise InvalidArgumentError(f"observation {x} is not between {lo} and {hi}")
    return min(max(x, lo), hi)


def _check_range(lo: float, hi: float) -> None:
    if not (math.isfinite(lo) and math.isfinite(hi) and lo < hi):
        raise InvalidArgumentError(f"the range is {lo} to {hi}: it must be finite and increase")


def _check_alpha(alpha: float) -> None:
    if not 0.0 < alpha < 1.0:
        raise InvalidArgumentError(f"alpha is {alpha}: it must be between 0 and 1")
