"""Confidence sequences of running means that hold for every number of observations, also under drift.

No limit theorem is involved: beside the range of the observations nothing is assumed, neither one distribution nor
independence. The price is width: an interval is about 8 ranges / t wide even where nothing varies, because a range
that was not used so far may be used by the next observation.

**What is estimated** is not a constant of the traffic, but the mean of what could be expected of the observations so
far: μ_t = (1/t) Σ_{i ≤ t} E[X_i | past]. Where the traffic drifts, μ_t drifts with it, and the interval follows.

**The method** is that of empirical-Bernstein confidence sequences (Howard, Ramdas, McAuliffe & Sekhon, "Time-uniform,
nonparametric, nonasymptotic confidence sequences", Annals of Statistics 2021, theorem 4). For ξ ≥ −c and 0 ≤ λ < 1/c

    exp(λ ξ − ψ(λ) ξ²) ≤ 1 + λ ξ,    ψ(λ) = (−log(1 − cλ) − cλ)/c²                  (Fan, Grama & Liu 2015)

With ξ_i = X_i − X̂_i, X̂_i any value of the range that is known before X_i (here the mean so far), it follows that
exp(λ Σ (X_i − E[X_i | past]) − ψ(λ) Σ ξ_i²) is a supermartingale, and so is its mixture over several λ. It ever
reaches 1/α with a probability of at most α (Ville's inequality). The mixture's boundary is solved numerically: it is
narrower than the stitched one of the paper.

**Ratios** Σx/Σn, where lo·n ≤ x ≤ hi·n and n ≤ max_n (a figure's sum over the tokens of a request, and their number).
What is estimated is m_t = Σ E[x_i | past] / Σ E[n_i | past]. The same with ξ_i = x_i − m n_i ≥ −(m − lo) max_n and
X̂ = 0 bounds Σ (x_i − E[x_i | past]) − m Σ (n_i − E[n_i | past]) for one m. As m_t may drift, it must hold for all m at
once: it is proved for the points of a fixed grid (each has its part of α), and between two points the bound is their
linear interpolation, because the sum is linear in m. m is below the interval where Σx − m Σn exceeds the bound. The
squares Σ (x − m n)² of all m follow from three sums.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from hemostat_calibration.arrays import Floats, frozen
from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.statistics.confidence import ConfidenceInterval

_FRACTIONS = frozen(np.concatenate([[0.95, 0.8], 0.5 * 0.5 ** np.arange(16.0)]))
"""λ·c of the mixture: small ones for many observations (the best one is about √(2 log(1/α) c²/V))."""
_WEIGHTS = frozen(np.full(len(_FRACTIONS), 1.0 / len(_FRACTIONS)))
_PSI = frozen(-np.log1p(-_FRACTIONS) - _FRACTIONS)
_SPACING = 3.0 ** -np.arange(1.0, 8.0)
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
    >>> found = running.get()
    >>> round(found.mean, 6), found.low < 0.25 < found.high, enough(found, 0.0, 1.0)
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
        """Sample mean; NaN before the first observation."""
        return self.total / self.observations if self.observations else math.nan

    def update(self, x: float) -> RunningMean:
        """Add one observation. InvalidArgumentError where it is NaN or outside lo … hi (by more than rounding)."""
        x = _within(x, self.lo, self.hi, 1.0)
        centre = self.mean if self.observations else min(max(0.0, self.lo), self.hi)
        squares = self.squares + ((x - centre) / (self.hi - self.lo)) ** 2
        return RunningMean(self.lo, self.hi, self.observations + 1, self.total + x, squares)

    def get(self, alpha: float = 0.05) -> ConfidenceInterval:
        """The mean, with an interval that contains the mean of the conditional means at all looks at once with a
        probability of at least 1 − alpha. InvalidArgumentError unless 0 < alpha < 1.
        """
        _check_alpha(alpha)
        if not self.observations:
            return ConfidenceInterval(math.nan, self.lo, self.hi)
        reach = float(boundary(np.array(self.squares), 0.5 * alpha)) * (self.hi - self.lo) / self.observations
        return ConfidenceInterval(self.mean, max(self.mean - reach, self.lo), min(self.mean + reach, self.hi))


@dataclass(frozen=True, slots=True)
class RunningRatio:
    """Σx/Σn with an interval of Σ E[x | past] / Σ E[n | past]; lo·n ≤ x ≤ hi·n, 0 ≤ n ≤ max_n. Its fields are its whole
    state. InvalidArgumentError unless lo < hi and max_n > 0, all finite.

    The interval holds also where n and x/n depend on each other: no request's weight is taken to be typical.

    >>> ratio = RunningRatio(0.0, 1.0, max_n=20)
    >>> for n in range(1000):
    ...     ratio = ratio.update(4.0 + n % 2, 20)
    >>> found = ratio.get()
    >>> round(found.mean, 6), found.low < 0.225 < found.high, enough(found, 0.0, 1.0)
    (0.225, True, True)
    """

    lo: float
    hi: float
    max_n: float
    requests: int = 0
    x: float = 0.0
    n: float = 0.0
    xx: float = 0.0
    xn: float = 0.0
    nn: float = 0.0

    def __post_init__(self) -> None:
        _check_range(self.lo, self.hi)
        if not (math.isfinite(self.max_n) and self.max_n > 0.0):
            raise InvalidArgumentError(f"max_n is {self.max_n}: it must be above 0")

    @property
    def mean(self) -> float:
        """Σx/Σn; NaN before the first."""
        return self.x / self.n if self.n else math.nan

    def update(self, x: float, n: float) -> RunningRatio:
        """Add one request. InvalidArgumentError where n is not in 0 … max_n or x not in lo·n … hi·n."""
        if not 0.0 <= n <= self.max_n:
            raise InvalidArgumentError(f"n is {n}: it must be between 0 and {self.max_n}")
        x = _within(x, self.lo * n, self.hi * n, n)
        return RunningRatio(
            self.lo,
            self.hi,
            self.max_n,
            self.requests + 1,
            self.x + x,
            self.n + n,
            self.xx + x * x,
            self.xn + x * n,
            self.nn + n * n,
        )

    def get(self, alpha: float = 0.05) -> ConfidenceInterval:
        """The ratio, with an interval that contains the ratio of the sums of conditional means at all looks at once
        with a probability of at least 1 − alpha. InvalidArgumentError unless 0 < alpha < 1.
        """
        _check_alpha(alpha)
        if not self.n:
            return ConfidenceInterval(math.nan, self.lo, self.hi)
        sums = (np.array(value) for value in (self.x, self.n, self.xx, self.xn, self.nn))
        low, high = ratio_ends(*sums, lo=self.lo, hi=self.hi, max_n=self.max_n, alpha=alpha)
        return ConfidenceInterval(self.mean, float(low), float(high))


def enough(found: ConfidenceInterval, lo: float, hi: float) -> bool:
    """Whether the interval is at most half as wide as the range lo … hi.

    >>> enough(ConfidenceInterval(0.2, 0.1, 0.3), 0.0, 1.0), enough(ConfidenceInterval(0.2, 0.0, 0.8), 0.0, 1.0)
    (True, False)
    """
    return found.high - found.low <= ENOUGH * (hi - lo)


def boundary(squares: Floats, alpha: float) -> Floats:
    """What Σ (X_i − E[X_i | past])/c ever exceeds with a probability of at most alpha, given V = Σ ξ_i²/c², any shape.

    The root s of Σ_k w_k exp(λ_k s − ψ(λ_k) V) = 1/alpha, rounded up.

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


