"""Estimators in constant memory: `update` gives a new one, `merge` joins the estimators of two streams, `get` reads.

All are frozen values: an update never changes its input. Merging is associative and commutative up to
rounding, and equals one estimator that saw everything.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hemostat_calibration.errors import InvalidArgumentError

_STUDENT_975 = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
    *(2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423),
)


def student_975(degrees: int) -> float:
    """Returns the 97.5 % quantile of Student's t; beyond 30 degrees by its expansion around the normal, correct to 4
    decimals.

    >>> student_975(10), round(student_975(1000), 4)
    (2.2281, 1.9623)
    """
    if degrees <= len(_STUDENT_975):
        return _STUDENT_975[degrees - 1]
    z = 1.959963984540054
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


@dataclass(frozen=True, slots=True)
class Ratio:
    """The values that `RatioEstimate.get` returns.

    mean: Σx/Σn in the units of x; NaN before anything was seen. low, high: its 95 % interval; ∓infinity with fewer than
    two requests, whose spread is not known.
    """

    mean: float
    low: float
    high: float
    requests: int
    tokens: float


@dataclass(frozen=True, slots=True)
class RatioEstimate:
    """The mean per token, with an interval that counts requests, since tokens of one request are correlated.

    Each request adds (x, n): the sum of a figure over its tokens and their number. The mean is Σx/Σn; its variance is
    taken from the linearised ratio: m/(m−1) Σ(x − mean·n)² / (Σn)² over m requests (Cochran, Sampling Techniques, 1977,
    ch. 6), and the interval Student's with m − 1 degrees. It is valid for one look at a fixed time; for repeated looks
    see `confidence`. Moments are kept about their means (Chan, Golub, LeVeque 1983), so that nothing cancels.

    requests: m. mean_x, mean_n: means over requests. xx, xn, nn: sums of products about the means.

    >>> estimate = RatioEstimate().update(4.0, 2.0).update(9.0, 3.0)
    >>> ratio = estimate.get()
    >>> round(ratio.mean, 6), ratio.low < ratio.mean < ratio.high
    (2.6, True)
    """

    requests: int = 0
    mean_x: float = 0.0
    mean_n: float = 0.0
    xx: float = 0.0
    xn: float = 0.0
    nn: float = 0.0

    def update(self, x: float, n: float) -> RatioEstimate:
        """Returns the estimate with one more request: `x` is its sum, finite; `n` ≥ 0 is its number of tokens. Raises
        InvalidArgumentError otherwise.
        """
        if not (math.isfinite(x) and math.isfinite(n) and n >= 0.0):
            raise InvalidArgumentError(f"a request adds x={x}, n={n}: both must be finite, n not negative")
        return self.merge(RatioEstimate(1, float(x), float(n)))

    def merge(self, other: RatioEstimate) -> RatioEstimate:
        requests = self.requests + other.requests
        if requests == 0:
            return self
        dx, dn = other.mean_x - self.mean_x, other.mean_n - self.mean_n
        share = other.requests / requests
        between = self.requests * share
        return RatioEstimate(
            requests=requests,
            mean_x=self.mean_x + dx * share,
            mean_n=self.mean_n + dn * share,
            xx=self.xx + other.xx + dx * dx * between,
            xn=self.xn + other.xn + dx * dn * between,
            nn=self.nn + other.nn + dn * dn * between,
        )

    def get(self) -> Ratio:
        tokens = self.mean_n * self.requests
        if tokens == 0.0:
            return Ratio(math.nan, -math.inf, math.inf, self.requests, 0.0)
        mean = self.mean_x / self.mean_n
        if self.requests < 2:
            return Ratio(mean, -math.inf, math.inf, self.requests, tokens)
        residual = max(self.xx - 2.0 * mean * self.xn + mean * mean * self.nn, 0.0)
        deviation = math.sqrt(residual * self.requests / (self.requests - 1)) / tokens
        half = student_975(self.requests - 1) * deviation
        return Ratio(mean, mean - half, mean + half, self.requests, tokens)


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts by bucket, as Prometheus has them: bucket i holds edges[i−1] < value ≤ edges[i], the last one the rest.

    edges: increasing, or InvalidArgumentError.
    counts: int, one more than edges, not cumulative.
    total: sum of the finite values; an infinite one is counted in its bucket only. NaN ("not available") is left out.

    >>> Histogram((0.0, 1.0)).update(np.array([0.5, 1.0, 7.0, np.nan])).get()
    (0, 2, 1)
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...] = ()
    total: float = 0.0

    def __post_init__(self) -> None:
        if not self.edges or any(a >= b for a, b in zip(self.edges, self.edges[1:], strict=False)):
            raise InvalidArgumentError(f"edges is {self.edges}: it must increase")
        if not self.counts:
            object.__setattr__(self, "counts", (0,) * (len(self.edges) + 1))
        if len(self.counts) != len(self.edges) + 1:
            raise InvalidArgumentError(f"counts has {len(self.counts)} buckets: {len(self.edges) + 1} are needed")

    def update(self, values: npt.NDArray[np.float64]) -> Histogram:
        """Returns the histogram with these values added, which may be of any shape."""
        values = values[~np.isnan(values)]
        buckets = np.searchsorted(self.edges, values.ravel(), side="left")
        added = np.bincount(buckets, minlength=len(self.counts))
        return Histogram(
            edges=self.edges,
            counts=tuple(int(a) + int(b) for a, b in zip(self.counts, added, strict=True)),
            total=self.total + float(values[np.isfinite(values)].sum()),
        )

    def merge(self, other: Histogram) -> Histogram:
        """Returns the histogram of the values of both. Raises InvalidArgumentError if the edges differ."""
        if self.edges != other.edges:
            raise InvalidArgumentError(f"edges differ: {self.edges} and {other.edges}")
        counts = tuple(a + b for a, b in zip(self.counts, other.counts, strict=True))
        return Histogram(self.edges, counts, self.total + other.total)

    def get(self) -> tuple[int, ...]:
        return self.counts
