"""Betting against "nothing is wrong": the wealth of several strategies, funded anew with every request.

A strategy multiplies its wealth by factors whose expected value, given the past, is at most 1 under the null
hypothesis. Then the sum over all strategies reaches 1/α with a probability of at most α (Ville's inequality), however
often one looks (Shafer, "Testing by betting", 2021; Waudby-Smith & Ramdas, "Estimating means of bounded random
variables by betting", 2024). Wealth that was lost before something went wrong would delay the alarm, so strategies are
funded anew: of the whole, 1, the k-th effective request gets 1/(k(k+1)), the rest is held back. That costs 2 log k of
evidence, whenever the change begins. (A request is 1/v̂ effective ones, see `statistics.dependence`.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from hemostat_calibration.arrays import Floats

BET_FRACTIONS = (0.9, 0.6, 0.3, 0.1, 0.03)
"""Parts of the wealth that strategies of the budget test stake."""


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
    """Wealth of S strategies, before the next request is funded.

    log_wealth: float64 [S], natural logarithms.
    since: float64 [S]; first_request, first_token: int64 [S]: time, and the numbers of requests and tokens seen before,
        when the larger part of each strategy's wealth was funded.
    requests, tokens: seen so far. effective: of the requests. funded: how often.
    """

    log_wealth: Floats
    since: Floats
    first_request: npt.NDArray[np.int64]
    first_token: npt.NDArray[np.int64]
    requests: int = 0
    tokens: int = 0
    effective: float = 0.0
    funded: int = 0

    @property
    def log_evidence(self) -> float:
        """ln of the whole wealth, what is held back included; 0 before the first request."""
        if not self.requests:
            return 0.0
        held_back = -math.log(self.funded + 1.0)
        return float(np.logaddexp(log_sum_exp(self.log_wealth[:, None])[0], held_back))

    def crossing(self, at: float, log_wealth: float) -> Crossing:
        """The evidence of an alarm now. at: seconds. log_wealth: of all strategies, what is held back included."""
        best = int(self.log_wealth.argmax())
        return Crossing(
            since=float(self.since[best]),
            at=at,
            requests=self.requests - int(self.first_request[best]),
            tokens=self.tokens - int(self.first_token[best]),
            log_wealth=log_wealth,
        )


def equal_weights(strategies: int) -> Floats:
    """ln of 1/S for each of S strategies.

    >>> equal_weights(1).tolist()
    [0.0]
    """
    return np.full(strategies, -math.log(strategies)) + 0.0


def initial_wealth(strategies: int) -> WealthState:
    """Of S strategies, before the first request.

    >>> initial_wealth(2).log_wealth.tolist()
    [-inf, -inf]
    """
    nothing = np.zeros(strategies, np.int64)
    return WealthState(np.full(strategies, -np.inf), np.full(strategies, np.nan), nothing, nothing)


def bet(
    wealth: WealthState,
    log_factors: Floats,
    log_weights: Floats,
    tokens: int,
    now: float,
    log_target: float,
    inflation: float = 1.0,
) -> tuple[WealthState, Crossing | None]:
    """The wealth after one request, and a `Crossing` if the wealth reached the threshold, else None.

    log_factors: float64 [S], ln of each strategy's factor. log_weights: float64 [S], ln of the part that each gets of
    what is funded; the parts sum to 1. tokens: of the request. now: its time, seconds. log_target: ln of the threshold.
    inflation: v̂, by which log_factors are divided already.

    >>> wealth = initial_wealth(1)
    >>> for now in range(8):
    ...     wealth, crossing = bet(wealth, np.log([2.0]), np.zeros(1), tokens=10, now=now, log_target=4.0)
    >>> crossing.since, crossing.requests, crossing.tokens
    (0.0, 8, 80)
    """
    if wealth.effective >= wealth.funded:
        k = wealth.funded + 1
        wealth = replace(fund(wealth, log_weights - math.log(k * (k + 1.0)), now), funded=k)
    moved = multiply(wealth, log_factors, tokens)
    moved = replace(moved, effective=moved.effective + 1.0 / inflation)
    return moved, None if moved.log_evidence < log_target else moved.crossing(now, moved.log_evidence)


def fund(wealth: WealthState, log_amounts: Floats, now: float) -> WealthState:
    """Add to what each strategy has. log_amounts: float64 [S], natural logarithms. now: seconds.

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
    """One more request. log_factors: float64 [S], ln of each strategy's factor. tokens: of the request.

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
    """ln Σ exp over the first axis, [S, ...] -> [...].

    >>> log_sum_exp(np.log([[1.0], [3.0]])).round(6).tolist()
    [1.386294]
    """
    top = values.max(axis=0)
    total: Floats = top + np.log(np.exp(values - top).sum(axis=0))
    return total
