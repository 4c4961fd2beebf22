"""The alarm over all kinds of traffic: one false-alarm probability a week for all tests.

`alpha` is shared out equally between the tests that are in use. Of its share the budget test gives half to the limit of
the noise floor, for the whole run, and half to the bets: the k-th budget test that was ever begun (one for each kind,
begun anew after an alarm) has the part 1/(k(k+1)) of that. Of the evidence of baselines against the means that the
change test bets on, the i-th that was ever completed has the part 1/(i(i+1)). A false alarm within the first m weeks of
a test has a probability of at most m alpha (`betting`); after an alarm, a new test begins.

Requests that depend on each other (`statistics.dependence`): a baseline is complete after `baseline_requests` over a
`cycle` of the traffic, and as soon as `EFFECTIVE_SHARE` of that are effective ones: where requests come in runs of
alike ones it is longer. Its v̂ is the larger one of two: v̂ of the kind's requests, and v̂ of all kinds' requests in
their order, so that what moves several kinds together counts. A budget test begins when v̂ of its kind's divergence is
known, likewise over a cycle. Dependence that begins later is seen by v̂ of recent requests, which goes on
(`RecentInflation`), and sooner by how little successive requests of a kind differ (`SuccessiveDifferences`, for the
change test alone, as it needs the scale of the baseline). The first few requests of a run can still raise an alarm
before it is. Longer cycles are not known: see `tests/bench/guard/alarm_dependence.py`.

An alarm *clears* after `clear_after` requests on which freshly funded bets lost wealth; then a new test begins. A
budget alarm also ends if no request of its kind comes any more (`gone_after`): nothing could clear it then. A change
that is meant to stay is made the new baseline by `rebase`.

Other settings reach the tests that run (`with_settings`). A test of another hypothesis, such as another budget, begins
without wealth, and its funding goes on, so that its probability of a false alarm stays what it is.

Kinds are the caller's, who bounds their number. Each takes 24 bytes for a request of its baseline until that is
complete, of which at most `MAX_LEARNING` are kept (then every second one, and so on), and some five kilobytes
afterwards; beyond `MAX_KINDS`, the one whose last request is longest ago is forgotten.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from hemostat_calibration.alarm.baseline import (
    MIN_BASELINE_REQUESTS,
    MIN_SCALE,
    RequestSpread,
    fit_baseline,
    request_spread,
)
from hemostat_calibration.alarm.betting import log_sum_exp
from hemostat_calibration.alarm.budget import BudgetTest
from hemostat_calibration.alarm.change import ChangeTest
from hemostat_calibration.alarm.state import Alarm, KindState, Observation, RunningTest, Settings
from hemostat_calibration.alarm.workload import Workload
from hemostat_calibration.arrays import Floats
from hemostat_calibration.elapsed import TimeBreak, has_jumped
from hemostat_calibration.statistics.dependence import (
    MIN_HISTORY,
    MIN_UNITS,
    BatchMeans,
    RecentInflation,
)

MAX_KINDS = 128

MAX_LEARNING = 4096
"""The largest number of requests of a kind's baseline that are kept; of more, every second one, every fourth one, …"""
EFFECTIVE_SHARE = 0.7
"""The share of `Settings.baseline_requests` that has to be effective requests before a baseline is complete."""
CHECK_EVERY = 10
"""The number of requests between two looks at whether a baseline is complete, once it may be."""
RECENT_REQUESTS = 30
"""The number of requests, about, that make up the recent level of a kind."""


def init(settings: Settings, tests: int = 0) -> Alarm:
    """Returns the state before the first request. tests: how many an earlier part of the same run may have begun of any
    sort; the alpha that they spent is not spent again.

    >>> from hemostat_calibration.alarm.report import kind_readings
    >>> kind_readings(init(Settings(budget=0.1)))
    []
    """
    return Alarm(settings, tests, tests, tests, workload=Workload(settings.baseline_requests, settings.cycle))


