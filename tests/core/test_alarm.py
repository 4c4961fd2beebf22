import math
from dataclasses import replace

import numpy as np
import pytest
from tests.support.records import Truth, log_softmax, make_record
from tests.support.work import instructions

from hemostat_calibration.alarm import (
    BudgetTest,
    ChangeTest,
    Kind,
    Observation,
    Settings,
    change,
    fit_bets,
    init,
    load,
    readings,
    rebase,
    save,
    spread,
    update,
)
from hemostat_calibration.errors import InvalidArgumentError

ALPHA = 0.05


def requests(rng, count, *, scale=1.0, effect=0.15):
    """Spreads of requests: log-normal around 0.07, tokens autocorrelated, requests with a level of their own."""
    found = []
    for _ in range(count):
        n = int(rng.integers(8, 96))
        noise = rng.normal(size=n)
        for t in range(1, n):
            noise[t] = 0.3 * noise[t - 1] + 0.95 * noise[t]
        found.append(scale * 0.07 * np.exp(0.3 * noise + effect * rng.normal()))
    return found


def crossed(test, stream):
    for request in stream:
        test = test.update(request)
        if test.crossing is not None:
            return test.crossing
    return None


@pytest.mark.parametrize("effect", [0.1, 0.3])
def test_the_change_test_keeps_its_error_though_tokens_are_correlated(effect):
    """Over a whole run of requests drawn from fresh ones, with another baseline in every run. The effect of requests
    (0.06 in measured noise, whose tokens have 0.28) is up to as large as that of tokens."""
    runs, wrong = 80, 0
    for run in range(runs):
        rng = np.random.default_rng(run)
        bets = fit_bets(requests(rng, 200, effect=effect), ALPHA / 4)
        wrong += crossed(ChangeTest.begin(bets, ALPHA), requests(rng, 60, effect=effect)) is not None
    assert wrong / runs <= ALPHA + 2 * math.sqrt(ALPHA * (1 - ALPHA) / runs)


def test_without_the_powers_it_would_not(monkeypatch):
    """The simulation above can fail: with every strategy at full power, odd requests alarm."""
    monkeypatch.setattr(change, "_loses", lambda *_: True)
    wrong = 0
    for run in range(60):
        rng = np.random.default_rng(run)
        bets = fit_bets(requests(rng, 200, effect=0.5), ALPHA / 4)
        wrong += crossed(ChangeTest.begin(bets, ALPHA), requests(rng, 60, effect=0.5)) is not None
    assert wrong / 60 > 0.3


@pytest.mark.parametrize(("scale", "within"), [(3.0, 40), (1.5, 500), (0.6, 500)])
def test_a_change_is_found_soon_in_both_directions(scale, within):
    delays, begun = [], []
    for run in range(15):
        rng = np.random.default_rng(run)
        bets = fit_bets(requests(rng, 300), 0.0025)
        test = ChangeTest.begin(bets, 0.01)
        for now, request in enumerate(requests(rng, 30)):
            test = test.update(request, now)
        assert test.crossing is None
        for now, request in enumerate(requests(rng, 60, scale=scale), 30):
            test = test.update(request, now)
        assert test.crossing is not None
        assert test.crossing.since <= test.crossing.at
        begun.append(test.crossing.since)
        assert test.crossing.log_wealth >= math.log(200)
        delays.append(test.crossing.tokens)
    assert np.median(delays) <= within
    assert 28 <= np.median(begun) <= 33


def test_the_evidence_is_told_to_the_token():
    rng = np.random.default_rng(0)
    test = ChangeTest.begin(fit_bets(requests(rng, 200), 0.0025), 0.01)
    found = test.update(np.full(500, 1.0), now=7.0).crossing
    again = test.update(np.full(found.tokens - 1, 1.0)).crossing
    assert (found.since, found.at, found.requests) == (7.0, 7.0, 1)
    assert found.tokens < 20
    assert again is None


def test_the_budget_test_keeps_its_error_at_the_budget_itself():
    """Mean exactly what is allowed; long requests are the good ones; a heavy tail."""
    runs, wrong = 300, 0
    for run in range(runs):
        rng = np.random.default_rng(run)
        test = BudgetTest(budget=0.2, cap=5.0, max_tokens=64, alpha=ALPHA)
        for _ in range(150):
            level = rng.choice([0.1, 0.4])
            n = 48 if level == 0.1 else 24
            test = test.update(level * rng.lognormal(-0.5, 1.0) * rng.exponential(1.0, n), noise_floor=0.0)
        wrong += test.crossing is not None
    assert wrong / runs <= ALPHA / 2 + 3 * math.sqrt(ALPHA / 2 / runs)


