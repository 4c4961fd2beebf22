"""Betting against "nothing is wrong": the wealth of several strategies, funded anew with every request.

A strategy multiplies its wealth by factors whose expected value, given the past, is at most 1 under the null
hypothesis. Then the sum over all strategies reaches 1/α with a probability of at most α (Ville's inequality), however
often one looks (Shafer, "Testing by betting", 2021; Waudby-Smith & Ramdas, "Estimating means of bounded random
variables by betting", 2024). Wealth that was lost before something went wrong would delay the alarm, so strategies are
funded anew: of the whole, 1, the k-th request gets 1/(k(k+1)), the rest is held back. That costs 2 log k of evidence,
whenever the change begins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hemostat_calibration.arrays import Floats

BET_FRACTIONS = (0.9, 0.6, 0.3, 0.1, 0.03)
"""Parts of the wealth that strategies stake."""


@dataclass(frozen=True, slots=True)
class Crossing:
    """The evidence of an alarm: the wealth reached its threshold.

    since: time of the request with which the evidence began. at: time of the request that completed it.
    requests, tokens: from then until it was complete. log_wealth: natural logarithm; the threshold is ln(2/alpha).
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
    requests, tokens: seen so far.
    """

    log_wealth: Floats
    since: Floats
    first_request: npt.NDArray[np.int64]
    first_token: npt.NDArray[np.int64]
    requests: int = 0
    tokens: int = 0

    @property
    def log_evidence(self) -> float:
        """ln of the whole wealth, what is held back included; 0 before the first request."""
        if not self.requests:
            return 0.0
        held_back = -math.log(self.requests + 1.0)
        return float(np.logaddexp(log_sum_exp(self.log_wealth[:, None])[0], held_back))


def initial_wealth(strategies: int) -> WealthState:
    """Of S strategies, before the first request.

    >>> initial_wealth(2).log_wealth.tolist()
    [-inf, -inf]
    """
    nothing = np.zeros(strategies, np.int64)
    return WealthState(np.full(strategies, -np.inf), np.full(strategies, np.nan), nothing, nothing)


def bet(
    wealth: WealthState, log_factors: Floats, tokens: int, now: float, log_target: float
) -> tuple[WealthState, Crossing | None]:
    """The wealth after one request, and a `Crossing` if the wealth reached the threshold, else None.

    log_factors: float64 [S, steps], ln of each strategy's factors: one step for the whole request, or one for each of
        its tokens. tokens: of the request. now: its time, seconds. log_target: ln of the threshold.

    >>> wealth, crossing = bet(initial_wealth(1), np.log([[2.0] * 10]), tokens=10, now=0.0, log_target=math.log(100.0))
    >>> crossing.tokens, wealth.requests
    (8, 1)
    """
    k = wealth.requests + 1
    funded = -math.log(k * (k + 1.0) * len(wealth.log_wealth))
    anew = funded > wealth.log_wealth
    since = np.where(anew, now, wealth.since)
    first_request = np.where(anew, wealth.requests, wealth.first_request)
    first_token = np.where(anew, wealth.tokens, wealth.first_token)
    path = np.logaddexp(wealth.log_wealth, funded)[:, None] + log_factors.cumsum(axis=1)
    whole = np.logaddexp(log_sum_exp(path), -math.log(k + 1.0))
    moved = WealthState(path[:, -1], since, first_request, first_token, k, wealth.tokens + tokens)
    over = np.flatnonzero(whole >= log_target)
    if not len(over):
        return moved, None
    step = int(over[0])
    best = int(path[:, step].argmax())
    counted = step + 1 if log_factors.shape[1] == tokens else tokens
    return moved, Crossing(
        since=float(since[best]),
        at=now,
        requests=k - int(first_request[best]),
        tokens=wealth.tokens - int(first_token[best]) + counted,
        log_wealth=float(whole[step]),
    )


def log_sum_exp(values: Floats) -> Floats:
    """ln Σ exp over the first axis, [S, ...] -> [...].

    >>> log_sum_exp(np.log([[1.0], [3.0]])).round(6).tolist()
    [1.386294]
    """
    top = values.max(axis=0)
    total: Floats = top + np.log(np.exp(values - top).sum(axis=0))
    return total
