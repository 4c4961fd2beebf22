"""Confidence sequences: intervals for all times together, whenever one looks. The intervals of means are asymptotic.

Means per token. A request adds (x, n): the sum of a figure over its tokens, and their number; tokens of a request are
correlated in an unknown way, so the request is the unit, and the mean is the ratio E[x]/E[n]. That m is this ratio
means no more than E[x − m n] = 0 for a request, so m belongs to the interval while
    (Σ (x − m n))² ≤ κ_t Σ (x − m n)²,    κ_t = 2 (tρ² + 1)/(tρ²) log(√(tρ² + 1)/α)
over the t requests so far: Robbins' normal mixture with the variance estimated from the same data, an *asymptotic
confidence sequence* (Waudby-Smith, Arbour, Sinha, Kennedy, Ramdas, "Time-uniform central limit theory and asymptotic
confidence sequences", Annals of Statistics 2024, theorem 2.2). It is a quadratic in m (Fieller's), read off moments.
ρ makes it narrowest after some hundred requests: then it is about 1.6 times as wide as an interval that is valid for
one look. While t ≤ κ_t, about 20 requests, no m is excluded and the interval is the whole range.

For skewed figures (a few bad requests) the interval would miss the mean too often on the side of the long tail, early
on: bets against an m that is too high in truth earn Σ log(1 − λ(x − m n)), whose third-order term the mixture leaves
out. At the end of the interval, λ = √(κ/ΣE²) with E the residual, that term is κ^1.5 γ/3 with γ = ΣE³/(ΣE²)^1.5: κ
would have to be raised by the factor 1 + ⅔ √κ γ. Samples have less of the tail than the truth, so it is 1 + √κ γ, on
that side only. The guarantee is asymptotic, and for requests from one distribution: where most of the tail has not been
seen yet, the interval covers far less often than its level says.
`tests/core/test_confidence.py` simulates where it holds, `tests/bench/guard/intervals.py` where it does not;
`running_mean` has intervals that need no such assumption, and are wide.

Requests that depend on each other: with v̂ the variance inflation of the sums Σ (x − m n) (`dependence`), there are t/v̂
*effective* requests, and the inequality is (Σ (x − m n))² ≤ v̂ κ_(t/v̂) Σ (x − m n)²; the skew of sums of v̂ equal
residuals is √v̂ times theirs. Where v̂ is infinite, nothing is refuted: there are not enough effective requests.

Long requests: tokens are the weights of a mean per token. The error of the normal approximation of a weighted sum is of
the order of Σ n³/(Σ n²)^1.5 (Berry 1941, Esseen 1942), which is 1/√m for m requests of one length. So
m = (Σ n²)³/(Σ n³)² requests *carry* the mean: t where all are as long, 1 where one has nearly all tokens. While m/v̂ is
below `MIN_CARRYING`, nothing is refuted. Simulated in `tests/bench/guard/long_answers.py`. Of long requests that have
not come yet the rule knows nothing.

Differences between two randomised arms: both arms' requests are one stream of t, each adding its linearised residual
to one side or the other, with the same κ_t.

Proportions, one answer for each request: exact for any t. The likelihood ratio of a Beta(½, ½) mixture against p is a
martingale when p is true, so p belongs to the interval while it is below 1/α (Robbins 1970; Ville's inequality). With
v̂ both counts are divided by it: the interval is the one of so many effective requests, and asymptotic.

Heavy tails: a mean is of the values clipped at a stated cap, and the clipped share is given with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from hemostat_calibration.arrays import Floats
from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.statistics.streaming import RatioEstimate

NARROWEST_AT = 500
"""The number of requests after which the intervals of means are narrowest, compared with those for a single look."""
MIN_REQUESTS = 20
"""The least number of requests in each arm for a difference."""
MIN_CARRYING = 15.0
"""The smallest number of effective requests that carry a mean per token for which there is an interval."""


@dataclass(frozen=True, slots=True)
class ConfidenceInterval:
    """A mean with its interval, in the units of the figure; NaN, and the whole range, before anything is known."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class MeanSequence:
    """A mean per token, Σx/Σn over requests, with an asymptotic interval for all looks together.

    moments: the second ones, about the means. cubes: Σ of x³, x²n, xn², n³.

    >>> sequence = MeanSequence()
    >>> for n in range(100):
    ...     sequence = sequence.update(2.0 + n % 3, 1.0)
    >>> interval = sequence.get()
    >>> round(interval.mean, 6), interval.low < 3.0 < interval.high
    (2.99, True)
    """

    moments: RatioEstimate = field(default_factory=RatioEstimate)
    cubes: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)

    def update(self, x: float, n: float) -> MeanSequence:
        """Returns the state with one more request: `x` its sum, finite; `n` ≥ 0 its tokens. Raises InvalidArgumentError
        otherwise."""
        return self.merge(MeanSequence(RatioEstimate().update(x, n), (x * x * x, x * x * n, x * n * n, n * n * n)))

    def merge(self, other: MeanSequence) -> MeanSequence:
        a, b = self.cubes, other.cubes
        cubes = (a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3])
        return MeanSequence(self.moments.merge(other.moments), cubes)

    def carried_by_few(self, inflation: float = 1.0) -> bool:
        """Returns if there is no interval because fewer than `MIN_CARRYING` effective requests carry the tokens.

        inflation: v̂, 1 or more.

        >>> sequence = MeanSequence()
        >>> for n in range(100):
        ...     sequence = sequence.update(n % 3, 1.0)
        >>> sequence.carried_by_few(), sequence.carried_by_few(10.0), sequence.update(30.0, 30.0).carried_by_few()
        (False, True, True)
        """
        m = self.moments
        if not m.requests or m.mean_n == 0.0:
            return False
        squares = m.nn + m.requests * m.mean_n**2
        return bool(_carrying(squares, self.cubes[3]) < MIN_CARRYING * inflation)

    def get(
        self, lo: float = -math.inf, hi: float = math.inf, alpha: float = 0.05, inflation: float = 1.0
    ) -> ConfidenceInterval:
        """Returns the mean with its interval, cut to lo … hi, the range that the figure has by its nature. inflation:
        v̂, 1 or more.

        Where all requests are the same their spread is 0 and no guide: then a share of requests of a kind not seen so
        far (exact, as `Proportion` of none) could be at either end of the range.
        """
        _check_alpha(alpha)
        m = self.moments
        if not m.requests or m.mean_n == 0.0:
            return ConfidenceInterval(math.nan, lo, hi)
        value = m.mean_x / m.mean_n
        below, above = reach(m.requests, m.mean_x, m.mean_n, m.xx, m.xn, m.nn, self.cubes, alpha, inflation)
        low, high = value - float(below), value + float(above)
        if high - low <= 1e-9 * max(1.0, abs(value)):
            missed = Proportion(0, int(m.requests / inflation)).get(alpha).high
            low, high = value - missed * (value - lo), value + missed * (hi - value)
        return ConfidenceInterval(value, max(low, lo), min(high, hi))