def test_what_is_over_the_budget_is_found_and_the_floor_is_allowed():
    rng = np.random.default_rng(0)
    stream = [rng.exponential(0.3, 50) for _ in range(200)]
    over, floor = (BudgetTest(budget=0.1, cap=5.0, max_tokens=64, alpha=0.01) for _ in range(2))
    for now, values in enumerate(stream):
        over, floor = over.update(np.append(values, np.nan), 0.05, now), floor.update(values, 0.25, now)
    assert over.crossing is not None
    assert over.crossing.requests <= 40
    assert over.crossing.tokens == 50 * over.crossing.requests
    assert floor.crossing is None
    waits = BudgetTest(budget=0.1, cap=5.0, max_tokens=64, alpha=0.01)
    assert waits.update(stream[0], math.inf) is waits


def test_the_spread_ignores_what_is_constant():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(5, 40))
    off = 0.3 * rng.normal(size=(5, 40))
    truth = Truth(log_softmax(z), log_softmax(z + off), np.zeros(5, int))
    np.testing.assert_allclose(spread(make_record(truth, 40)), off.std(axis=1, ddof=1))
    few = make_record(truth, 10, reference_k=10)
    shared = np.isfinite(few.reference_at) & (few.compressed.ids >= 0)
    for t in range(5):
        expected = off[t, few.compressed.ids[t, shared[t]]].std(ddof=1)
        np.testing.assert_allclose(spread(few)[t], expected)
    alone = replace(few, reference_at=np.full(few.reference_at.shape, np.nan))
    assert np.isnan(spread(alone)).all()


SETTINGS = Settings(alpha=0.06, budget=0.5, baseline_tokens=4000, clear_after=10)


def play(alarm, route, stream, *, now=0.0, divergence=0.1, floor=0.01):
    for request in stream:
        now += 1.0
        alarm = update(alarm, route, Observation(now, np.full(len(request), divergence), request), floor)
    return alarm


def reading(alarm, kind, route="chat"):
    return next(r for r in readings(alarm) if (r.route, r.kind) == (route, kind))


def test_an_alarm_learns_raises_clears_and_spends():
    rng = np.random.default_rng(0)
    alarm = play(init(SETTINGS), "chat", requests(rng, 30))
    assert 0.2 < reading(alarm, Kind.CHANGE).learning < 0.8
    alarm = play(alarm, "chat", requests(rng, 100), now=30)
    first = reading(alarm, Kind.CHANGE)
    assert (first.test, first.alpha, first.learning, first.raised) == (2, pytest.approx(0.01), 1.0, None)
    assert first.requests > 10
    alarm = play(alarm, "chat", requests(rng, 35, scale=4.0), now=130)
    raised = reading(alarm, Kind.CHANGE).raised
    assert raised.since in {130.0, 131.0}
    assert raised.at <= 133
    assert reading(alarm, Kind.BUDGET).raised is None
    alarm = play(alarm, "chat", requests(rng, 15), now=165)
    assert reading(alarm, Kind.CHANGE).raised is not None
    alarm = play(alarm, "chat", requests(rng, 20), now=180)
    again = reading(alarm, Kind.CHANGE)
    assert (again.raised, again.test, again.alpha) == (None, 3, pytest.approx(0.06 / 12))


def test_the_budget_alarm_clears_too():
    rng = np.random.default_rng(0)
    alarm = play(init(SETTINGS), "chat", requests(rng, 40), divergence=2.0)
    assert reading(alarm, Kind.BUDGET).raised is not None
    alarm = play(alarm, "chat", requests(rng, 25), divergence=0.1)
    assert reading(alarm, Kind.BUDGET).raised is None


def test_routes_share_the_error_and_rebase_learns_anew():
    rng = np.random.default_rng(0)
    alarm = init(replace(SETTINGS, budget=None))
    for route in "abc":
        alarm = play(alarm, route, requests(rng, 110))
    spent = [reading(alarm, Kind.CHANGE, route).alpha for route in "abc"]
    assert spent == pytest.approx([0.03, 0.01, 0.005])
    alarm = rebase(play(alarm, "b", requests(rng, 5, scale=4.0)), "b")
    assert reading(alarm, Kind.CHANGE, "b").learning == 0.0
    alarm = play(alarm, "b", requests(rng, 120, scale=4.0))
    learned = reading(alarm, Kind.CHANGE, "b")
    assert (learned.raised, learned.test) == (None, 4)