def update(alarm: Alarm, kind: str, observation: Observation, noise_floor: float = 0.0) -> Alarm:
    """Returns the alarm with one more scored request of a kind. noise_floor: nats per token, see `BudgetTest.update`.

    >>> alarm = init(Settings(budget=0.1, baseline_requests=0))
    >>> for now in range(150):
    ...     alarm = update(alarm, "chat", Observation(float(now), np.full(256, 0.5), np.full(256, np.nan)))
    >>> from hemostat_calibration.alarm.report import readings
    >>> [(reading.test.value, reading.raised is not None) for reading in readings(alarm)]
    [('budget', True)]
    """
    kinds = dict(alarm.kinds)
    state = kinds.pop(kind, KindState())
    while len(kinds) >= MAX_KINDS:
        del kinds[min(kinds, key=lambda name: kinds[name].last)]
    if kind in alarm.kinds and has_jumped(state.last, observation.now):
        # What has to span a cycle begins anew.
        state = replace(state, first=observation.now, since=observation.now)
    state = replace(state, last=observation.now)
    alarm, state = _update_budget(alarm, state, observation, noise_floor)
    request = request_spread(observation.spreads) if alarm.settings.baseline_requests else None
    if request is not None:
        alarm = replace(alarm, workload=alarm.workload.update(kind, observation.now))
        if not observation.pooled:
            alarm, state = _update_change(alarm, state, request, observation.now)
    return replace(alarm, kinds=_without_gone_alarms({**kinds, kind: state}, observation.now, alarm.settings))


def _without_gone_alarms(kinds: dict[str, KindState], now: float, settings: Settings) -> dict[str, KindState]:
    """Returns the same kinds, without the budget alarms of those that have had no request for `Settings.gone_after`."""
    for kind, state in kinds.items():
        if state.budget is not None and state.budget.raised and now - state.last >= settings.gone_after:
            kinds[kind] = replace(state, budget=None)
    return kinds


def with_settings(alarm: Alarm, settings: Settings) -> Alarm:
    """Returns the alarm, which goes on with other settings.

    The bets of running tests are spent at the new alpha. A raised alarm about a budget, or a tolerance, that is no
    longer set ends; a test of it that has raised none begins anew. What the baselines learned stays.

    >>> alarm = init(Settings(budget=0.1, baseline_requests=0))
    >>> for now in range(150):
    ...     alarm = update(alarm, "chat", Observation(float(now), np.full(256, 0.5), np.full(256, np.nan)))
    >>> from hemostat_calibration.alarm.report import readings
    >>> readings(alarm)[0].raised is None, readings(with_settings(alarm, Settings(budget=0.9, baseline_requests=0)))
    (False, [])
    """
    workload = alarm.workload
    if (workload.size, workload.cycle) != (settings.baseline_requests, settings.cycle):
        workload = Workload(settings.baseline_requests, settings.cycle)
    kinds = {kind: replace(state, budget=_budget_with(state.budget, settings)) for kind, state in alarm.kinds.items()}
    change = _change_with(alarm.change, settings)
    return replace(alarm, settings=settings, kinds=kinds, change=change, workload=workload)


def _budget_with(running: RunningTest | None, settings: Settings) -> RunningTest | None:
    if running is None or settings.budget is None:
        return None
    test = running.test
    assert isinstance(test, BudgetTest)
    is_same = (test.budget, test.cap, test.max_tokens) == (settings.budget, settings.cap, settings.max_tokens)
    if running.raised:
        return running if is_same else None
    test = replace(
        test,
        budget=settings.budget,
        cap=settings.cap,
        max_tokens=settings.max_tokens,
        alpha=settings.budget_alpha(running.number),
        wealth=test.wealth if is_same else test.wealth.emptied(),
    )
    return replace(running, test=test)


def _change_with(running: RunningTest | None, settings: Settings) -> RunningTest | None:
    if running is None or not settings.baseline_requests:
        return None
    test = running.test
    assert isinstance(test, ChangeTest)
    is_same = test.tolerance == settings.tolerance
    if running.raised:
        return running if is_same else None
    wealth = test.wealth if is_same else test.wealth.emptied()
    return replace(running, test=ChangeTest(settings.change_alpha, settings.tolerance, wealth))


def update_workload(alarm: Alarm, kind: str, now: float) -> Alarm:
    """Returns the alarm with one more scored request of another model, such as an adapter: it counts in the mix of
    kinds, and in no test. now: seconds.

    >>> alarm = update_workload(init(Settings(baseline_requests=30)), "chat", now=0.0)
    >>> dict(alarm.workload.baseline), alarm.kinds
    ({'chat': 1}, {})
    """
    return replace(alarm, workload=alarm.workload.update(kind, now)) if alarm.settings.baseline_requests else alarm


