"""The alarm of all routes: both tests of each, one false-alarm probability over all of them and the whole run.

The k-th test that was ever begun (all routes, both kinds, tests restarted after an alarm) has α_k = α/(k(k+1)), which
sum to α. Half of that is for the bets, a quarter for the limits of baselines, a quarter for the limit of the noise
floor.

An alarm *clears* after `clear_after` requests on which freshly funded bets lost wealth; then a new test begins. A
change that is meant to stay is made the new baseline by `rebase`.

Routes are the caller's, who bounds their number. Each takes at most about `baseline_tokens` float32 until its baseline
is complete, and some kilobytes afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from hemostat_calibration.alarm.betting import Crossing, log_sum_exp
from hemostat_calibration.alarm.budget import BudgetTest
from hemostat_calibration.alarm.change import MIN_REQUESTS_OF_RANGE, Bets, ChangeTest, fit_bets
from hemostat_calibration.arrays import Floats
from hemostat_calibration.errors import InvalidArgumentError


class Kind(StrEnum):
    """Of the two tests."""

    BUDGET = "budget"
    CHANGE = "change"


@dataclass(frozen=True, slots=True)
class Settings:
    """Raises InvalidArgumentError on a bad value.

    alpha: probability of any false alarm, over all routes, both tests and the whole run.
    budget: allowed divergence above the noise floor, nats per token; None: no budget tests.
    cap: nats, where divergences are clipped. max_tokens: weight of a request in the budget test is that of at most so
        many tokens. baseline_tokens: that the change test learns from, on each route, before it tests; 0: no change
        tests. clear_after: requests after which an alarm may clear.
    """

    alpha: float = 0.01
    budget: float | None = None
    cap: float = 5.0
    max_tokens: int = 256
    baseline_tokens: int = 20_000
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
        if self.baseline_tokens < 0:
            raise InvalidArgumentError(f"baseline_tokens is {self.baseline_tokens}: it must be 0 or more")


@dataclass(frozen=True, slots=True, eq=False)
class Observation:
    """One scored request of a route.

    now: seconds, of any clock that does not go back. divergences: float64 [T], nats, the figure of the budget.
    spreads: float64 [T], nats (`spread`). NaN where not available.
    """

    now: float
    divergences: Floats
    spreads: Floats


@dataclass(frozen=True, slots=True)
class Reading:
    """The state of one test on one route.

    raised: the evidence of the alarm; None when there is none. learning: part of the baseline that is complete, 1 once
        the test runs. log_evidence: ln of the wealth; it alarms at ln(2/alpha). alpha: that this test spends; NaN
        before it begins. test: its number among all that were begun; 0 before. requests, tokens: that it has seen.
    """

    route: str
    kind: Kind
    raised: Crossing | None
    learning: float
    log_evidence: float
    alpha: float
    test: int
    requests: int
    tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class RouteTest:
    """One running test on one route. number: among all that were begun.

    recovery_log_wealth: float64 [S]; after a crossing, ln of what each strategy made of 1 in the current window.
    recovery_requests: of that window so far.
    """

    test: BudgetTest | ChangeTest
    number: int
    recovery_log_wealth: Floats | None = None
    recovery_requests: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class RouteState:
    """Of one route; a test is None before it begins."""

    budget: RouteTest | None = None
    change: RouteTest | None = None
    baseline: tuple[npt.NDArray[np.float32], ...] = ()
    """Spreads of the requests so far, until there are enough."""
    bets: Bets | None = None
    """From the complete baseline, for the first test or its successors."""


@dataclass(frozen=True, slots=True, eq=False)
class Alarm:
    """The alarm of all routes. tests: how many were ever begun."""

    settings: Settings
    tests: int = 0
    routes: Mapping[str, RouteState] = field(default_factory=dict)


def init(settings: Settings, tests: int = 0) -> Alarm:
    """Before the first request. tests: how many an earlier part of the same run began; the alpha that they spent is not
    spent again.

    >>> readings(init(Settings(budget=0.1)))
    []
    """
    return Alarm(settings, tests)


def update(alarm: Alarm, route: str, observation: Observation, noise_floor: float = 0.0) -> Alarm:
    """Add one scored request of a route. noise_floor: nats per token, see `BudgetTest.update`.

    >>> alarm = init(Settings(budget=0.1, baseline_tokens=0))
    >>> for now in range(40):
    ...     alarm = update(alarm, "chat", Observation(float(now), np.full(256, 0.5), np.full(256, np.nan)))
    >>> [(reading.kind.value, reading.raised is not None) for reading in readings(alarm)]
    [('budget', True)]
    """
    alarm, state = _ready(alarm, alarm.routes.get(route, RouteState()))
    budget, change, now = state.budget, state.change, observation.now
    if budget is not None and isinstance(budget.test, BudgetTest):
        test = budget.test
        if test.crossing is None:
            budget = replace(budget, test=test.update(observation.divergences, noise_floor, now))
        elif math.isfinite(noise_floor) and not np.isnan(observation.divergences).all():
            budget = _observe_recovery(
                budget, test.log_factors(observation.divergences, noise_floor), alarm.settings.clear_after
            )
    spreads = observation.spreads[~np.isnan(observation.spreads)]
    baseline = state.baseline
    if change is not None and isinstance(change.test, ChangeTest):
        changing = change.test
        if changing.crossing is None:
            change = replace(change, test=changing.update(spreads, now))
        elif len(spreads):
            change = _observe_recovery(change, changing.log_factors(spreads), alarm.settings.clear_after)
    elif alarm.settings.baseline_tokens and len(spreads):
        baseline = (*baseline, spreads.astype(np.float32))
    routes = {**alarm.routes, route: replace(state, budget=budget, change=change, baseline=baseline)}
    return replace(alarm, routes=routes)


def rebase(alarm: Alarm, route: str) -> Alarm:
    """Begin a new baseline on `route`, learned from its next requests; an alarm of its change test is dropped.

    >>> alarm = update(init(Settings()), "chat", Observation(0.0, np.full(8, 0.1), np.full(8, 0.1)))
    >>> readings(alarm)[0].learning, readings(rebase(alarm, "chat"))[0].learning
    (0.0004, 0.0)
    """
    state = alarm.routes.get(route, RouteState())
    return replace(alarm, routes={**alarm.routes, route: RouteState(budget=state.budget)})


def readings(alarm: Alarm) -> list[Reading]:
    """The state of every test, in the order of routes.

    >>> alarm = update(init(Settings(budget=0.1)), "chat", Observation(0.0, np.full(8, 0.1), np.full(8, 0.1)))
    >>> [(reading.kind.value, reading.test) for reading in readings(alarm)]
    [('budget', 1), ('change', 0)]
    """
    return [
        _reading(alarm, route, state, kind, running)
        for route, state in alarm.routes.items()
        for kind, running, wanted in (
            (Kind.BUDGET, state.budget, alarm.settings.budget is not None),
            (Kind.CHANGE, state.change, alarm.settings.baseline_tokens > 0),
        )
        if wanted
    ]


def _reading(alarm: Alarm, route: str, state: RouteState, kind: Kind, running: RouteTest | None) -> Reading:
    if running is None:
        seen = sum(map(len, state.baseline))
        learning = min(seen / alarm.settings.baseline_tokens, 1.0) if kind is Kind.CHANGE else 0.0
        return Reading(route, kind, None, learning, 0.0, math.nan, 0, 0, 0)
    test, wealth = running.test, running.test.wealth
    return Reading(
        route=route,
        kind=kind,
        raised=test.crossing,
        learning=1.0,
        log_evidence=wealth.log_evidence,
        alpha=test.alpha,
        test=running.number,
        requests=wealth.requests,
        tokens=wealth.tokens,
    )


def _ready(alarm: Alarm, state: RouteState) -> tuple[Alarm, RouteState]:
    """The route with the tests that can begin now, those that follow on a cleared alarm included."""
    settings, tests = alarm.settings, alarm.tests

    def alpha(number: int) -> float:
        return settings.alpha / (number * (number + 1))

    if settings.budget is not None and (state.budget is None or _cleared(state.budget, settings)):
        tests += 1
        test = BudgetTest(settings.budget, settings.cap, settings.max_tokens, alpha(tests))
        state = replace(state, budget=RouteTest(test, tests))
    learned = (
        sum(map(len, state.baseline)) >= settings.baseline_tokens > 0 and len(state.baseline) >= MIN_REQUESTS_OF_RANGE
    )
    if state.change is None and learned:
        tests += 1
        bets = fit_bets([request.astype(np.float64) for request in state.baseline], alpha(tests) / 4.0)
        state = replace(state, change=RouteTest(ChangeTest.begin(bets, alpha(tests)), tests), baseline=(), bets=bets)
    elif state.change is not None and _cleared(state.change, settings) and state.bets is not None:
        tests += 1
        state = replace(state, change=RouteTest(ChangeTest.begin(state.bets, alpha(tests)), tests))
    return replace(alarm, tests=tests), state


def _observe_recovery(running: RouteTest, log_factors: Floats, window: int) -> RouteTest:
    """Add one request after a crossing. A window that did not lose wealth is followed by the next."""
    begun = running.recovery_log_wealth is None or running.recovery_requests >= window
    before = np.zeros(len(log_factors)) if begun or running.recovery_log_wealth is None else running.recovery_log_wealth
    return replace(
        running,
        recovery_log_wealth=before + log_factors.sum(axis=1),
        recovery_requests=1 if begun else running.recovery_requests + 1,
    )


def _cleared(running: RouteTest, settings: Settings) -> bool:
    if running.recovery_log_wealth is None or running.recovery_requests < settings.clear_after:
        return False
    return float(log_sum_exp(running.recovery_log_wealth[:, None])[0]) <= math.log(len(running.recovery_log_wealth))
