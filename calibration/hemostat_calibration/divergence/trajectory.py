"""The length over which two models generate the same text: survival, half-life, length of the common prefix.

A request contributes f_t in [0, 1], its factor at output token t = 1, 2, …: the probability that the models
still agree after token t if they did before. The caller chooses the factors (r the reference, c the compressed model,
x the token that was emitted):

1 − TV_t
    The probability that r and c, coupled as well as possible at one token, draw the same token. Along texts sampled
    from c the survival is then the mean of Π (1 − TV_t). From a *lower* bound of TV it is an *upper* bound, and vice
    versa: use one `Survival` for each end of the interval.
min(1, r(x_t)/c(x_t)) (`agreement`)
    The probability that the coupling keeps the emitted token. For text drawn from c at temperature 1,
    E_c[Π_{s ≤ t} min(1, r/c)] = Σ_x Π_{s ≤ t} min(r, c) is exactly the probability that two texts, coupled token by
    token as well as possible, are equal up to t (Lindvall, Lectures on the Coupling Method, 1992, ch. I.5): no list is
    cut, no bound is needed, only the emitted token's two log-probabilities. A mean of Π (1 − TV_t) also counts what
    comes after tokens that the coupling would have dropped.
1 where both have the same likeliest token, else 0
    Along *greedy* text of c the first 0 is where the reference's own greedy text diverges: before it both texts are the
    same. The survival is the share of requests whose greedy texts are still equal, its sum over t the expected
    length of their common prefix. (Along sampled text it is only what agreement at that rate would give.)

Requests end at different lengths. W_t = Π_{s ≤ t} f_s; a request that ends before t is no evidence about t (right
censoring). So each step is a ratio over the requests that reached it, and
    S(t) = Π_{s ≤ t} Σ_i W_{i,s} / Σ_i W_{i,s−1},      i over the requests with at least s tokens,
the Kaplan–Meier product-limit estimator (1958) with W for the number of survivors; where all are equally long it is the
mean of W_t. It assumes that whether a request ends at s is independent of how its models agree from there on; it
is about texts that are still being generated at t, and ends at the longest request.

The unit is the request. log S is a sum of ratios; with A_s and B_s the two sums, request i's part in it is
ψ_i(t) = Σ_s (W_{i,s}/A_s − W_{i,s−1}/B_s) over the steps that it reached, and the variance of log S is
m/(m − 1) Σ_i ψ_i² over m requests. Intervals are Student's on the scale log(−log S), which keeps them between 0 and 1;
while nothing at all was lost in m requests, S is at least 0.025^(1/m) with the same confidence, since E[W] ≥ P(W = 1).
They are valid for one look at a fixed time. Of requests that depend on each other, variances are v̂ times as large, and
m/v̂ requests are effective.

Constant memory: W is kept at `POSITIONS` only, every token up to 16, then at growing distances; second moments of these
numbers give all variances, and everything merges by addition.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from hemostat_calibration.arrays import Floats
from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.records import TokenRecord
from hemostat_calibration.statistics.streaming import student_975

POSITIONS = (*range(1, 17), *(round(16 * 2 ** (k / 4)) for k in range(1, 33)))
"""The output tokens after which the survival is kept: 1 to 16, then four to an octave, to 4096."""

_COUNT = len(POSITIONS)
_AT: npt.NDArray[np.int64] = np.array(POSITIONS, dtype=np.int64)


def agreement(record: TokenRecord) -> Floats:
    """Returns min(1, r(x)/c(x)) of the emitted tokens, float64 [T].

    >>> from hemostat_calibration.records import Candidates
    >>> ids, log_c, log_r = np.array([[0, 1, 2]], np.int32), np.log([[0.7, 0.2, 0.1]]), np.log([[0.5, 0.4, 0.1]])
    >>> record = TokenRecord(
    ...     3, b"", ids[0, :1], Candidates(ids, log_c), log_r, Candidates(ids, log_r), log_c[:, 0], log_r[:, 0]
    ... )
    >>> agreement(record).round(6).tolist()
    [0.714286]
    """
    probabilities: Floats = np.exp(np.minimum(record.reference_emitted - record.compressed_emitted, 0.0))
    return probabilities


@dataclass(frozen=True, slots=True)
class SurvivalCurve:
    """The value of a `Survival`; only the positions that some request reached.

    positions: int [P]. survival, low, high: float64 [P], S and its 95 % interval at each position. at_risk: int [P],
    requests that reached it.
    half_life: tokens until S is ½, interpolated; infinite while S stays above ½ as far as there are data.
    half_life_low, half_life_high: where the interval's two ends cross ½: infinite likewise.
    prefix: Σ_{t=1}^{horizon} S(t), the expected number of tokens that are equal from the start, of the first `horizon`
    ones; S is interpolated between positions. prefix_low, prefix_high: its 95 % interval.
    """

    positions: npt.NDArray[np.int64]
    survival: Floats
    low: Floats
    high: Floats
    at_risk: npt.NDArray[np.int64]
    half_life: float
    half_life_low: float
    half_life_high: float
    horizon: int
    prefix: float
    prefix_low: float
    prefix_high: float
    requests: int


@dataclass(frozen=True, slots=True)
class Survival:
    """Streaming estimator of the survival curve: `update` with a request, `merge` two streams, `get` the curve.

    at_risk: int [P], requests by the positions that they reached.
    sums: float64 [2, P], of W at each position that a request reached, and of W at the position before.
    moments: float64 [2, P, 2, P], of their products, as far as one request reached both positions.

    >>> survival = Survival().update(np.array([1.0, 0.5])).update(np.array([1.0, 1.0, 0.5]))
    >>> curve = survival.get()
    >>> curve.positions.tolist(), curve.survival.round(6).tolist(), curve.at_risk.tolist()
    ([1, 2, 3], [1.0, 0.75, 0.375], [2, 2, 1])
    """

    requests: int = 0
    at_risk: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(_COUNT, dtype=np.int64))
    sums: Floats = field(default_factory=lambda: np.zeros((2, _COUNT)))
    moments: Floats = field(default_factory=lambda: np.zeros((2, _COUNT, 2, _COUNT)))

    def update(self, factors: npt.NDArray[np.floating]) -> Survival:
        """Returns the state with one more request: its factors f_t, [T], T ≥ 1. Raises InvalidArgumentError unless all
        are between 0 and 1."""
        if factors.ndim != 1 or not len(factors) or not ((factors >= 0.0) & (factors <= 1.0)).all():
            raise InvalidArgumentError("factors must be one request's, [T], each between 0 and 1, at least one")
        reached = int(np.searchsorted(_AT, len(factors), side="right"))
        alive = np.cumprod(factors, dtype=np.float64)[_AT[:reached] - 1]
        values = np.array([alive, [1.0, *alive[:-1]]])
        at_risk, sums, moments = self.at_risk.copy(), self.sums.copy(), self.moments.copy()
        at_risk[:reached] += 1
        sums[:, :reached] += values
        moments[:, :reached, :, :reached] += np.multiply.outer(values, values)
        return Survival(self.requests + 1, at_risk, sums, moments)

    def merge(self, other: Survival) -> Survival:
        return Survival(
            requests=self.requests + other.requests,
            at_risk=self.at_risk + other.at_risk,
            sums=self.sums + other.sums,
            moments=self.moments + other.moments,
        )

    def get(self, horizon: int | None = None, inflation: float = 1.0) -> SurvivalCurve:
        """Returns the curve up to now.

        horizon: the number of tokens that `prefix` counts; with None, or a larger number than there are data, all data
        count. inflation: v̂ of the requests (`statistics.dependence`), finite, 1 or more: intervals are as wide as with
        the effective requests alone. Raises InvalidArgumentError if a value is too small.
        """
        if horizon is not None and horizon < 1:
            raise InvalidArgumentError(f"horizon is {horizon}: it must be at least 1 token")
        reached = int((self.at_risk > 0).sum())
        positions, at_risk = _AT[:reached], self.at_risk[:reached]
        after, before = self.sums[:, :reached]
        # Once no request survives the product is 0 from there on.
        steps = np.divide(after, before, out=np.zeros(reached), where=before > 0.0)
        survival = np.cumprod(steps)
        parts = _parts(after, before)
        moments = self.moments[:, :reached, :, :reached].reshape(2 * reached, 2 * reached)
        variance = inflation * np.maximum(((parts @ moments) * parts).sum(axis=1), 0.0)
        low, high = _interval(survival, variance, at_risk / inflation)
        end = int(positions[-1]) if reached else 0
        horizon = min(horizon or end, end)
        weights = _weights(positions, horizon)
        prefix = float(weights[0] + weights[1:] @ survival)
        spread = (weights[1:] * survival) @ parts
        half = _half_width(inflation * float(spread @ moments @ spread), self.requests / inflation)
        return SurvivalCurve(
            positions=positions,
            survival=survival,
            low=low,
            high=high,
            at_risk=at_risk,
            half_life=_half_life(positions, survival),
            half_life_low=_half_life(positions, low),
            half_life_high=_half_life(positions, high),
            horizon=horizon,
            prefix=prefix if reached else math.nan,
            prefix_low=max(prefix - half, 0.0),
            prefix_high=min(prefix + half, float(horizon)) if reached else math.inf,
            requests=self.requests,
        )


def _parts(after: Floats, before: Floats) -> Floats:
    """Returns a matrix, [P, 2P]: row t times a request's values is ψ(t)."""
    steps = np.tri(len(after))
    one_by_after = np.divide(1.0, after, out=np.zeros_like(after), where=after > 0.0)
    one_by_before = np.divide(1.0, before, out=np.zeros_like(before), where=before > 0.0)
    return np.concatenate([steps * one_by_after, -steps * one_by_before], axis=1)


