"""The alarm's worlds can fail, and they bet as the alarm does."""

from dataclasses import replace

import numpy as np
from tests.bench.guard import alarm as worlds
from tests.bench.guard import most

from hemostat_calibration.alarm import ChangeTest, RequestSpread, baseline, fit_baseline

LIVES = 50


def null(rng, effect=0.2):
    count = worlds.SETTINGS.baseline_requests + worlds.REQUESTS
    return worlds.one_kind(worlds.simulated(rng, count, worlds.normal_effects(rng, count, effect), worlds.SHORT))


def shifted(rng, factor=1.2):
    n = worlds.SETTINGS.baseline_requests
    before, after = (worlds.normal_effects(rng, count, 0.1) for count in (n, worlds.REQUESTS))
    return worlds.one_kind(
        worlds.simulated(rng, n, before, worlds.SHORT),
        worlds.simulated(rng, worlds.REQUESTS, after, worlds.SHORT, factor),
    )


def test_shares_in_place_of_limits_would_alarm_without_a_change(monkeypatch):
    """The simulations can fail: the baseline's own shares are too small as probabilities; the tolerance hides that."""
    exact = replace(worlds.SETTINGS, tolerance=1.0)
    assert worlds.alarms(LIVES, 0, null, exact) <= most(LIVES, exact.alpha)
    monkeypatch.setattr(baseline, "upper_limit", lambda hits, trials, alpha: (hits + 0.2) / trials)
    monkeypatch.setattr(baseline, "MIN_LIMIT", 1e-3)
    assert worlds.alarms(LIVES, 0, null, exact) >= 6


def test_without_a_tolerance_a_workload_shift_would_alarm():
    assert worlds.alarms(LIVES, 0, shifted, replace(worlds.SETTINGS, tolerance=1.0)) >= 25


def test_levels_without_regard_to_length_would_alarm_on_short_answers(monkeypatch):
    def shorter(rng):
        n = worlds.SETTINGS.baseline_requests
        before, after = (worlds.normal_effects(rng, count, 0.02) for count in (n, worlds.REQUESTS))
        return worlds.one_kind(
            worlds.simulated(rng, n, before, worlds.LONG), worlds.simulated(rng, worlds.REQUESTS, after, (2, 6))
        )

    settings = replace(worlds.SETTINGS, tolerance=1.1)
    assert worlds.alarms(LIVES, 0, shorter, settings) <= most(LIVES, 0.01)
    monkeypatch.setattr(baseline, "_half_tokens", lambda *_: 0.0)
    assert worlds.alarms(LIVES, 0, shorter, settings) >= 25


def test_the_simulations_bet_as_the_test_does():
    kinds, rows = shifted(np.random.default_rng(3), factor=1.8)
    n = worlds.SETTINGS.baseline_requests
    usual = fit_baseline(rows[:n], worlds.SETTINGS.half_share / 2)
    test = ChangeTest(worlds.SETTINGS.half_share / 2, worlds.SETTINGS.tolerance)
    for level, tokens, contrast in rows[n:]:
        test = test.update(usual, RequestSpread(level, int(tokens), contrast))
    assert test.crossing is not None
    assert worlds.crossing(kinds, rows) == n + test.wealth.requests - 1
