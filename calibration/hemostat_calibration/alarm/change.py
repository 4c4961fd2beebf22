"""The change test: are the requests of each kind still distributed as in the frozen baseline of that kind? Its figure
is how much the logits of both models differ at a token (`spread`).

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
from hemostat_calibration.records import TokenRecord


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


def spread(record: TokenRecord) -> Floats:
    """Returns the standard deviation of log c − log r over the ids that both models gave, float64 [T] nats. It is NaN
    if they share fewer than 3.

    A constant added to all logits cancels out, so the standard deviation of the difference of the logits is the same.

    >>> from hemostat_calibration.records import Candidates
    >>> ids, log_c, log_r = np.array([[0, 1, 2]], np.int32), np.log([[0.7, 0.2, 0.1]]), np.log([[0.5, 0.4, 0.1]])
    >>> record = TokenRecord(
    ...     3, b"", ids[0, :1], Candidates(ids, log_c), log_r, Candidates(ids, log_r), log_c[:, 0], log_r[:, 0]
    ... )
    >>> spread(record).round(6).tolist()
    [0.525005]
    """
    with np.errstate(invalid="ignore"):
        difference = record.compressed.logprobs - record.reference_at
    return spread_of_differences(np.where(record.compressed.ids >= 0, difference, np.nan))


def spread_of_differences(difference: Floats) -> Floats:
    """Returns `spread` from the differences log c − log r, float64 [T, K] nats; NaN or infinite where either is not
    known.

    >>> spread_of_differences(np.array([[0.0, 1.0, 2.0], [0.0, 1.0, np.nan]])).tolist()
    [1.0, nan]
    """
    known = np.isfinite(difference)
    count = known.sum(axis=1)
    values = np.where(known, difference, 0.0)
    mean = values.sum(axis=1) / np.maximum(count, 1)
    square = np.where(known, (values - mean[:, None]) ** 2, 0.0).sum(axis=1)
    result: Floats = np.where(count >= 3, np.sqrt(square / np.maximum(count - 1, 1)), np.nan)
    return result