@dataclass(frozen=True, slots=True)
class ClippedMean:
    """Mean per token of a figure that is at least `lo`, its values clipped at `cap`, with an asymptotic interval.

    clipped: tokens above the cap, times the weights of their requests, rounded. Raises InvalidArgumentError unless lo <
    cap, both finite.

    >>> mean = ClippedMean(0.0, 5.0).update(np.array([1.0, 9.0, np.nan]))
    >>> mean.get().mean, mean.clipped
    (3.0, 1)
    """

    lo: float
    cap: float
    sequence: MeanSequence = field(default_factory=MeanSequence)
    clipped: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.lo) and math.isfinite(self.cap) and self.lo < self.cap):
            raise InvalidArgumentError(f"values from {self.lo} to {self.cap}: both must be finite, and increase")

    def update(self, values: Floats, weight: float = 1.0) -> ClippedMean:
        """Returns the state with one more request's tokens, [T]. NaN ("not available") is left out; a request with
        nothing else adds nothing. weight: the number of requests that it stands for, such as 1 / the probability with
        which it was sampled. Raises InvalidArgumentError if a value is below lo (by more than rounding).

        >>> mean = ClippedMean(0.0, 5.0).update(np.array([1.0])).update(np.array([4.0]), weight=2.0)
        >>> mean.get().mean, mean.tokens
        (3.0, 3)
        """
        values = values[~np.isnan(values)]
        if not len(values):
            return self
        if values.min() < self.lo - 1e-9 * (self.cap - self.lo):
            raise InvalidArgumentError(f"value {values.min()} is below {self.lo}")
        total = weight * float(np.clip(values, self.lo, self.cap).sum())
        clipped = self.clipped + round(weight * int((values > self.cap).sum()))
        return ClippedMean(self.lo, self.cap, self.sequence.update(total, weight * len(values)), clipped)

    def merge(self, other: ClippedMean) -> ClippedMean:
        """Returns the mean of the requests of both. Raises InvalidArgumentError if the ranges differ."""
        if (self.lo, self.cap) != (other.lo, other.cap):
            raise InvalidArgumentError(f"ranges differ: {self.lo} to {self.cap}, {other.lo} to {other.cap}")
        return ClippedMean(self.lo, self.cap, self.sequence.merge(other.sequence), self.clipped + other.clipped)

    @property
    def requests(self) -> int:
        return self.sequence.moments.requests

    @property
    def tokens(self) -> int:
        return round(self.sequence.moments.mean_n * self.requests)

    def get(self, alpha: float = 0.05, inflation: float = 1.0) -> ConfidenceInterval:
        """Returns the mean of the clipped values with its asymptotic interval of 1 − alpha for all looks together."""
        return self.sequence.get(self.lo, self.cap, alpha, inflation)


