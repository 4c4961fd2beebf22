"""The alarm's worlds can fail, and they bet as the alarm does."""

from dataclasses import replace

import numpy as np
import pytest
from tests.bench.guard import alarm as worlds
from tests.bench.guard import alarm_dependence as dependent
from tests.bench.guard import most

from hemostat_calibration.alarm import ChangeTest, RequestSpread, baseline, fit_baseline
from hemostat_calibration.alarm.alarm import baseline_inflation
from hemostat_calibration.statistics.dependence import BatchMeans, RecentInflation

LIVES = 50


def null(rng, effect=0.2):
    count = worlds.LEARNED + worlds.REQUESTS
    return worlds.one_kind(worlds.simulated(rng, count, worlds.normal_effects(rng, count, effect), worlds.SHORT))


def shifted(rng, factor=1.2):
    n = worlds.LEARNED
    before, after = (worlds.normal_effects(rng, count, 0.1) for count in (n, worlds.REQUESTS))
    return worlds.one_kind(
        worlds.simulated(rng, n, before, worlds.SHORT),
        worlds.simulated(rng, worlds.REQUESTS, after, worlds.SHORT, factor),
    )


def test_means_in_place_of_limits_would_alarm_without_a_change(monkeypatch):
    """The simulations can fail: the baseline's own means of ramps are too small as limits; the tolerance hides that."""
    exact = replace(worlds.SETTINGS, tolerance=1.0, baseline_requests=30)
    assert worlds.alarms(LIVES, 0, null, exact) <= most(LIVES, exact.alpha)
    monkeypatch.setattr(baseline, "level_means", lambda values, *_: np.full(len(baseline.LEVELS), values.mean()))
    monkeypatch.setattr(baseline, "MIN_LIMIT", 1e-3)
    assert worlds.alarms(LIVES, 0, null, exact) >= 6


def test_without_a_tolerance_a_workload_shift_would_alarm():
    assert worlds.alarms(LIVES, 0, shifted, replace(worlds.SETTINGS, tolerance=1.0)) >= 25


def test_levels_without_regard_to_length_would_alarm_on_short_answers(monkeypatch):
    def shorter(rng):
        n = worlds.LEARNED
        before, after = (worlds.normal_effects(rng, count, 0.02) for count in (n, worlds.REQUESTS))
        return worlds.one_kind(
            worlds.simulated(rng, n, before, worlds.LONG), worlds.simulated(rng, worlds.REQUESTS, after, (2, 6))
        )

    settings = replace(worlds.SETTINGS, tolerance=1.1)
    assert worlds.alarms(LIVES, 0, shorter, settings) <= most(LIVES, 0.01)
    monkeypatch.setattr(baseline, "_half_tokens", lambda *_: 0.0)
    assert worlds.alarms(LIVES, 0, shorter, settings) >= 10


def test_the_simulations_bet_as_the_test_does():
    kinds, rows = shifted(np.random.default_rng(3), factor=1.8)
    [(_, later, v)] = worlds.baselines(kinds, rows, worlds.SETTINGS)
    n = int(later[0])
    usual = fit_baseline(rows[:n], 0.5, v)
    test, recent = ChangeTest(worlds.SETTINGS.change_alpha, worlds.SETTINGS.tolerance), RecentInflation()
    before = worlds.difference_inflations(usual, rows[n:])
    for at, (level, tokens, contrast) in enumerate(rows[n:]):
        recent = recent.update(level - usual.level)
        request = RequestSpread(level, int(tokens), contrast)
        test = test.update(usual, request, worlds.SECONDS * at, max(recent.value, before[at]))
    assert test.crossing is not None
    assert worlds.crossing(kinds, rows) == n + test.wealth.requests - 1


def test_batches_are_those_of_the_alarm():
    levels = np.random.default_rng(0).normal(size=777)
    means = BatchMeans.of(1)
    for level in levels:
        means = means.update(np.array([level]))
    result = worlds.batch_means(levels)
    assert result.units == means.units
    assert result.sums == pytest.approx(means.sums)


def test_v_is_that_of_the_alarm():
    levels = np.random.default_rng(0).normal(size=1000)
    looks = np.array([48, 200, 777, 1000])
    expected = [worlds.batch_means(levels[:look]).inflation()[0] for look in looks]
    assert dependent.inflations(levels, looks) == pytest.approx(expected)
    begun, v = dependent.begins(np.repeat(levels, 2), 150)
    own = worlds.batch_means(np.repeat(levels, 2)[:begun])
    assert baseline_inflation(own, own, worlds.SETTINGS.baseline_requests) == pytest.approx(v)
    earlier = worlds.batch_means(np.repeat(levels, 2)[: begun - 10])
    assert baseline_inflation(earlier, earlier, worlds.SETTINGS.baseline_requests) == np.inf


@pytest.mark.parametrize("name", ["runs of 10, effects 0.3", "20 clients that come with 20 requests at a time"])
def test_requests_taken_for_independent_would_alarm_without_a_change(name):
    world, *_ = dependent.WORLDS[name]
    taken = dependent.lives_of(world, 20, 0, dependent.WEEK, dependence=False)
    assert sum(np.isfinite(life.alarm) for life in taken) >= 10
    lived = dependent.lives_of(world, 20, 0, dependent.WEEK)
    assert sum(np.isfinite(life.alarm) for life in lived) <= most(20, worlds.SETTINGS.alpha)
    assert all(np.isfinite(life.begun) for life in lived)


def test_recent_v_is_that_of_the_alarm():
    levels = np.repeat(np.random.default_rng(0).normal(size=500), 3)
    recent, values = RecentInflation(), []
    for level in levels:
        recent = recent.update(level)
        values.append(recent.value)
    assert worlds.recent_inflations(levels) == pytest.approx(values)
    assert values[-1] > 2.0


def test_dependence_that_begins_after_the_baseline_would_alarm_if_v_stopped_there():
    assert dependent.alarms(dependent.beginning(20, 20, 0, 4, goes_on=False)) >= 12
    assert dependent.alarms(dependent.beginning(20, 20, 0, 4)) <= most(20, dependent.BEGINNING_ALLOWED)


def test_the_first_runs_after_a_baseline_would_alarm_if_successive_requests_were_not_compared(monkeypatch):
    assert dependent.alarms(dependent.beginning(20, 60, 0, 1)) <= 3
    monkeypatch.setattr(dependent, "difference_inflations", lambda _, rows: np.ones(len(rows)))
    assert dependent.alarms(dependent.beginning(20, 60, 0, 1)) >= 10


def test_a_change_to_requests_that_hardly_differ_is_found():
    assert dependent.alike_row(20, 0).holds