def _update_budget(
    alarm: Alarm, state: KindState, observation: Observation, noise_floor: float
) -> tuple[Alarm, KindState]:
    settings, running = alarm.settings, state.budget
    if settings.budget is None or not math.isfinite(noise_floor) or np.isnan(observation.divergences).all():
        return alarm, state
    if math.isinf(state.inflation):
        state = _learn_divergence(state, observation, settings)
        if math.isinf(state.inflation):
            return alarm, state
    recent = state.recent_divergences.update(_mean_divergence(observation, settings))
    state = replace(state, recent_divergences=recent)
    if running is None or _cleared(running, settings):
        number = alarm.budget_tests + 1
        alarm = replace(alarm, budget_tests=number)
        alpha = settings.budget_alpha(number)
        begun = BudgetTest(settings.budget, settings.cap, settings.max_tokens, alpha, state.inflation)
        running = RunningTest(begun, number)
    test = running.test
    assert isinstance(test, BudgetTest)
    if test.crossing is None:
        test = test.update(observation.divergences, noise_floor, observation.now, recent.value)
        running = replace(running, test=test)
    else:
        factors = test.log_factors(observation.divergences, noise_floor, recent.value)
        running = _observe_recovery(running, factors, settings.clear_after)
    return alarm, replace(state, budget=running)


def _learn_divergence(state: KindState, observation: Observation, settings: Settings) -> KindState:
    """Returns the state with one more request, and with v̂ of the requests' means once it is known."""
    first = state.first if state.divergences.units else observation.now
    means = state.divergences.update(np.array([_mean_divergence(observation, settings)]))
    known = means.units >= MIN_HISTORY and observation.now - first >= settings.cycle and means.enough()[0]
    inflation = float(means.inflation()[0]) if known else math.inf
    return replace(state, divergences=means, first=first, inflation=inflation)


def _mean_divergence(observation: Observation, settings: Settings) -> float:
    """Returns the figure of the request, clipped at the cap. At least one of its tokens has a divergence."""
    divergences = observation.divergences[~np.isnan(observation.divergences)]
    return float(np.clip(divergences, 0.0, settings.cap).mean())


def _update_change(alarm: Alarm, state: KindState, request: RequestSpread, now: float) -> tuple[Alarm, KindState]:
    settings, baseline = alarm.settings, state.baseline
    if baseline is None:
        alarm, state = _learn_level(alarm, state, request, now)
        inflation = baseline_inflation(state.levels, alarm.levels, settings.baseline_requests)
        if math.isinf(inflation) or now - state.since < settings.cycle:
            return alarm, state
        number = alarm.baselines + 1
        fitted = fit_baseline(state.learning, 1.0 / (number * (number + 1)), inflation, state.stride)
        learned = replace(state, learning=KindState().learning, levels=KindState().levels, baseline=fitted)
        return replace(alarm, baselines=number), learned
    relative, seen = request.level - baseline.level, state.recent_requests + 1
    moved = (relative - state.recent_level) / min(seen, RECENT_REQUESTS)
    # Without this request: a bet whose stake depended on what it bets on would be no bet.
    # And with the least scale it is not known how much independent requests differ.
    before = state.differences.value if baseline.scale > MIN_SCALE else 1.0
    (score,) = baseline.scores(np.array([request.level]), np.array([float(request.tokens)])).tolist()
    state = replace(
        state,
        recent_level=state.recent_level + moved,
        recent_requests=seen,
        recent=state.recent.update(relative),
        differences=state.differences.update(score),
    )
    alarm = replace(alarm, recent=alarm.recent.update(relative))
    recent = max(state.recent.value, alarm.recent.value, before)
    running = alarm.change
    if running is None or _cleared(running, settings):
        alarm, running = _begin_change(alarm)
    test = running.test
    assert isinstance(test, ChangeTest)
    if test.crossing is None:
        running = replace(running, test=test.update(baseline, request, now, recent))
    else:
        running = _observe_recovery(running, test.clearing_factors(baseline, request, recent), settings.clear_after)
    return replace(alarm, change=running), state


def _learn_level(alarm: Alarm, state: KindState, request: RequestSpread, now: float) -> tuple[Alarm, KindState]:
    levels, since = state.levels.update(np.array([request.level])), state.since if state.levels.units else now
    learning, stride = state.learning, state.stride
    if state.levels.units % stride == 0:
        learning = np.concatenate([learning, [request.row()]])
        if len(learning) >= MAX_LEARNING:
            learning, stride = learning[::2], 2 * stride
    state = replace(state, learning=learning, stride=stride, levels=levels, since=since)
    relative = request.level - float(learning[:, 0].mean())
    return replace(alarm, levels=alarm.levels.update(np.array([relative]))), state


def baseline_inflation(levels: BatchMeans, all_levels: BatchMeans, needed: int) -> float:
    """Returns v̂ with which a baseline is complete. It is infinite if the baseline is not complete, or is not looked at
    now.

    levels: batch means of the kind's levels. all_levels: batch means of all kinds' levels. needed:
    `Settings.baseline_requests`.

    >>> baseline_inflation(BatchMeans.of(1), BatchMeans.of(1), 150)
    inf
    """
    if levels.units < needed or (levels.units - needed) % CHECK_EVERY:
        return math.inf
    inflation = max(
        float(means.inflation()[0]) for means in (levels, all_levels) if means.units >= MIN_UNITS or means is levels
    )
    least = max(EFFECTIVE_SHARE * needed, MIN_BASELINE_REQUESTS)
    # A baseline of so few requests that nothing can be estimated is the operator's choice.
    if levels.units < MIN_UNITS:
        return 1.0
    return inflation if levels.units / inflation >= least else math.inf