@dataclass(frozen=True, slots=True)
class Proportion:
    """The share of requests with some property, with an interval valid at every look.

    >>> share = Proportion()
    >>> for hit in (True, False, True, True):
    ...     share = share.update(hit)
    >>> interval = share.get()
    >>> interval.mean, round(interval.low, 3), round(interval.high, 3)
    (0.75, 0.131, 0.998)
    """

    hits: int = 0
    requests: int = 0

    def update(self, hit: bool) -> Proportion:
        """Returns the proportion with one more request."""
        return Proportion(self.hits + int(hit), self.requests + 1)

    def merge(self, other: Proportion) -> Proportion:
        return Proportion(self.hits + other.hits, self.requests + other.requests)

    def get(self, alpha: float = 0.05, inflation: float = 1.0) -> ConfidenceInterval:
        """Returns the share with an interval that is valid at every look with a probability of at least 1 − alpha,
        exactly: no approximation is involved. inflation: v̂, 1 or more: asymptotic where it is above 1, the whole range
        where it is infinite.

        >>> runs_of_ten = Proportion(40, 400)
        >>> interval = runs_of_ten.get(inflation=10.0)
        >>> interval.mean, (round(interval.low, 2), round(interval.high, 2)), round(runs_of_ten.get().high, 2)
        (0.1, (0.01, 0.31), 0.16)
        """
        _check_alpha(alpha)
        if not self.requests:
            return ConfidenceInterval(math.nan, 0.0, 1.0)
        share = self.hits / self.requests
        if math.isinf(inflation):
            return ConfidenceInterval(share, 0.0, 1.0)
        hits, misses = self.hits / inflation, (self.requests - self.hits) / inflation
        ends = (_proportion_end(hits, misses, outside, share, alpha) for outside in (0.0, 1.0))
        return ConfidenceInterval(share, *ends)