def test_what_is_saved_goes_on_as_it_was():
    rng = np.random.default_rng(0)
    alarm = play(init(SETTINGS), "chat", requests(rng, 130))
    alarm = play(alarm, "new", requests(rng, 10))
    stream = requests(rng, 8, scale=1.5)
    kept = play(alarm, "chat", stream)
    loaded = play(load(save(alarm), SETTINGS), "chat", stream)
    assert repr(readings(loaded)) == repr(readings(kept))
    for data in (b"", b"{}", b"[1]", b'{"is": "Alarm", "fields": {"x": 1}}', b'{"is": "nothing", "fields": {}}', b"1"):
        with pytest.raises(InvalidArgumentError, match="begin anew"):
            load(data, SETTINGS)


STORED = (
    '{"is": "Alarm", "fields": {"settings": {"is": "Settings", "fields": {"alpha": 0.01, "budget": 0.5, "'
    'cap": 5.0, "most_tokens": 256, "baseline_tokens": 0, "clear_after": 30}}, "tests": 1, "routes": {"is'
    '": "mapping", "items": [["chat", {"is": "_Route", "fields": {"budget": {"is": "_Watch", "fields": {"'
    'test": {"is": "BudgetTest", "fields": {"budget": 0.5, "cap": 5.0, "most_tokens": 256, "alpha": 0.005'
    ', "purse": {"is": "_Purse", "fields": {"log_capital": {"is": "array", "dtype": "<f8", "shape": [5], '
    '"data": "!ewYK41EH?Vui{rKX(Ga-AL$Oc5wp0m;Km#ooxcZE%m@PMQj4V"}, "since": {"is": "array", "dtype": "<f'
    '8", "shape": [5], "data": "00000001070000000107000000010700000001070000000107"}, "first_request": {"'
    'is": "array", "dtype": "<i8", "shape": [5], "data": "00000000000000000000000000000000000000000000000'
    '000"}, "first_token": {"is": "array", "dtype": "<i8", "shape": [5], "data": "00000000000000000000000'
    '000000000000000000000000000"}, "requests": 1, "tokens": 3}}, "crossing": null}}, "number": 1, "calm"'
    ': null, "calm_requests": 0}}, "change": null, "baseline": [], "bets": null}}]]}}}'
)


def test_the_stored_format_stays_as_it_was():
    """Written before the classes were renamed."""
    alarm = load(STORED.encode(), Settings(budget=0.5, baseline_tokens=0))
    assert save(alarm).decode() == STORED
    assert (reading(alarm, Kind.BUDGET).requests, reading(alarm, Kind.BUDGET).tokens) == (1, 3)


def test_memory_and_work_are_bounded():
    rng = np.random.default_rng(0)
    alarm = play(init(SETTINGS), "chat", requests(rng, 150))
    before = len(save(alarm))
    one = requests(rng, 1)
    work = instructions(lambda: play(alarm, "chat", one))
    later = play(alarm, "chat", requests(rng, 2000))
    assert len(save(later)) < before + 500
    assert instructions(lambda: play(later, "chat", one)) <= 1.1 * work < 10_000


def test_a_baseline_that_says_nothing_gives_no_bets():
    """Requests that are each all one value: their tokens say nothing that the first did not."""
    rng = np.random.default_rng(0)
    bets = fit_bets([np.full(200, rng.lognormal()) for _ in range(100)], 0.01)
    alarm = ChangeTest.begin(bets, 0.01)
    for _ in range(30):
        alarm = alarm.update(np.full(200, rng.lognormal()))
    assert alarm.crossing is None


def test_a_baseline_without_any_noise_bets_on_noise():
    test = ChangeTest.begin(fit_bets([np.zeros(20)] * 100, 0.0025), 0.01)
    for _ in range(50):
        test = test.update(np.zeros(20))
    assert test.crossing is None
    found = test.update(np.full(20, 0.01)).crossing
    assert found.tokens <= 8


def test_arguments():
    with pytest.raises(InvalidArgumentError, match="at least two"):
        fit_bets([], 0.01)
    with pytest.raises(InvalidArgumentError, match="at least two"):
        fit_bets([np.ones(5)], 0.01)
    for wrong, name in (
        ({"alpha": 1.0}, "alpha"),
        ({"budget": 0.0}, "budget"),
        ({"budget": 9.0}, "budget"),
        ({"cap": math.inf}, "cap"),
        ({"clear_after": 0}, "clear_after"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"baseline_tokens": -1}, "baseline_tokens"),
    ):
        with pytest.raises(InvalidArgumentError, match=name):
            Settings(**wrong)
