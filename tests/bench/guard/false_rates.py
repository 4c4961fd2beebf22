"""How the guard's false rate grows with the variance inflation v of sums where it is not paid for: formula and
simulation.

Sums that behave like a Brownian motion, each bet small against the range: log K(f) of a bet has, in units of its
variance, a drift of −1/(2v) in place of −1/2, so that it ever reaches log 1/α with a probability of α^(1/v) (Ville's
inequality of the power 1/v, an equality in the limit). A mixture with weights w reaches 1/α when one of its bets
reaches 1/(α w), each at a time of its own, so about

    taken for independent           Σ (α w)^(1/v)
    each bet to the power 1/v       Σ α w = α
    the mixture to the power 1/v    α Σ w^(1/v)

as an upper bound by Boole's inequality. Small bets reach it only after very many units. Simulated: `RUNS` runs of v
equal units, of a normal distribution, one client.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from tests.bench.guard import Row, most
from tests.bench.guard.traffic import SPREAD

from hemostat_calibration.guard.wealth import FRACTIONS, PRIOR, log_proof

NAME = "false_rates"
TAKES = "1 minute on one core"

ALPHA = 0.05
INFLATIONS = (1, 2, 3, 5, 10, 20)
RUNS = 1500
AT_A_TIME = 100
RULES = ("taken for independent", "each bet to the power 1/v", "the mixture to the power 1/v")


def bounds(v: float) -> tuple[float, ...]:
    """Of the false rate, by rule."""
    taken, mixture = float(((ALPHA * PRIOR) ** (1.0 / v)).sum()), ALPHA * float((PRIOR ** (1.0 / v)).sum())
    return tuple(min(rate, 1.0) for rate in (taken, ALPHA, mixture))


def proven(v: int, lives: int, rng: np.random.Generator) -> tuple[int, ...]:
    """Lives with a false proof at `ALPHA`, by rule, looked at the end of every run."""
    counts = np.zeros(len(RULES), np.int64)
    for first in range(0, lives, AT_A_TIME):
        gains = np.clip(rng.normal(0.0, SPREAD, (RUNS, min(AT_A_TIME, lives - first))), -1.0, 1.0)
        wealth = v * np.log1p(gains[..., None, None] * FRACTIONS).cumsum(axis=0)
        result = log_proof(wealth, 1), log_proof(wealth, 1, inflation=float(v)), log_proof(wealth, 1) / v
        counts += [int((log_e >= -np.log(ALPHA)).any(axis=0).sum()) for log_e in result]
    return tuple(counts.tolist())


def rows(lives: int, seed: int) -> Iterator[Row]:
    for v in INFLATIONS:
        result = proven(v, lives, np.random.default_rng([seed, 91, v]))
        one_bet = ALPHA ** (1.0 / v)
        for rule, count, bound in zip(RULES, result, bounds(v), strict=True):
            limit = most(lives, bound) if bound < 1.0 else lives
            beside = f" (one bet: {one_bet:.3f})" if rule == RULES[0] else ""
            yield Row(
                f"v = {v}, {rule}: false proofs at 5 %",
                f"{count} of {lives}",
                f"<= {limit} of {lives}: the formula says at most {bound:.3f}{beside}",
                count <= limit,
            )
