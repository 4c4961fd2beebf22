"""Betting against "nothing is wrong": the wealth of several strategies, funded anew with every request.

A strategy multiplies its wealth by factors whose expected value, given the past, is at most 1 under the null
hypothesis. Then the sum over all strategies reaches 1/α with a probability of at most α times what they were funded
with (Ville's inequality), however often one looks (Shafer, "Testing by betting", 2021; Waudby-Smith & Ramdas,
"Estimating means of bounded random variables by betting", 2024). Wealth that was lost before something went wrong would
delay the alarm, so strategies are funded anew with every effective request. (A request is 1/v̂ effective ones, see
`statistics.dependence`.) The amounts are `FIRST` for the beginning, of which the k-th effective request gets
1/(k(k+1)), and 1 − `FIRST` for each week, in proportion to the time that has passed. So within m weeks, m ≥ 1, they are
m or less: **a false alarm within m weeks has a probability of at most m α**. A change costs the same evidence whenever
it begins: the logarithm of the number of effective requests in a week. (Shin, Ramdas & Rinaldo, "E-detectors", New
England Journal of Statistics in Data Science 2024: the sum is theirs of the Shiryaev-Roberts type. Amounts that decay,
so that one probability holds for ever, cost twice that logarithm of the whole time: at v = 25 a doubled spread took two
and a half times as many requests after a quiet week as at once.)

Where a factor depends on something that is known within limits only, wealth has *levels*: it is kept for several values
of what is not known, one for each row, and of a strategy the least counts. See `baseline`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from hemostat_calibration.arrays import Floats
from hemostat_calibration.elapsed import TimeBreak, elapsed

WEEK = 7 * 86_400.0
FIRST = 0.25
"""The part of what is funded in the first week that is for its beginning."""

MAX_FUNDED_SECONDS = 86_400.0
"""The longest time since the last funding that is funded: a clock that is set is no evidence."""

BET_FRACTIONS = (0.9, 0.6, 0.3, 0.1, 0.03)
"""The parts of the wealth that strategies of the budget test stake."""


@dataclass(frozen=True, slots=True)
class Crossing:
    """The evidence of an alarm: the wealth reached its threshold.

    since: time of the request with which the evidence began. at: time of the request that completed it.
    requests, tokens: from then until it was complete. log_wealth: natural logarithm; the threshold is ln(1/alpha).
    """

    since: float
    at: float
    requests: int
    tokens: int
    log_wealth: float


@dataclass(frozen=True, slots=True, eq=False)
class WealthState:
    """Wealth of S strategies, at each of J levels where there are any, before the next request is funded.

    log_wealth: float64 [S] or [J, S], natural logarithms.
    since: float64; first_request, first_token: int64, of the same shape: time, and the numbers of requests and tokens
        seen before, when the larger part of each strategy's wealth was funded.
    requests, tokens: seen so far. effective: of the requests. funded: how often. funded_at: time of the last one.
    """

    log_wealth: Floats
    since: Floats
    first_request: npt.NDArray[np.int64]
    first_token: npt.NDArray[np.int64]
    requests: int = 0
    tokens: int = 0
    effective: float = 0.0
    funded: int = 0
    funded_at: float = 0.0

    @property
    def log_evidence(self) -> float:
        """The natural logarithm of the whole wealth, of each strategy at its least level; 0 before the first
        request.
        """
        return float(log_sum_exp(self._least()[:, None])[0]) if self.requests else 0.0

    def emptied(self) -> WealthState:
        """Returns the state without wealth and evidence, whose funding goes on where it was: what a test of another
        hypothesis begins with, if it takes the place of this one at the same alpha.

        >>> wealth, _ = bet(initial_wealth(1), np.log([2.0]), np.zeros(1), tokens=10, now=0.0, log_target=3.5)
        >>> wealth.emptied().log_evidence, wealth.emptied().funded
        (0.0, 1)
        """
        fresh = initial_wealth(*self.log_wealth.shape)
        return replace(fresh, effective=float(self.funded), funded=self.funded, funded_at=self.funded_at)

    def after_break(self, time_break: TimeBreak) -> WealthState:
        """Returns the same after the time was set: the funding goes on as if nothing but known time had passed."""
        return replace(self, funded_at=time_break.seen(self.funded_at)) if self.funded else self

    def crossing(self, at: float, log_wealth: float) -> Crossing:
        """Returns the evidence of an alarm now. at: seconds. log_wealth: of all strategies."""
        best = int(self._least().argmax())
        # In rows, the position of this strategy at its least level.
        where = int(np.atleast_2d(self.log_wealth)[:, best].argmin()) * self.log_wealth.shape[-1] + best
        return Crossing(
            since=float(self.since.flat[where]),
            at=at,
            requests=self.requests - int(self.first_request.flat[where]),
            tokens=self.tokens - int(self.first_token.flat[where]),
            log_wealth=log_wealth,
        )

    def _least(self) -> Floats:
        """Returns the least log wealth over levels, [S]."""
        least: Floats = np.atleast_2d(self.log_wealth).min(axis=0)
        return least


def equal_weights(strategies: int) -> Floats:
    """Returns ln(1/S) for each of S strategies.

    >>> equal_weights(1).tolist()
    [0.0]
    """
    return np.full(strategies, -math.log(strategies)) + 0.0


def initial_wealth(*shape: int) -> WealthState:
    """Returns the wealth before the first request: of S strategies, or of J levels and S strategies.

    >>> initial_wealth(2).log_wealth.tolist()
    [-inf, -inf]
    """
    nothing = np.zeros(shape, np.int64)
    return WealthState(np.full(shape, -np.inf), np.full(shape, np.nan), nothing, nothing)


def bet(
    wealth: WealthState,
    log_factors: Floats,
    log_weights: Floats,
    tokens: int,
    now: float,
    log_target: float,
    inflation: float = 1.0,
) -> tuple[WealthState, Crossing | None]:
    """Returns the wealth after one request, and a `Crossing` if the wealth reached the threshold, else None.

    log_factors: float64 [S] or [J, S], ln of each strategy's factor. log_weights: of the same shape, ln of the part
    that each gets of what is funded. tokens: of the request. now: its time, seconds. log_target: ln of the threshold.
    inflation: v̂, by which log_factors are divided already.

    >>> wealth = initial_wealth(1)
    >>> for now in range(8):
    ...     wealth, crossing = bet(wealth, np.log([2.0]), np.zeros(1), tokens=10, now=now, log_target=3.5)
    >>> crossing.since, crossing.requests, crossing.tokens
    (0.0, 8, 80)
    """
    if wealth.effective >= wealth.funded:
        k = wealth.funded + 1
        passed = elapsed(wealth.funded_at, now, MAX_FUNDED_SECONDS) if wealth.funded else 0.0
        wealth = fund(wealth, log_weights + math.log(amount(k, passed)), now)
        wealth = replace(wealth, funded=k, funded_at=now)
    moved = multiply(wealth, log_factors, tokens)
    moved = replace(moved, effective=moved.effective + 1.0 / inflation)
    return moved, None if moved.log_evidence < log_target else moved.crossing(now, moved.log_evidence)


def amount(k: int, passed: float) -> float:
    """Returns the amount with which the k-th effective request is funded. passed: seconds since the one before.

    >>> amount(1, 0.0), round(sum(amount(k, 3600.0) for k in range(1, 169)), 2)
    (0.125, 1.0)
    """
    return FIRST / (k * (k + 1.0)) + (1.0 - FIRST) * passed / WEEK


def fund(wealth: WealthState, log_amounts: Floats, now: float) -> WealthState:
    """Returns the wealth with these amounts added to what each strategy has. log_amounts: float64, of its shape,
    natural logarithms. now: seconds.

    >>> fund(initial_wealth(1), np.log([0.5]), now=3.0).log_wealth.round(6).tolist()
    [-0.693147]
    """
    anew = log_amounts > wealth.log_wealth
    return replace(
        wealth,
        log_wealth=np.logaddexp(wealth.log_wealth, log_amounts),
        since=np.where(anew, now, wealth.since),
        first_request=np.where(anew, wealth.requests, wealth.first_request),
        first_token=np.where(anew, wealth.tokens, wealth.first_token),
    )


def multiply(wealth: WealthState, log_factors: Floats, tokens: int) -> WealthState:
    """Returns the wealth after one more request. log_factors: float64, of its shape, ln of each strategy's factor.
    tokens: of the request.

    >>> wealth = multiply(fund(initial_wealth(1), np.zeros(1), now=0.0), np.log([2.0]), tokens=10)
    >>> wealth.log_wealth.round(6).tolist(), wealth.requests, wealth.tokens
    ([0.693147], 1, 10)
    """
    return replace(
        wealth,
        log_wealth=wealth.log_wealth + log_factors,
        requests=wealth.requests + 1,
        tokens=wealth.tokens + tokens,
    )


def log_sum_exp(values: Floats) -> Floats:
    """Returns ln Σ exp over the first axis, [S, ...] -> [...].

    >>> log_sum_exp(np.log([[1.0], [3.0]])).round(6).tolist()
    [1.386294]
    """
    top = values.max(axis=0)
    total: Floats = top + np.log(np.exp(values - top).sum(axis=0))
    return total
