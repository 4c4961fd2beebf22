"""The state of the alarm: its settings, the tests that run, and what is known of each kind."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

from hemostat_calibration.alarm.baseline import (
    MEAN_FACTOR,
    MIN_BASELINE_REQUESTS,
    TAIL,
    Baseline,
)
from hemostat_calibration.alarm.budget import BudgetTest
from hemostat_calibration.alarm.change import ChangeTest
from hemostat_calibration.alarm.workload import Workload
from hemostat_calibration.arrays import Floats
from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.statistics.dependence import (
    BatchMeans,
    RecentInflation,
    SuccessiveDifferences,
)

GONE_CYCLES, MIN_GONE_SECONDS = 2.0, 2 * 86_400.0
"""A budget alarm ends if its kind has had no request for so many cycles of the traffic, and at least so long."""


class AlarmTest(StrEnum):
    """The names of the two tests."""

    BUDGET = "budget"
    CHANGE = "change"


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of the alarm. Raises InvalidArgumentError on a bad value.

    alpha: the probability of any false alarm in a week, over all kinds and both tests. budget: the allowed divergence
    above the noise floor, in nats per token; None: no budget tests. cap: the limit, in nats, at which divergences are
    clipped. max_tokens: the number of tokens from which on a request's weight in the budget test does not grow.
    baseline_requests: the number of requests of each kind that the change test learns from before it tests; 0: no
    change test. cycle: the seconds that baselines have to span, and what budget tests know before they begin.
    tolerance: the factor by which all spreads of a kind may grow or shrink without being evidence, 1 or more.
    clear_after: the number of requests after which an alarm may clear.
    """

    alpha: float = 0.01
    budget: float | None = None
    cap: float = 5.0
    max_tokens: int = 256
    baseline_requests: int = 150
    cycle: float = 0.0
    tolerance: float = 1.25
    clear_after: int = 30

    def __post_init__(self) -> None:
        if not 0.0 < self.alpha < 1.0:
            raise InvalidArgumentError(f"alpha is {self.alpha}: it must be between 0 and 1")
        if self.budget is not None and not 0.0 < self.budget < self.cap:
            raise InvalidArgumentError(f"budget is {self.budget}: it must be between 0 and the cap of {self.cap}")
        if not math.isfinite(self.cap):
            raise InvalidArgumentError(f"cap is {self.cap}: it must be finite")
        if self.max_tokens < 1 or self.clear_after < 1:
            raise InvalidArgumentError("max_tokens and clear_after must be 1 or more")
        if self.baseline_requests and self.baseline_requests < MIN_BASELINE_REQUESTS:
            raise InvalidArgumentError(
                f"baseline_requests is {self.baseline_requests}: it must be 0 or at least {MIN_BASELINE_REQUESTS}"
            )
        if not (1.0 <= self.tolerance < math.inf):
            raise InvalidArgumentError(f"tolerance is {self.tolerance}: it must be a factor of 1 or more")

    @property
    def gone_after(self) -> float:
        """The time in seconds without a request of a kind after which its budget alarm ends."""
        return max(GONE_CYCLES * self.cycle, MIN_GONE_SECONDS)

    @property
    def share(self) -> float:
        """The part of alpha that each test in use has."""
        return self.alpha / (2.0 if self.budget is not None and self.baseline_requests else 1.0)

    @property
    def half_share(self) -> float:
        """The part of alpha for the bets of budget tests, and as much for the limit of the noise floor."""
        return 0.5 * self.share

    def budget_alpha(self, number: int) -> float:
        """Returns what the bets of the budget test with this number spend."""
        return self.half_share / (number * (number + 1))

    @property
    def change_alpha(self) -> float:
        """The part of alpha for the bets of the change test. It is at least half of the test's share: with an alpha
        below 5e-6, `TAIL` is more than the share.
        """
        return max(self.share - TAIL, 0.5 * self.share) / MEAN_FACTOR


@dataclass(frozen=True, slots=True, eq=False)
class Observation:
    """One scored request of a kind: one of the units that are independent of each other, like conversations.

    now: seconds, of any clock that does not go back. divergences: float64 [T], nats, the figure of the budget.
    spreads: float64 [T], nats (`spread`). NaN where not available. pooled: of a kind that stands for several rare ones;
    their mix may change without being seen, so it takes no part in the change test.
    """

    now: float
    divergences: Floats
    spreads: Floats
    pooled: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class RunningTest:
    """A budget test or a change test, with what may clear its alarm.

    number: its place among all tests of its sort that were begun. recovery_log_wealth: float64 [S]; after a crossing,
    ln of what each strategy made of 1 in the current window. recovery_requests: the number of requests in that window
    so far.
    """

    test: BudgetTest | ChangeTest
    number: int
    recovery_log_wealth: Floats | None = None
    recovery_requests: int = 0

    @property
    def raised(self) -> bool:
        """It is True if the test has raised the alarm."""
        return self.test.crossing is not None


@dataclass(frozen=True, slots=True, eq=False)
class KindState:
    """The state of one kind.

    learning: float64 [R, 3], requests of the baseline so far (`RequestSpread.row`), one in `stride`, until there are
    enough. levels: batch means of the levels of all of them. since: the time of the first one. divergences: batch means
    of the requests' mean divergences, until their v̂ is known. inflation: that v̂; infinite before. first: the time of
    the first of these requests. recent_level: the moving average of the levels since then, relative to the baseline's
    level. last: the time of its last request. recent: v̂ of levels since the baseline. recent_divergences: v̂ of
    divergences since the first v̂ of these was known. differences: v̂ of the latest few scores since the baseline.
    """

    budget: RunningTest | None = None
    learning: Floats = field(default_factory=lambda: np.zeros((0, 3)))
    stride: int = 1
    since: float = 0.0
    levels: BatchMeans = field(default_factory=lambda: BatchMeans.of(1))
    divergences: BatchMeans = field(default_factory=lambda: BatchMeans.of(1))
    first: float = 0.0
    inflation: float = math.inf
    baseline: Baseline | None = None
    recent_level: float = 0.0
    recent_requests: int = 0
    last: float = 0.0
    recent: RecentInflation = field(default_factory=RecentInflation)
    recent_divergences: RecentInflation = field(default_factory=RecentInflation)
    differences: SuccessiveDifferences = field(default_factory=SuccessiveDifferences)


@dataclass(frozen=True, slots=True, eq=False)
class Alarm:
    """The alarm of all kinds. budget_tests, change_tests, baselines: how many were ever begun, or completed. levels: of
    requests of all baselines, in their order, relative to the mean of their kind so far. recent: v̂ of the levels of all
    requests since, relative to the baselines of their kinds."""

    settings: Settings
    budget_tests: int = 0
    change_tests: int = 0
    baselines: int = 0
    change: RunningTest | None = None
    kinds: Mapping[str, KindState] = field(default_factory=dict)
    workload: Workload = field(default_factory=lambda: Workload(0))
    levels: BatchMeans = field(default_factory=lambda: BatchMeans.of(1))
    recent: RecentInflation = field(default_factory=RecentInflation)

    @property
    def begun(self) -> int:
        """The largest number of tests of any sort: `tests` of `init`, where the same run begins anew."""
        return max(self.budget_tests, self.change_tests, self.baselines)