def ratio_ends(
    x: Floats, n: Floats, xx: Floats, xn: Floats, nn: Floats, *, lo: float, hi: float, max_n: float, alpha: float
) -> tuple[Floats, Floats]:
    """Lower and upper end of the interval of a ratio from its sums, of one shape; see `RunningRatio`.

    >>> sums = (np.array(value) for value in (225.0, 1000.0, 50.7, 225.0, 1000.0))
    >>> low, high = ratio_ends(*sums, lo=0.0, hi=1.0, max_n=1.0, alpha=0.05)
    >>> bool(0.2 < low < 0.225 < high < 0.26)
    True
    """
    grid = _grid(lo, hi)
    part = 0.5 * alpha / len(grid)
    squares = np.maximum(xx[..., None] - 2.0 * grid * xn[..., None] + grid**2 * nn[..., None], 0.0)
    residual = x[..., None] - grid * n[..., None]
    below = residual - _scaled(squares, (grid - lo) * max_n, part)
    above = -residual - _scaled(squares, (hi - grid) * max_n, part)
    return _root(grid, below), _root(grid[::-1], above[..., ::-1])


def _scaled(squares: Floats, scale: Floats, alpha: float) -> Floats:
    """The boundary of sums of values ≥ −scale; at the end of the range, where scale is 0, its neighbour's scale."""
    positive = scale[scale > 0.0].min()
    scale = np.maximum(scale, positive)
    bound: Floats = boundary(squares / scale**2, alpha) * scale
    return bound


def _root(grid: Floats, evidence: Floats) -> Floats:
    """The end of the refuted points: linear between the last one with evidence > 0 and its neighbour; the first point
    where none is refuted. evidence: [..., G]."""
    refuted = evidence > 0.0
    last = len(grid) - 1 - np.argmax(refuted[..., ::-1], axis=-1)
    last = np.minimum(np.where(refuted.any(-1), last, 0), len(grid) - 2)
    here = np.take_along_axis(evidence, last[..., None], -1)[..., 0]
    there = np.take_along_axis(evidence, last[..., None] + 1, -1)[..., 0]
    share = np.where(here > 0.0, here / np.where(here > there, here - there, 1.0), 0.0)
    end: Floats = grid[last] + np.minimum(share, 1.0) * (grid[last + 1] - grid[last])
    return end


def _grid(lo: float, hi: float) -> Floats:
    """Both ends, and points that are dense towards each end, and around 0 where it is inside: most figures are near."""
    spread = (hi - lo) * _SPACING
    points = [np.array([lo, hi]), lo + spread, hi - spread[1:]]
    if lo < 0.0 < hi:
        points = [np.array([lo, 0.0, hi]), hi * _SPACING, lo * _SPACING]
    grid: Floats = np.unique(np.concatenate(points))
    return grid


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
