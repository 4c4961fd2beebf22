"""The change test: is the stream still what a frozen baseline of it was? Token by token, so that it can be fast.

The figure of a token is the *spread* of log c − log r over the ids that both models gave (`spread`): how much the
logits differ, nearly as large for low- as for high-entropy tokens. For some ranges A of it the baseline gives the
frequency with which it falls there, and a strategy stakes parts f_A of its wealth: the factor is 1 − Σ f_A + Σ f_A
1{in A}/g_A. It is fair under the *conditional null*: given the past, a token's spread falls into A with a probability
of at most g_A.

Two measures keep g_A from being too small. It is not the baseline's share but an upper confidence limit of it, with the
design effect of tokens that are correlated within requests, for all ranges at once. And where the tokens of a request
resemble each other, the past predicts more than g_A, and wealth would grow within requests: factors are therefore
raised to a power p ≤ 1 (fair by Jensen's inequality), the largest for which a strategy with `POWER_MARGIN` times that
power would not have gained on the baseline, averaged over its requests, at any token. The margin allows for requests
that are more extreme than any of the baseline. A baseline is valid only while the traffic stays of one kind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from hemostat_calibration.alarm.betting import BET_FRACTIONS, Crossing, WealthState, bet, initial_wealth
from hemostat_calibration.arrays import Floats
from hemostat_calibration.errors import InvalidArgumentError

UPPER_TAILS = (0.5, 0.2, 0.05, 0.01, 0.002)
"""Ranges of the spread that are bet on: above the value that this share of the baseline is above."""


LOWER_TAILS = (0.5, 0.2, 0.05, 0.01)
"""Likewise: below the value that this share of the baseline is below."""


POWERS = (1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.12)
"""Powers to which factors may be raised."""


POWER_MARGIN = 3.0
"""A strategy with this many times its power must not gain on the baseline. Found by simulation: 2 is too little where
requests differ much."""


MIN_REQUESTS_OF_RANGE = 20
"""Requests of the baseline in which a range must occur to be bet on."""


@dataclass(frozen=True, slots=True, eq=False)
class Bets:
    """Strategies on the spread, frozen.

    edges: float64 [B], increasing: bin b holds edges[b−1] < value ≤ edges[b].
    log_factors: float64 [S, B + 1], ln of what a strategy's wealth is multiplied by.
    """

    edges: Floats
    log_factors: Floats


def fit_bets(baseline: Sequence[Floats], alpha: float) -> Bets:
    """The bets against a baseline of requests, each float64 [T], its tokens' spreads in nats, without NaN.

    With a probability of at least 1 − alpha, no limit g is below the true share of its range (by the normal
    approximation of Wilson's score, with the largest design effect of any range).
    Where hardly any value but one occurs (both models compute the same to the last bit), the only range is what lies
    above all of the baseline, and its limit that of a share of requests.
    InvalidArgumentError where the baseline has fewer than two requests.

    >>> rng = [np.sin(np.arange(20.0) + i) + 2.0 for i in range(100)]
    >>> test = ChangeTest.begin(fit_bets(rng, alpha=0.0025), alpha=0.01)
    >>> test.update(rng[0]).crossing is None, test.update(10.0 * rng[0]).crossing is None
    (True, False)
    """
    if len(baseline) < 2:
        raise InvalidArgumentError(f"the baseline has {len(baseline)} requests: at least two are needed")
    values = np.concatenate(baseline)
    above, below = np.quantile(values, [1.0 - share for share in UPPER_TAILS]), np.quantile(values, LOWER_TAILS)
    edges = np.unique(np.concatenate([above, below]))
    placed = [np.searchsorted(edges, request) for request in baseline]
    bins = np.arange(len(edges) + 1)
    # A bin is above edge e when its lower end is, below it when its upper end is.
    sides = [np.searchsorted(edges, above)[:, None] < bins, np.searchsorted(edges, below)[:, None] >= bins]
    hits = [np.array([side[:, at].sum(axis=1) for at in placed]) for side in sides]
    seen = [((n > 0).sum(axis=0) >= MIN_REQUESTS_OF_RANGE) & (n.sum(axis=0) < 0.9 * len(values)) for n in hits]
    sides, hits = [s[k] for s, k in zip(sides, seen, strict=True)], [h[:, k] for h, k in zip(hits, seen, strict=True)]
    if not any(map(len, sides)):
        z = NormalDist().inv_cdf(1.0 - alpha)
        beyond = np.array([0.0, 1.0 + len(baseline) / z**2])
        return Bets(values.max(keepdims=True), np.log([1.0 - f + f * beyond for f in BET_FRACTIONS]))
    limits = _limits(np.concatenate(hits, axis=1), placed, alpha)
    paid = np.split(np.concatenate(sides) / limits[:, None], [len(sides[0])])
    stakes = np.concatenate([*paid, *(side.mean(axis=0, keepdims=True) for side in paid if len(side))])
    rows = np.log(np.concatenate([1.0 - f + f * stakes for f in BET_FRACTIONS]))
    powers = _powers(rows, placed)
    kept = [p * row for p, row in zip(powers, rows, strict=True) if p]
    return Bets(edges, np.array(kept) if kept else np.zeros((1, len(edges) + 1)))


def _limits(hits: npt.NDArray[np.int64], placed: Sequence[npt.NDArray[np.int64]], alpha: float) -> Floats:
    """Upper limits of the shares of J ranges, all at once; hits [requests, J]."""
    lengths = np.array([len(at) for at in placed], np.float64)
    tokens = lengths.sum()
    share = hits.sum(axis=0) / tokens
    binomial = tokens * share * (1.0 - share)
    clustered = ((hits - share * lengths[:, None]) ** 2).sum(axis=0) * len(lengths) / (len(lengths) - 1)
    n = tokens / max(1.0, float((clustered / np.maximum(binomial, 1.0)).max()))
    z = NormalDist().inv_cdf(1.0 - alpha / len(share))
    limit: Floats = (share + z * z / (2 * n) + z * np.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)) / (
        1 + z * z / n
    )
    return np.minimum(limit, 1.0)


def _powers(rows: Floats, placed: Sequence[npt.NDArray[np.int64]]) -> list[float]:
    """Of each row of log factors [S, bins] the largest power at which it does not gain on the baseline, or 0."""
    at = np.full((len(placed), max(map(len, placed))), rows.shape[1])
    for row, bins in zip(at, placed, strict=True):
        row[: len(bins)] = bins
    found = []
    for row in np.column_stack([rows, np.zeros(len(rows))]):  # after a request's end wealth stays
        log_wealth = row[at].cumsum(axis=1)
        found.append(next((p for p in POWERS if _loses(POWER_MARGIN * p * log_wealth)), 0.0))
    return found


def _loses(log_wealth: Floats) -> bool:
    """Whether a strategy, restarted with each request, never gained on average at any token; log_wealth [R, T]."""
    with np.errstate(over="ignore"):
        return bool(np.exp(log_wealth).mean(axis=0).max() <= 1.0)


@dataclass(frozen=True, slots=True, eq=False)
class ChangeTest:
    """One change test at `alpha`, half of which is for the bets. crossing: set once the wealth has crossed."""

    bets: Bets
    alpha: float
    wealth: WealthState
    crossing: Crossing | None = None

    @classmethod
    def begin(cls, bets: Bets, alpha: float) -> ChangeTest:
        """Before the first request."""
        return cls(bets, alpha, initial_wealth(len(bets.log_factors)))

    def log_factors(self, spreads: Floats) -> Floats:
        """ln of the factors of one request, [S, tokens that have a spread]."""
        return self.bets.log_factors[:, np.searchsorted(self.bets.edges, spreads[~np.isnan(spreads)])]

    def update(self, spreads: Floats, now: float = 0.0) -> ChangeTest:
        """Add one request: spreads float64 [T], nats; NaN is left out. now: seconds. No change after a crossing."""
        factors = self.log_factors(spreads)
        if self.crossing is not None or not factors.shape[1]:
            return self
        wealth, crossing = bet(self.wealth, factors, factors.shape[1], now, math.log(2.0 / self.alpha))
        return ChangeTest(self.bets, self.alpha, wealth, crossing)
