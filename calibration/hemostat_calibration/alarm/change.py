"""The change test: are the requests of each kind still distributed as in the frozen baseline of that kind?

Every request is one bounded bet against its own kind's baseline (`baseline`), and all kinds feed one wealth: a change
of the model concerns all of them. Under the null hypothesis that, given the past, the ramps of a request of any kind
have no larger means than in its baseline, even after its spreads were multiplied by something within the
tolerance, every factor at a level that no true mean is above has an expected value of at most 1, whatever the mix of
kinds. So a shift of the mix alone is no evidence, and a kind without a complete baseline takes no part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np

from hemostat_calibration.alarm.baseline import CLEARING, LEVEL_WEIGHTS, Baseline, RequestSpread
from hemostat_calibration.alarm.betting import Crossing, WealthState, bet, initial_wealth
from hemostat_calibration.arrays import Floats


@dataclass(frozen=True, slots=True, eq=False)
class ChangeTest:
    """One change test. crossing: set once the wealth has crossed 1/alpha.

    tolerance: factor of the spread that is no evidence, 1 or more.

    >>> from hemostat_calibration.alarm.baseline import fit_baseline
    >>> usual = fit_baseline(np.array([[math.sin(n), 50, 0.0] for n in range(150)]))
    >>> test = ChangeTest(alpha=0.005, tolerance=1.25)
    >>> for n in range(20):
    ...     test = test.update(usual, RequestSpread(math.sin(n), 50))
    >>> test.crossing is None
    True
    >>> for n in range(15):
    ...     test = test.update(usual, RequestSpread(2.0 + math.sin(n), 50))
    >>> test.crossing is None
    False
    """

    alpha: float
    tolerance: float
    wealth: WealthState = field(default_factory=lambda: initial_wealth(*LEVEL_WEIGHTS.shape))
    crossing: Crossing | None = None

    def log_factors(self, baseline: Baseline, request: RequestSpread, inflation: float = 1.0) -> Floats:
        """Returns ln of the factors of one request, [J, S]. inflation: v̂ of recent requests, see
        `Baseline.log_factors`.
        """
        level, tokens = np.array([request.level]), np.array([float(request.tokens)])
        factors: Floats = baseline.log_factors(level, tokens, self.tolerance, inflation)[0]
        return factors

    def clearing_factors(self, baseline: Baseline, request: RequestSpread, inflation: float = 1.0) -> Floats:
        """Returns ln of the factors of one request at the level that says whether an alarm is over, [S]."""
        factors: Floats = self.log_factors(baseline, request, inflation)[CLEARING]
        return factors

    def update(
        self, baseline: Baseline, request: RequestSpread, now: float = 0.0, inflation: float = 1.0
    ) -> ChangeTest:
        """Returns the test with one more request of the kind of `baseline`. now: seconds. inflation: v̂ of recent
        requests. Nothing changes after a crossing."""
        if self.crossing is not None:
            return self
        factors = self.log_factors(baseline, request, inflation)
        target, v = -math.log(self.alpha), max(baseline.inflation, inflation)
        wealth, crossing = bet(self.wealth, factors, LEVEL_WEIGHTS, request.tokens, now, target, v)
        return replace(self, wealth=wealth, crossing=crossing)
