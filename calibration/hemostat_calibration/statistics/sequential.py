"""A lower bound of a mean that is valid at all times at once, however often it is looked at.

By betting (Waudby-Smith & Ramdas, JRSS-B 2024; Ville's inequality): if every observation X ≥ lo has a mean of at most
m given the past, then for a fraction f in [0, 1]

    K_t(m) = Π_{i ≤ t} (1 − f + f (X_i − lo)/(m − lo))

is a non-negative supermartingale that starts at 1, so it ever reaches 1/α with a probability of at most α. A mixture
of several f is one, too. K falls in m, so {m : K(m) < 1/α} is a ray, and its end is the lower bound.

Why this method: only lo enters, not the upper end and not a variance, and f = 1 bets all that the range allows, which
is nearly the best bet when the mean is small against the range but not against the spread (the regime here: gains of
some hundredths of a nat, of a similar spread, in a range of ±2). Most of the mixture is therefore put there. The
product does not depend on the order, so streams of replicas merge by adding logarithms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from hemostat_calibration.arrays import Floats, frozen
from hemostat_calibration.errors import InvalidArgumentError

_FRACTIONS = np.array([1.0, 0.5, 0.2, 0.05, 0.01])
_WEIGHTS = np.array([0.6, 0.1, 0.1, 0.1, 0.1])
_GRID = 200


@dataclass(frozen=True, slots=True, eq=False)
class LowerSequence:
    """Estimator of a lower bound of a mean, valid at every look. Start with `LowerSequence.begin`.

    lo, hi: every observation is at least lo; hi is only the largest bound that can be given.
    log_wealth: float64 [G, F], log K at every grid point and fraction; read-only.
    observations, total: their number and sum.

    >>> sequence = LowerSequence.begin(-1.0, 1.0)
    >>> for _ in range(50):
    ...     sequence = sequence.update(0.25)
    >>> 0.0 < sequence.get(alpha=0.05) < sequence.mean == 0.25
    True
    """

    lo: float
    hi: float
    log_wealth: Floats
    observations: int = 0
    total: float = 0.0

    @classmethod
    def begin(cls, lo: float, hi: float) -> LowerSequence:
        """Before the first observation. InvalidArgumentError unless lo < hi, both finite."""
        if not (math.isfinite(lo) and math.isfinite(hi) and lo < hi):
            raise InvalidArgumentError(f"the range is {lo} to {hi}: it must be finite and increase")
        return cls(lo, hi, np.zeros((len(_grid(lo, hi)), len(_FRACTIONS))))

    @property
    def grid(self) -> Floats:
        """The means that are tested, float64 [G]: lo < m ≤ hi, 0 among them where lo < 0 < hi, dense around it."""
        return _grid(self.lo, self.hi)

    @property
    def mean(self) -> float:
        """Sample mean; NaN before the first observation."""
        return self.total / self.observations if self.observations else math.nan

    def update(self, x: float) -> LowerSequence:
        """Add one observation. InvalidArgumentError where it is NaN or below lo (by more than rounding)."""
        if not x >= self.lo - 1e-9 * (self.hi - self.lo):
            raise InvalidArgumentError(f"observation {x} is not at least {self.lo}")
        # A bet on min(x, hi) is a bet on a smaller mean: the bound stays valid for what exceeds hi.
        y = (min(max(x, self.lo), self.hi) - self.lo) / (self.grid - self.lo)
        with np.errstate(divide="ignore"):
            step = np.log1p(_FRACTIONS * (y[:, None] - 1.0))
        return self._with(self.log_wealth + step, 1, x)

    def merge(self, other: LowerSequence) -> LowerSequence:
        """The sequence that saw both streams; InvalidArgumentError where their ranges differ."""
        if (self.lo, self.hi) != (other.lo, other.hi):
            raise InvalidArgumentError(f"ranges differ: {self.lo} to {self.hi}, {other.lo} to {other.hi}")
        return self._with(self.log_wealth + other.log_wealth, other.observations, other.total)

    def get(self, alpha: float) -> float:
        """The lower bound: with a probability of at least 1 − alpha, none that this ever returns is above the mean.

        The mean is that of each observation given the past, taken to be one and the same. A grid point, rounded down.
        InvalidArgumentError unless 0 < alpha < 1.
        """
        if not 0.0 < alpha < 1.0:
            raise InvalidArgumentError(f"alpha is {alpha}: it must be between 0 and 1")
        refuted = _log_mixture(self.log_wealth) >= -math.log(alpha)
        return float(self.grid[refuted][-1]) if refuted.any() else self.lo

    def _with(self, log_wealth: Floats, observations: int, total: float) -> LowerSequence:
        return LowerSequence(self.lo, self.hi, frozen(log_wealth), self.observations + observations, self.total + total)


def _log_mixture(log_wealth: Floats) -> Floats:
    top = log_wealth.max(axis=1, keepdims=True)
    mixed: Floats = (top + np.log((np.exp(log_wealth - top) * _WEIGHTS).sum(axis=1, keepdims=True)))[:, 0]
    return mixed


def _grid(lo: float, hi: float) -> Floats:
    """Cubic spacing: what matters most is on which side of 0 the mean lies, or how little beyond."""
    if lo < 0.0 < hi:
        below = lo * np.linspace(1.0, 0.0, _GRID // 2, endpoint=False)[1:] ** 3
        return np.concatenate([below, hi * np.linspace(0.0, 1.0, _GRID // 2 + 1) ** 3])
    return np.linspace(lo, hi, _GRID + 1)[1:]