def _proportion_end(hits: float, misses: float, outside: float, inside: float, alpha: float) -> float:
    """Returns the p between `outside`, which is refuted, and `inside` where the evidence against it falls to
    1/alpha."""
    if _log_proportion(hits, misses, outside) < -math.log(alpha):
        return outside
    for _ in range(60):
        middle = 0.5 * (outside + inside)
        if _log_proportion(hits, misses, middle) < -math.log(alpha):
            inside = middle
        else:
            outside = middle
    return outside


def _log_proportion(hits: float, misses: float, p: float) -> float:
    if (p <= 0.0 and hits) or (p >= 1.0 and misses):
        return math.inf
    mixture = math.lgamma(hits + 0.5) + math.lgamma(misses + 0.5) - math.lgamma(hits + misses + 1.0)
    likelihood = (hits * math.log(p) if hits else 0.0) + (misses * math.log1p(-p) if misses else 0.0)
    return mixture - math.log(math.pi) - likelihood


def difference(a: MeanSequence, b: MeanSequence, alpha: float = 0.05, inflation: float = 1.0) -> ConfidenceInterval:
    """Returns the mean of a minus the mean of b, two arms to which requests are assigned at random: asymptotic, for all
    looks. inflation: v̂ of the arms, the larger one.

    NaN and the whole range while either arm has fewer than `MIN_REQUESTS` requests. Raises InvalidArgumentError unless
    0 < alpha < 1. If few requests carry the tokens of an arm (`MeanSequence.carried_by_few`, with v̂ of that arm), the
    interval is not to be believed: the caller checks it.

    >>> a = b = MeanSequence()
    >>> for n in range(100):
    ...     a, b = a.update(2.0 + n % 3, 1.0), b.update(1.0 + n % 3, 1.0)
    >>> interval = difference(a, b)
    >>> round(interval.mean, 6), interval.low > 0.0
    (1.0, True)
    """
    _check_alpha(alpha)
    if min(a.moments.requests, b.moments.requests) < MIN_REQUESTS or 0.0 in (a.moments.mean_n, b.moments.mean_n):
        return ConfidenceInterval(math.nan, -math.inf, math.inf)
    value = a.moments.mean_x / a.moments.mean_n - b.moments.mean_x / b.moments.mean_n
    if math.isinf(inflation):
        return ConfidenceInterval(value, -math.inf, math.inf)
    t = a.moments.requests + b.moments.requests
    second = third = 0.0
    for arm, sign in ((a, 1.0), (b, -1.0)):
        m = arm.moments
        _, square, cube = _residual(m.requests, m.mean_x, m.mean_n, m.xx, m.xn, m.nn, arm.cubes)
        second += float(square) / (m.mean_n * m.requests) ** 2
        third += sign * float(cube) / (m.mean_n * m.requests) ** 3
    below, above = (math.sqrt(second * float(_kappa(t, alpha, skew, inflation))) for skew in _skews(second, third))
    return ConfidenceInterval(value, value - below, value + above)


