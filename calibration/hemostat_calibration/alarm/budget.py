"""The budget test: is the divergence per token above the noise floor by more than the operator allows?

The unit is the request. A request of n tokens, their mean x̄ after clipping at the cap, counts by its tokens up to N of
them: with w = min(n, N)/N the factor is 1 + w f (x̄/m − 1), fair while the mean per token is at most m, the allowed
divergence plus an upper confidence limit of the noise floor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np

from hemostat_calibration.alarm.betting import (
    BET_FRACTIONS,
    Crossing,
    WealthState,
    bet,
    equal_weights,
    initial_wealth,
)
from hemostat_calibration.arrays import Floats


@dataclass(frozen=True, slots=True, eq=False)
class BudgetTest:
    """One budget test at `alpha`.

    crossing: set once the wealth has crossed 1/alpha. budget: the nats per token that are allowed above the noise
    floor. cap: the limit, in nats, at which values are clipped. max_tokens: N, the number of tokens from which on a
    request's weight does not grow. inflation: v̂ of the requests' means, 1 or more (`statistics.dependence`): each bet
    is raised to the power 1/v̂.

    >>> test = BudgetTest(budget=0.1, cap=5.0, max_tokens=64, alpha=0.01)
    >>> for now in range(30):
    ...     test = test.update(np.full(64, 0.5), noise_floor=0.0, now=now)
    >>> test.crossing is not None
    True
    """

    budget: float
    cap: float
    max_tokens: int
    alpha: float
    inflation: float = 1.0
    wealth: WealthState = field(default_factory=lambda: initial_wealth(len(BET_FRACTIONS)))
    crossing: Crossing | None = None

    def log_factors(self, divergences: Floats, noise_floor: float, inflation: float = 1.0) -> Floats:
        """Returns ln of the factors of one request, to the power 1/v̂, [S]. inflation: v̂ of recent requests; the
        test's own v̂ counts if it is larger.
        """
        values = divergences[~np.isnan(divergences)]
        weight = min(len(values), self.max_tokens) / self.max_tokens
        ratio = float(np.clip(values, 0.0, self.cap).mean()) / (self.budget + max(noise_floor, 0.0))
        factors: Floats = np.log1p(weight * np.array(BET_FRACTIONS) * (ratio - 1.0))
        return factors / max(self.inflation, inflation)

    def update(self, divergences: Floats, noise_floor: float, now: float = 0.0, inflation: float = 1.0) -> BudgetTest:
        """Returns the test with one more request: divergences float64 [T], nats; NaN is left out. now: seconds.

        noise_floor: upper limit of the noise floor, nats per token. inflation: v̂ of recent requests. Nothing changes
        while the noise floor is not finite, nor after a crossing.
        """
        tokens = int((~np.isnan(divergences)).sum())
        if self.crossing is not None or not tokens or not math.isfinite(noise_floor):
            return self
        factors, v = self.log_factors(divergences, noise_floor, inflation), max(self.inflation, inflation)
        target, weights = -math.log(self.alpha), equal_weights(len(factors))
        wealth, crossing = bet(self.wealth, factors, weights, tokens, now, target, v)
        return replace(self, wealth=wealth, crossing=crossing)
