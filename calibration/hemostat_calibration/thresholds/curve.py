"""A figure by setting (bits, sparsity, layers), measured on requests that the settings share, and the first setting at
which it is above its noise floor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from hemostat_calibration.arrays import Bools, Floats
from hemostat_calibration.errors import InvalidArgumentError

ALPHA = 0.05
"""The probability that an interval misses, or that a two-sided test is wrong."""


@dataclass(frozen=True, slots=True)
class Curve:
    """The mean of a figure per token at each setting, Σx/Σn over requests.

    settings: float64 [L], strictly increasing: from the unchanged model to the most compressed one.
    sums: float64 [L, R], a request's sum of the figure over its tokens; NaN where that setting has not scored it.
    tokens: float64 [R], the request's tokens, above 0.

    >>> curve = Curve(np.array([0.0, 0.5]), np.array([[0.0, 1.0], [2.0, 6.0]]), np.array([1.0, 3.0]))
    >>> curve.means().tolist()
    [0.25, 2.0]
    """

    settings: Floats
    sums: Floats
    tokens: Floats

    def __post_init__(self) -> None:
        """Raises InvalidArgumentError."""
        if self.settings.ndim != 1 or not (np.diff(self.settings) > 0.0).all():
            raise InvalidArgumentError("settings must be [L] and strictly increasing")
        if self.sums.shape != (len(self.settings), len(self.tokens)) or np.isinf(self.sums).any():
            raise InvalidArgumentError(f"sums must be finite or NaN, [{len(self.settings)}, {len(self.tokens)}]")
        if not (self.tokens > 0.0).all():
            raise InvalidArgumentError("tokens must be above 0")
        if (self.measured.sum(axis=1) < 2).any():
            raise InvalidArgumentError("every setting needs at least two requests")

    @property
    def measured(self) -> Bools:
        """It is True where a request was measured at a setting, bool [L, R]."""
        return ~np.isnan(self.sums)

    def means(self, counts: Floats | None = None) -> Floats:
        """Returns the mean at each setting, float64 [L].

        counts: float64 [B, R], how often each request was drawn in each resample. With it the result is [B, L], NaN
        where no measured request was drawn.
        """
        weights = np.ones((1, len(self.tokens))) if counts is None else counts
        sums = weights @ np.nan_to_num(self.sums).T
        tokens = weights @ np.where(self.measured, self.tokens, 0.0).T
        means: Floats = np.divide(sums, tokens, out=np.full_like(sums, np.nan), where=tokens > 0.0)
        return means[0] if counts is None else means

    def contrast(self, weights: Floats, alpha: float) -> tuple[float, float, float]:
        """Returns Σ_k weights_k · mean_k, and its interval of level 1 − alpha.

        The requests are the units and are shared by the settings: request i contributes
        Σ_k weights_k (x_ik − mean_k n_i) / N_k to the linearised contrast (Cochran, Sampling Techniques, 1977, ch. 6).
        Student's t with the degrees of the setting with the fewest requests.
        """
        means, measured = self.means(), self.measured
        totals = np.where(measured, self.tokens, 0.0).sum(axis=1)
        parts = np.where(measured, self.sums - means[:, None] * self.tokens, 0.0) / totals[:, None]
        requests = int(measured[weights != 0.0].sum(axis=1).min())
        value = float(weights @ means)
        deviation = math.sqrt(requests / (requests - 1) * float(((weights @ parts) ** 2).sum()))
        half = student_quantile(alpha, requests - 1) * deviation
        return value, value - half, value + half


def student_quantile(alpha: float, degrees: int) -> float:
    """Returns the value that Student's |t| exceeds with probability `alpha` (Hill, Algorithm 396, CACM 13, 1970).

    >>> round(student_quantile(0.05, 10), 3), round(student_quantile(0.01, 3), 3), round(student_quantile(0.5, 2), 3)
    (2.228, 5.841, 0.816)
    """
    n = float(degrees)
    if degrees == 1:
        return 1.0 / math.tan(alpha * math.pi / 2.0)
    if degrees == 2:
        return math.sqrt(2.0 / (alpha * (2.0 - alpha)) - 2.0)
    a = 1.0 / (n - 0.5)
    b = 48.0 / a**2
    c = ((20700.0 * a / b - 98.0) * a - 16.0) * a + 96.36
    d = ((94.5 / (b + c) - 3.0) / b + 1.0) * math.sqrt(a * math.pi / 2.0) * n
    x = d * alpha
    y = x ** (2.0 / n)
    if y > 0.05 + a:
        x = NormalDist().inv_cdf(alpha / 2.0)
        y = x * x
        if n < 5.0:
            c += 0.3 * (n - 4.5) * (x + 0.6)
        c = (((0.05 * d * x - 5.0) * x - 7.0) * x - 2.0) * x + b + c
        y = (((((0.4 * y + 6.3) * y + 36.0) * y + 94.5) / c - y - 3.0) / b + 1.0) * x
        y = math.expm1(a * y * y)
    else:
        y = ((1.0 / (((n + 6.0) / (n * y) - 0.089 * d - 0.822) * (n + 2.0) * 3.0) + 0.5 / (n + 4.0)) * y - 1.0) * (
            n + 1.0
        ) / (n + 2.0) + 1.0 / y
    return math.sqrt(n * y)


def leaves_floor(excess: Curve) -> int | None:
    """Returns the index of the least setting whose mean excess over the noise floor is established; None: not even the
    last one's.

    Settings are tested from the most compressed one on, each at 2.5 % (one-sided), up to the first that is not
    established: with a fixed order no correction is needed for the probability that any setting at the floor is named
    (Maurer, Hothorn, Lehmacher 1995). It is the least setting where noise can be excluded, not the least with a loss.

    >>> sums = np.array([[-0.1, 0.2, 0.0], [1.0, 1.2, 1.4], [5.0, 6.0, 7.0]])
    >>> leaves_floor(Curve(np.array([1.0, 2.0, 3.0]), sums, np.ones(3)))
    1
    """
    first = None
    for k in range(len(excess.settings) - 1, -1, -1):
        weights = np.zeros(len(excess.settings))
        weights[k] = 1.0
        _, low, _ = excess.contrast(weights, ALPHA)
        if low <= 0.0:
            break
        first = k
    return first