def reach(
    requests: npt.ArrayLike,
    mean_x: npt.ArrayLike,
    mean_n: npt.ArrayLike,
    xx: npt.ArrayLike,
    xn: npt.ArrayLike,
    nn: npt.ArrayLike,
    cubes: Sequence[npt.ArrayLike],
    alpha: float,
    inflation: npt.ArrayLike = 1.0,
) -> tuple[Floats, Floats]:
    """Returns how far the interval extends below and above the ratio. Both are at least 0, and infinite if nothing is
    refuted yet, or too few requests carry the tokens.

    Moments as in `MeanSequence`, and v̂, of any one shape; mean_n above 0. With d = m − ratio, E the residual
    x − ratio·n and N = Σn, the inequality is d² (N² − κ Σn²) + 2κ d Σ n E − κ Σ E² ≤ 0.

    >>> below, above = reach(400, 2.0, 1.0, 100.0, 0.0, 0.0, [3600.0, 1300.0, 800.0, 400.0], alpha=0.05)
    >>> bool(0.0 < below < above < 1.0)
    True
    """
    t, mean_n = np.asarray(requests, np.float64), np.asarray(mean_n, np.float64)
    known = np.isfinite(inflation)
    v = np.where(known, inflation, 1.0)
    known = known & (_carrying(nn + t * mean_n**2, cubes[3]) >= MIN_CARRYING * v)
    cross, square, cube = _residual(t, mean_x, mean_n, xx, xn, nn, cubes)
    ends = []
    for sign, skew in zip((1.0, -1.0), _skews(square, cube), strict=True):
        kappa = _kappa(t, alpha, skew, v)
        lead = (t * mean_n) ** 2 - kappa * (nn + t * mean_n**2)
        bounded = (lead > 0.0) & (t > 1) & known
        safe = np.where(bounded, lead, 1.0)
        end = (np.sqrt((kappa * cross) ** 2 + safe * kappa * square) + sign * kappa * cross) / safe
        ends.append(np.where(bounded, end, np.inf))
    return ends[0], ends[1]


def _carrying(squares: npt.ArrayLike, cubes: npt.ArrayLike) -> Floats:
    """Returns how many requests carry a sum of weights above 0, from Σ of their squares and of their cubes."""
    result: Floats = np.asarray(squares, np.float64) ** 3 / np.asarray(cubes, np.float64) ** 2
    return result


def _residual(
    t: npt.ArrayLike,
    mean_x: npt.ArrayLike,
    mean_n: npt.ArrayLike,
    xx: npt.ArrayLike,
    xn: npt.ArrayLike,
    nn: npt.ArrayLike,
    cubes: Sequence[npt.ArrayLike],
) -> tuple[Floats, Floats, Floats]:
    """Returns Σ n E, Σ E², Σ E³ of the residual E = x − ratio·n, whose mean is 0."""
    ratio = np.asarray(mean_x, np.float64) / np.asarray(mean_n, np.float64)
    xx, xn, nn = (np.asarray(moment, np.float64) for moment in (xx, xn, nn))
    xxx, xxn, xnn, nnn = (np.asarray(moment, np.float64) for moment in cubes)
    square = np.maximum(xx - 2.0 * ratio * xn + ratio**2 * nn, 0.0)
    cube = xxx - 3.0 * ratio * xxn + 3.0 * ratio**2 * xnn - ratio**3 * nnn
    return xn - ratio * nn, square, cube


def _skews(square: Floats | float, cube: Floats | float) -> tuple[Floats, Floats]:
    """Returns ΣE³/(ΣE²)^1.5 as far as it widens the lower and the upper side, each ≥ 0."""
    positive = np.asarray(square) > 0.0
    skew = np.where(positive, cube, 0.0) / np.where(positive, square, 1.0) ** 1.5
    return np.maximum(-skew, 0.0), np.maximum(skew, 0.0)


def _kappa(t: npt.ArrayLike, alpha: float, skew: npt.ArrayLike, inflation: npt.ArrayLike = 1.0) -> Floats:
    v = np.asarray(inflation, np.float64)
    odds = -2.0 * math.log(alpha)
    scaled: Floats = np.asarray(t, np.float64) / v * ((odds + math.log(odds + 1.0)) / NARROWEST_AT)
    kappa: Floats = 2.0 * (scaled + 1.0) / scaled * (0.5 * np.log1p(scaled) - math.log(alpha))
    widened: Floats = v * kappa * (1.0 + np.sqrt(kappa * v) * np.asarray(skew, np.float64))
    return widened


def _check_alpha(alpha: float) -> None:
    if not 0.0 < alpha < 1.0:
        raise InvalidArgumentError(f"alpha is {alpha}: it must be between 0 and 1")
