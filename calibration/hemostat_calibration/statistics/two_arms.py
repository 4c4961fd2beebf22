"""A test if an outcome is more frequent in a treated arm than in a control arm, which is valid at every look.

Universal inference (Wasserman, Ramdas & Balakrishnan, "Universal inference", PNAS 2020): with a₁ of n₁ treated and a₀
of n₀ control units bad,

    e = ∫∫ p^a₁ (1−p)^(n₁−a₁) q^a₀ (1−q)^(n₀−a₀) dBeta(½,½)(p) dBeta(½,½)(q)
        ─────────────────────────────────────────────────────────────────────
               max over p ≤ q + margin of the same likelihood at (p, q)

The numerator over the likelihood at the true (p, q) is a martingale that starts at 1; the denominator is at least that
likelihood wherever p ≤ q + margin is true. So e ever reaches 1/alpha with a probability of at most alpha (Ville's
inequality), however often it is looked at. e depends on the four counts alone: the order does not matter, counts of
two streams add, and the counts without a group of units are a test of all others.

The guarantee is for a rate that is constant in each arm. Where it changes in both arms alike, and units are assigned
to the arms at random with a constant probability, the counts come from one mixed population; that the test keeps
its level there is simulated (`tests/core/test_two_arms.py`), not proven.

The maximum on the line p = q + margin is a root of a cubic in closed form (Miettinen & Nurminen, "Comparative analysis
of two rates", Statistics in Medicine 1985, appendix).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hemostat_calibration.arrays import Floats
from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.statistics.confidence import ConfidenceInterval

_POINTS = 65
"""The number of differences in one round of the search for the ends of the interval."""
_ROUNDS = 3
"""The number of rounds of the search: after them an end is known to 2 / (_POINTS − 1)^_ROUNDS = 8e-6."""

_lgamma = np.frompyfunc(math.lgamma, 1, 1)


@dataclass(frozen=True, slots=True)
class TwoArms:
    """Counts of a binary outcome in two arms, and what they prove.

    treated, control: units; treated_bad, control_bad: those with the outcome. Raises InvalidArgumentError unless
    0 ≤ bad ≤ units in both arms.

    >>> arms = TwoArms(treated_bad=36, treated=40, control_bad=5, control=40)
    >>> arms.log_e(margin=0.05) > 10.0
    True
    >>> interval = arms.get()
    >>> round(interval.mean, 3), 0.4 < interval.low < interval.high < 1.0
    (0.775, True)
    """

    treated_bad: int = 0
    treated: int = 0
    control_bad: int = 0
    control: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.treated_bad <= self.treated and 0 <= self.control_bad <= self.control):
            raise InvalidArgumentError(f"bad units must be between 0 and all units: {self}")

    def update(self, *, treated: bool, bad: bool) -> TwoArms:
        """Returns the counts with one more unit."""
        if treated:
            return TwoArms(self.treated_bad + bad, self.treated + 1, self.control_bad, self.control)
        return TwoArms(self.treated_bad, self.treated, self.control_bad + bad, self.control + 1)

    def merge(self, other: TwoArms) -> TwoArms:
        return TwoArms(
            self.treated_bad + other.treated_bad,
            self.treated + other.treated,
            self.control_bad + other.control_bad,
            self.control + other.control,
        )

    def without(self, part: TwoArms) -> TwoArms:
        """Returns the counts of all other units. Raises InvalidArgumentError if `part` is not a part of these."""
        return TwoArms(
            self.treated_bad - part.treated_bad,
            self.treated - part.treated,
            self.control_bad - part.control_bad,
            self.control - part.control,
        )

    def log_e(self, margin: float) -> float:
        """Returns the natural logarithm of the e-value against `treated rate ≤ control rate + margin`. Raises
        InvalidArgumentError unless -1 < margin < 1.
        """
        return float(log_e_value(self.treated_bad, self.treated, self.control_bad, self.control, margin))

    def get(self, alpha: float = 0.05, inflation: float = 1.0) -> ConfidenceInterval:
        """Returns the treated rate minus the control rate, with the differences that the test does not refute at level
        alpha. inflation: v̂ of the arms, the larger one, 1 or more: all counts are divided by it, and where it is above
        1 the interval is asymptotic; infinite: −1 to 1.

        Valid at every look with a probability of at least 1 − alpha, for both ends together: the true difference is
        outside only if the e-value against that one difference reaches 1/alpha. `low` is above a margin exactly where
        `log_e(margin)` reaches log 1/alpha. NaN and −1 to 1 while an arm is empty. Raises InvalidArgumentError unless
        0 < alpha < 1.
        """
        if not 0.0 < alpha < 1.0:
            raise InvalidArgumentError(f"alpha is {alpha}: it must be between 0 and 1")
        if not (self.treated and self.control):
            return ConfidenceInterval(math.nan, -1.0, 1.0)
        difference = self.treated_bad / self.treated - self.control_bad / self.control
        if math.isinf(inflation):
            return ConfidenceInterval(difference, -1.0, 1.0)
        bad, units = self.treated_bad / inflation, self.treated / inflation
        counts = bad, units, self.control_bad / inflation, self.control / inflation
        numerator = float(_log_mixture(*counts[:2]) + _log_mixture(*counts[2:]))
        # Of the lower and the upper end. -1 and 1 themselves are left out: nothing lies beyond them.
        accepted, refuted = np.full(2, difference), np.array([-1.0, 1.0])
        for _ in range(_ROUNDS):
            points = np.clip(np.linspace(accepted, refuted, _POINTS, axis=1), -1.0 + 1e-12, 1.0 - 1e-12)
            exceeds = numerator - _log_likelihood_on_line(*counts, points) >= -math.log(alpha)
            # The likelihood falls with the distance from the estimate, so what is refuted lies beyond some point.
            first = np.where(exceeds.any(axis=1), np.maximum(exceeds.argmax(axis=1), 1), _POINTS - 1)
            accepted, refuted = points[[0, 1], first - 1], np.where(exceeds.any(axis=1), points[[0, 1], first], refuted)
        return ConfidenceInterval(difference, float(refuted[0]), float(refuted[1]))


def log_e_value(
    treated_bad: npt.ArrayLike,
    treated: npt.ArrayLike,
    control_bad: npt.ArrayLike,
    control: npt.ArrayLike,
    margin: float,
) -> Floats:
    """Returns the same as `TwoArms.log_e`, for arrays of counts that broadcast; natural logarithm, 0 before the first
    unit. Raises InvalidArgumentError unless -1 < margin < 1.

    >>> log_e_value([0, 20], 20, 0, 20, margin=0.05).round(2).tolist()
    [-4.15, 21.62]
    """
    if not -1.0 < margin < 1.0:
        raise InvalidArgumentError(f"margin is {margin}: it must be between -1 and 1")
    a, n, b, m = (np.asarray(x, np.float64) for x in (treated_bad, treated, control_bad, control))
    # An empty arm may have any rate: the one that satisfies the hypothesis most easily.
    p, q = np.where(n > 0.0, a / np.maximum(n, 1.0), 0.0), np.where(m > 0.0, b / np.maximum(m, 1.0), 1.0)
    free = _log_likelihood(a, n, p) + _log_likelihood(b, m, q)
    line = _log_likelihood_on_line(a, n, b, m, margin)
    log_e: Floats = _log_mixture(a, n) + _log_mixture(b, m) - np.where(p <= q + margin, free, line)
    return log_e


def _log_mixture(bad: npt.ArrayLike, units: npt.ArrayLike) -> Floats:
    """Returns log of the likelihood's mean over Beta(½, ½)."""
    a, n = np.asarray(bad, np.float64), np.asarray(units, np.float64)
    mixture: Floats = np.asarray(_lgamma(a + 0.5) + _lgamma(n - a + 0.5) - _lgamma(n + 1.0), np.float64)
    return mixture - math.log(math.pi)