def _half_width(variance: float, requests: float) -> float:
    """Returns the half width of an interval. requests: effective ones."""
    if requests < 2.0:
        return math.inf
    return student_975(int(requests) - 1) * math.sqrt(max(variance, 0.0) * requests / (requests - 1.0))


def _interval(survival: Floats, variance: Floats, at_risk: Floats) -> tuple[Floats, Floats]:
    """Returns the interval of the survival. at_risk: effective requests."""
    low, high = np.zeros_like(survival), np.ones_like(survival)
    for t, (s, v, m) in enumerate(zip(survival.tolist(), variance.tolist(), at_risk.tolist(), strict=True)):
        if m < 2:
            continue
        if s >= 1.0:
            low[t] = 0.025 ** (1.0 / m)
        elif s <= 0.0:
            high[t] = 1.0 - 0.025 ** (1.0 / m)
        else:
            stretch = math.exp(min(_half_width(v, m) / -math.log(s), 50.0))
            low[t], high[t] = s**stretch, s ** (1.0 / stretch)
    return low, high


def _weights(positions: npt.NDArray[np.int64], horizon: int) -> Floats:
    """Returns [1 + P]: what Σ_{t=1}^{horizon} S(t) is made of, S(0) = 1 and the S at the positions, linear between
    them."""
    knots = np.concatenate([[0], positions])
    tokens = np.arange(1, horizon + 1)
    right = np.searchsorted(knots, tokens)
    share = (tokens - knots[right - 1]) / (knots[right] - knots[right - 1]) if horizon else np.zeros(0)
    weights: Floats = np.bincount(right, share, len(knots)).astype(np.float64)
    weights += np.bincount(right - 1, 1.0 - share, len(knots))
    return weights


def _half_life(positions: npt.NDArray[np.int64], survival: Floats) -> float:
    below = np.flatnonzero(survival <= 0.5)
    if not len(below):
        return math.inf
    t = int(below[0])
    left, s_left = (int(positions[t - 1]), float(survival[t - 1])) if t else (0, 1.0)
    right, s_right = int(positions[t]), float(survival[t])
    return left + (right - left) * (s_left - 0.5) / (s_left - s_right)