def _begin_change(alarm: Alarm) -> tuple[Alarm, RunningTest]:
    number, test = alarm.change_tests + 1, ChangeTest(alarm.settings.change_alpha, alarm.settings.tolerance)
    return replace(alarm, change_tests=number), RunningTest(test, number)


def _observe_recovery(running: RunningTest, log_factors: Floats, window: int) -> RunningTest:
    """Returns the test with one more request after its crossing. A window that did not lose wealth leads to the
    next.
    """
    begun = running.recovery_log_wealth is None or running.recovery_requests >= window
    before = np.zeros(len(log_factors)) if begun or running.recovery_log_wealth is None else running.recovery_log_wealth
    return replace(
        running,
        recovery_log_wealth=before + log_factors,
        recovery_requests=1 if begun else running.recovery_requests + 1,
    )


def _cleared(running: RunningTest, settings: Settings) -> bool:
    if running.recovery_log_wealth is None or running.recovery_requests < settings.clear_after:
        return False
    return float(log_sum_exp(running.recovery_log_wealth[:, None])[0]) <= math.log(len(running.recovery_log_wealth))


def rebase(alarm: Alarm, kind: str | None = None) -> Alarm:
    """Returns the alarm with a new baseline of `kind`, or of all kinds and of their mix, learned from the next
    requests. An alarm of the change test, or about the budget of these kinds, is dropped, and the next test begins.

    >>> alarm = update(init(Settings()), "chat", Observation(0.0, np.full(8, 0.1), np.full(8, 0.1)))
    >>> from hemostat_calibration.alarm.report import kind_readings
    >>> kind_readings(alarm)[0].baseline_requests, kind_readings(rebase(alarm, "chat"))[0].baseline_requests
    (1, 0)
    """
    kinds = {
        name: KindState(
            budget=None if state.budget is not None and state.budget.raised else state.budget,
            divergences=state.divergences,
            first=state.first,
            inflation=state.inflation,
            recent_divergences=state.recent_divergences,
            last=state.last,
        )
        if kind in {None, name}
        else state
        for name, state in alarm.kinds.items()
    }
    change = None if alarm.change is not None and alarm.change.raised else alarm.change
    if kind is not None:
        return replace(alarm, kinds=kinds, change=change)
    workload = Workload(alarm.settings.baseline_requests, alarm.settings.cycle)
    return replace(
        alarm, kinds=kinds, change=change, workload=workload, levels=BatchMeans.of(1), recent=RecentInflation()
    )


def after_break(alarm: Alarm, time_break: TimeBreak) -> Alarm:
    """Returns the same after the time was set: what has to span a cycle begins again, or goes on without the time that
    was lost (`TimeBreak`); bets are funded as if nothing but known time had passed; and a kind was last seen as long
    ago as before. What baselines have learned, and evidence, stay.

    >>> from hemostat_calibration.alarm.report import kind_readings
    >>> alarm = update(init(Settings()), "chat", Observation(5.0, np.full(8, 0.1), np.full(8, 0.1)))
    >>> kind_readings(after_break(alarm, TimeBreak(now=1.7e9, lost=1.7e9 - 9.0, anew=True)))[0].since
    1700000000.0
    """
    return replace(
        alarm,
        kinds={kind: _kind_after_break(state, time_break) for kind, state in alarm.kinds.items()},
        change=_test_after_break(alarm.change, time_break),
        workload=alarm.workload.after_break(time_break),
    )


def _kind_after_break(state: KindState, time_break: TimeBreak) -> KindState:
    return replace(
        state,
        since=time_break.begins(state.since, ended=state.baseline is not None),
        first=time_break.begins(state.first, ended=math.isfinite(state.inflation)),
        last=time_break.seen(state.last),
        budget=_test_after_break(state.budget, time_break),
    )


def _test_after_break(running: RunningTest | None, time_break: TimeBreak) -> RunningTest | None:
    if running is None:
        return None
    test = running.test
    # Written out for each class: a test of the one is no test of the other.
    if isinstance(test, BudgetTest):
        return replace(running, test=replace(test, wealth=test.wealth.after_break(time_break)))
    return replace(running, test=replace(test, wealth=test.wealth.after_break(time_break)))