def _log_likelihood(bad: Floats, units: Floats, rate: Floats) -> Floats:
    """Returns bad·log rate + (units − bad)·log(1 − rate), with 0·log 0 = 0; −inf where the rate excludes what was
    seen."""
    good = units - bad
    with np.errstate(divide="ignore"):
        hits = np.where(bad > 0.0, bad * np.log(np.where(bad > 0.0, rate, 1.0)), 0.0)
        misses = np.where(good > 0.0, good * np.log1p(-np.where(good > 0.0, rate, 0.0)), 0.0)
    total: Floats = hits + misses
    return total


def _log_likelihood_on_line(
    treated_bad: npt.ArrayLike,
    treated: npt.ArrayLike,
    control_bad: npt.ArrayLike,
    control: npt.ArrayLike,
    margin: npt.ArrayLike,
) -> Floats:
    """Returns the maximum of the log likelihood over treated rate = control rate + margin."""
    a, n, b, m, d = (np.asarray(x, np.float64) for x in (treated_bad, treated, control_bad, control, margin))
    total = np.maximum(n + m, 1.0)
    # The derivative's numerator, total·q³ + l2·q² + l1·q + l0 with q the control rate; its middle root is the maximum.
    l2 = ((n + 2.0 * m) * d - (n + m) - (a + b)) / total
    l1 = ((m * d - (n + m) - 2.0 * b) * d + (a + b)) / total
    l0 = b * d * (1.0 - d) / total
    c = l2**3 / 27.0 - l1 * l2 / 6.0 + l0 / 2.0
    size = np.sqrt(np.maximum(l2**2 / 9.0 - l1 / 3.0, 0.0))
    signed = np.where(c >= 0.0, size, -size)
    cosine = np.clip(c / np.where(size > 0.0, signed**3, 1.0), -1.0, 1.0)
    q = 2.0 * signed * np.cos((math.pi + np.arccos(cosine)) / 3.0) - l2 / 3.0
    low, high = np.maximum(0.0, -d), np.minimum(1.0, 1.0 - d)
    # The ends too: there the root is known exactly, and rounding would cost most.
    rates = (np.clip(q, low, high), low, high)
    likelihoods = [_log_likelihood(a, n, rate + d) + _log_likelihood(b, m, rate) for rate in rates]
    best: Floats = np.maximum(np.maximum(likelihoods[0], likelihoods[1]), likelihoods[2])
    return best
