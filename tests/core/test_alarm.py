import json
import math
from dataclasses import replace

import numpy as np
import pytest
from tests.support.records import Truth, log_softmax, make_record
from tests.support.work import instructions

from hemostat_calibration.alarm import (
    AlarmTest,
    BudgetTest,
    ChangeTest,
    Observation,
    Settings,
    Workload,
    baseline,
    begun_tests,
    fit_baseline,
    init,
    kind_readings,
    load,
    readings,
    rebase,
    request_spread,
    save,
    spread,
    update,
    weighted_spread_ratio,
    with_settings,
)
from hemostat_calibration.alarm import alarm as alarm_module
from hemostat_calibration.errors import InvalidArgumentError

ALPHA = 0.05


def requests(rng, count, *, scale=1.0, effect=0.15, lengths=(8, 96)):
    """Spreads of requests: log-normal around 0.07, tokens autocorrelated, requests with a level of their own."""
    levels = []
    for _ in range(count):
        n = int(rng.integers(*lengths))
        noise = rng.normal(size=n)
        for t in range(1, n):
            noise[t] = 0.3 * noise[t - 1] + 0.95 * noise[t]
        levels.append(scale * 0.07 * np.exp(0.3 * noise + effect * rng.normal()))
    return levels


def test_the_evidence_of_a_baseline_is_against_no_true_mean():
    """Of baselines of a skewed distribution, without regard to what it is: by ramp, how often the true mean is above
    the limit of a level, and what wealth is multiplied by at the first level whose limit is not below it."""
    rng = np.random.default_rng(0)
    every = -np.log1p(-(np.arange(2000) + 0.5) / 2000)
    runs, tested = 400, baseline.LEVELS.tolist().index(3.0)
    weights = np.exp(np.concatenate([baseline.LEVELS[:1], baseline.LEVELS[:-1]]))
    wrong, counted = np.zeros((runs, 3)), np.zeros((runs, 3))
    for run in range(runs):
        rows = np.column_stack([rng.exponential(size=150), np.full(150, 50.0), np.zeros(150)])
        usual = fit_baseline(rows)
        scores = (every - usual.centre) / usual.scale / math.sqrt(1.0 + usual.half_tokens / 50.0)
        above = baseline._ramps(scores, scores).mean(axis=0) > usual.limits
        wrong[run], counted[run] = above[tested], weights[above.argmin(axis=0)]
    assert (wrong.mean(axis=0) <= math.exp(-3.0) + 2 * math.sqrt(math.exp(-3.0) / runs)).all()
    assert (counted.mean(axis=0) <= baseline.MEAN_FACTOR + 2 * counted.std(axis=0) / math.sqrt(runs)).all()
    assert wrong.any(), "limits are not so far away that nothing is found"


def test_one_request_is_one_bounded_bet():
    rng = np.random.default_rng(0)
    usual = fit_baseline(np.array([request_spread(r).row() for r in requests(rng, 2000)]))
    test = ChangeTest(0.005, 1.25)
    for _ in range(10):
        test = test.update(usual, request_spread(requests(rng, 1)[0]))
    before = test.wealth.log_evidence
    odd = test.update(usual, request_spread(np.full(100_000, 1e3)))
    assert before < odd.wealth.log_evidence <= before + math.log(1.0 / baseline.MIN_LIMIT)
    assert odd.crossing is None


@pytest.mark.parametrize(("scale", "within"), [(4.0, 8), (2.0, 25), (0.4, 25)])
def test_a_change_is_found_soon_in_both_directions(scale, within):
    delays, begun = [], []
    for run in range(15):
        rng = np.random.default_rng(run)
        usual = fit_baseline(np.array([request_spread(r).row() for r in requests(rng, 150)]), 0.5)
        test = ChangeTest(Settings().change_alpha, 1.25)
        for now, request in enumerate(requests(rng, 30)):
            test = test.update(usual, request_spread(request), now)
        assert test.crossing is None
        for now, request in enumerate(requests(rng, 80, scale=scale), 30):
            test = test.update(usual, request_spread(request), now)
        assert test.crossing is not None
        assert test.crossing.since <= test.crossing.at
        assert test.crossing.log_wealth >= math.log(100)
        assert test.crossing.tokens >= test.crossing.requests
        begun.append(test.crossing.since)
        delays.append(test.crossing.at - 29)
    assert np.median(delays) <= within
    assert 26 <= np.median(begun) <= 40


def test_the_budget_test_keeps_its_error_at_the_budget_itself():
    """Mean exactly what is allowed; long requests are the good ones; a heavy tail."""
    runs, wrong = 300, 0
    for run in range(runs):
        rng = np.random.default_rng(run)
        test = BudgetTest(budget=0.2, cap=5.0, max_tokens=64, alpha=ALPHA / 2)
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


def test_a_request_without_divergence_costs_each_strategy_a_part_of_its_wealth_and_never_all():
    factors = BudgetTest(budget=0.1, cap=5.0, max_tokens=64, alpha=0.01).log_factors(np.zeros(64), 0.0)
    assert np.all(np.isfinite(factors))
    assert np.all(factors < 0.0)


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


# --- the alarm of all kinds ------------------------------------------------------------------------------------------

SETTINGS = Settings(alpha=0.06, budget=0.5, baseline_requests=60, clear_after=10)


def play(alarm, kind, stream, *, now=0.0, divergence=0.1, floor=0.01, pooled=False):
    for request in stream:
        now += 1.0
        alarm = update(alarm, kind, Observation(now, np.full(len(request), divergence), request, pooled), floor)
    return alarm


def reading(alarm, test, kind=""):
    return next(r for r in readings(alarm) if (r.test, r.kind) == (test, kind))


def of_kind(alarm, kind):
    return next(r for r in kind_readings(alarm) if r.kind == kind)


def learned(alarm, kind, rng, *, scale=1.0, effect=0.15):
    """The baseline of the kind is complete."""
    while not alarm.kinds or kind not in alarm.kinds or not of_kind(alarm, kind).watched:
        alarm = play(alarm, kind, requests(rng, 1, scale=scale, effect=effect))
    return alarm


def test_an_alarm_learns_raises_clears_and_spends():
    rng = np.random.default_rng(0)
    alarm = play(init(SETTINGS), "chat", requests(rng, 30))
    assert (of_kind(alarm, "chat").baseline_requests, of_kind(alarm, "chat").watched) == (30, False)
    assert reading(alarm, AlarmTest.CHANGE).number == 0
    alarm = play(alarm, "chat", requests(rng, 50), now=30)
    first = reading(alarm, AlarmTest.CHANGE)
    assert (first.number, first.alpha, first.raised) == (1, SETTINGS.change_alpha, None)
    assert 0.8 * 0.03 < first.alpha < 0.03
    assert first.requests == 20
    alarm = play(alarm, "chat", requests(rng, 35, scale=6.0), now=80)
    raised = reading(alarm, AlarmTest.CHANGE).raised
    assert raised.since in {80.0, 81.0, 82.0}
    assert raised.at <= 92
    assert of_kind(alarm, "chat").spread_ratio > 3.0
    assert reading(alarm, AlarmTest.BUDGET, "chat").raised is None
    alarm = play(alarm, "chat", requests(rng, 4), now=115)
    assert reading(alarm, AlarmTest.CHANGE).raised is not None
    alarm = play(alarm, "chat", requests(rng, 30), now=119)
    again = reading(alarm, AlarmTest.CHANGE)
    assert (again.raised, again.number, again.alpha) == (None, 2, first.alpha)


def test_the_budget_alarm_clears_too():
    rng = np.random.default_rng(0)
    alarm = play(init(SETTINGS), "chat", requests(rng, 160), divergence=2.0)
    assert reading(alarm, AlarmTest.BUDGET, "chat").raised is not None
    alarm = play(alarm, "chat", requests(rng, 25), divergence=0.1)
    assert reading(alarm, AlarmTest.BUDGET, "chat").raised is None


def test_all_kinds_with_a_baseline_feed_one_test():
    rng = np.random.default_rng(0)
    alarm = init(replace(SETTINGS, budget=None))
    for kind in "abc":
        alarm = play(learned(alarm, kind, rng), kind, requests(rng, 10))
    assert reading(alarm, AlarmTest.CHANGE).requests == 30
    assert alarm.baselines == 3
    for _ in range(6):
        for kind in "abc":
            alarm = play(alarm, kind, requests(rng, 1, scale=6.0), now=300)
    alarm = play(alarm, "new", requests(rng, 5, scale=6.0))
    raised = reading(alarm, AlarmTest.CHANGE).raised
    assert raised.requests <= 12, "no kind needs evidence of its own"
    assert of_kind(alarm, "new").baseline_requests == 5, "without a baseline it takes no part"


def test_rare_kinds_together_take_no_part_in_the_change_test():
    rng = np.random.default_rng(0)
    alarm = play(init(SETTINGS), "rest", requests(rng, 100), pooled=True)
    alarm = play(alarm, "rest", requests(rng, 40, scale=8.0), divergence=3.0, pooled=True)
    assert reading(alarm, AlarmTest.CHANGE).number == 0
    assert reading(alarm, AlarmTest.BUDGET, "rest").raised is not None


def test_rebase_learns_anew():
    rng = np.random.default_rng(0)
    alarm = init(replace(SETTINGS, budget=None))
    for kind in "ab":
        alarm = play(learned(alarm, kind, rng), kind, requests(rng, 10))
    alarm = play(alarm, "b", requests(rng, 20, scale=6.0))
    assert reading(alarm, AlarmTest.CHANGE).raised is not None
    rebased = rebase(alarm, "b")
    assert alarm.workload.complete
    assert rebased.workload.complete, "a new baseline of one kind says nothing about the mix"
    assert (of_kind(rebased, "a").watched, of_kind(rebased, "b").baseline_requests) == (True, 0)
    assert reading(rebased, AlarmTest.CHANGE).raised is None
    rebased = play(learned(rebased, "b", rng, scale=6.0), "b", requests(rng, 20, scale=6.0))
    again = reading(rebased, AlarmTest.CHANGE)
    assert (again.raised, again.number, rebased.baselines) == (None, 2, 3)
    everything = rebase(alarm)
    assert not any(each.watched for each in kind_readings(everything))
    assert not everything.workload.baseline, "the mix is learned anew, too"


def test_the_mix_of_kinds_is_compared_and_weighted_back():
    rng = np.random.default_rng(0)
    alarm = init(replace(SETTINGS, budget=None))
    for _ in range(100):
        alarm = play(alarm, "a", requests(rng, 3, effect=0.02))
        alarm = play(alarm, "b", requests(rng, 1, effect=0.02))
    assert not alarm.workload.changed(0.01)
    assert of_kind(alarm, "a").baseline_share == pytest.approx(0.75)
    for _ in range(60):
        alarm = play(alarm, "b", requests(rng, 3, effect=0.02, scale=1.5))
        alarm = play(alarm, "a", requests(rng, 1, effect=0.02))
    assert alarm.workload.changed(0.01)
    assert alarm.workload.distance == pytest.approx(0.5, abs=0.1)
    assert weighted_spread_ratio(alarm) == pytest.approx(1.5**0.25, rel=0.05)
    assert weighted_spread_ratio(init(SETTINGS)) is None
    assert Workload(10).distance is None


def test_what_is_saved_goes_on_as_it_was():
    rng = np.random.default_rng(0)
    alarm = play(init(SETTINGS), "chat", requests(rng, 130))
    alarm = play(alarm, "new", requests(rng, 10))
    stream = requests(rng, 8, scale=1.5)
    kept = play(alarm, "chat", stream)
    loaded = play(load(save(alarm), SETTINGS), "chat", stream)
    assert repr(readings(loaded)) == repr(readings(kept))
    assert save(loaded) == save(kept)
    for data in (
        b"",
        b"{}",
        b"[1]",
        save(alarm).replace(b'"baselines":', b'"baseline":'),
        save(alarm).replace(b'"tolerance":1', b'"tolerance":"1'),
        b"1",
        b'{"schema": 10}',
        save(alarm).replace(b'"ratio":1', b'"ratio":-1'),
    ):
        with pytest.raises(InvalidArgumentError, match="begin anew"):
            load(data, SETTINGS)


OLD = json.dumps({"schema": 4, "state": {"budget_tests": 7, "change_tests": 2, "routes": {}}})


def test_an_alarm_of_an_older_version_is_refused_by_name_and_its_alpha_stays_spent():
    with pytest.raises(InvalidArgumentError, match=r"schema 4, this version reads 9; begin anew"):
        load(OLD.encode(), SETTINGS)
    assert begun_tests(OLD.encode()) == 7
    rng = np.random.default_rng(0)
    alarm = play(init(SETTINGS, begun_tests(OLD.encode())), "chat", requests(rng, 100))
    assert alarm.baselines == 8
    assert reading(alarm, AlarmTest.BUDGET, "chat").alpha == pytest.approx(0.015 / (8 * 9))
    assert begun_tests(save(alarm)) == 8


def test_a_state_from_before_recent_dependence_was_estimated_goes_on():
    rng = np.random.default_rng(0)
    alarm = play(init(SETTINGS), "chat", requests(rng, 130))
    stored = json.loads(save(alarm))
    stored["schema"] = 7
    del stored["state"]["recent"]
    for kind in stored["state"]["kinds"].values():
        del kind["recent"], kind["recent_divergences"], kind["differences"]
    loaded = load(json.dumps(stored).encode(), SETTINGS)
    assert repr(readings(loaded)) == repr(readings(alarm))
    assert of_kind(play(loaded, "chat", requests(rng, 200)), "chat").watched
    stored["schema"] = 9
    with pytest.raises(InvalidArgumentError, match=r"Alarm\.recent is missing; begin anew"):
        load(json.dumps(stored).encode(), SETTINGS)


def test_a_state_from_before_successive_requests_were_compared_goes_on():
    rng = np.random.default_rng(0)
    alarm = play(init(SETTINGS), "chat", requests(rng, 200))
    stored = json.loads(save(alarm))
    stored["schema"] = 8
    for kind in stored["state"]["kinds"].values():
        del kind["differences"]
    loaded = load(json.dumps(stored).encode(), SETTINGS)
    assert repr(readings(loaded)) == repr(readings(alarm))
    assert of_kind(play(loaded, "chat", requests(rng, 50)), "chat").watched


def test_the_first_run_of_alike_requests_after_the_baseline_counts_little():
    rng = np.random.default_rng(0)
    alarm = learned(init(replace(SETTINGS, alpha=1e-9, budget=None)), "chat", rng)
    alarm = play(alarm, "chat", requests(rng, 5))
    before = alarm.change.test.wealth.effective
    alarm = play(alarm, "chat", requests(rng, 1) * 40)
    assert alarm.kinds["chat"].recent.value < 3.0, "so few requests say nothing in batches"
    assert alarm.change.test.wealth.effective - before < 16.0
    alarm = play(alarm, "chat", requests(rng, 40))
    assert alarm.kinds["chat"].differences.value < 4.0, "they are independent again"


def test_requests_that_begin_to_depend_on_each_other_after_the_baseline_are_fewer_effective_ones():
    """Runs of 20 alike ones, within the same distribution: taken for independent they raise the alarm."""
    rng = np.random.default_rng(0)
    alarm = learned(init(replace(SETTINGS, alpha=1e-9, budget=None)), "chat", rng)

    def alike(count):
        return [level for effect in 0.15 * rng.normal(size=count) for level in requests(rng, 20, scale=np.exp(effect))]

    alarm = play(alarm, "chat", requests(rng, 300))
    assert alarm.kinds["chat"].recent.value < 3.0
    alarm = play(alarm, "chat", alike(40))
    assert alarm.kinds["chat"].recent.value > 3.5
    before = alarm.change.test.wealth.effective
    alarm = play(alarm, "chat", alike(2))
    assert alarm.change.test.wealth.effective - before < 40 / 3.0


def test_memory_and_work_are_bounded():
    rng = np.random.default_rng(0)
    alarm = play(init(SETTINGS), "chat", requests(rng, 850))
    before = len(save(alarm))
    levels = requests(rng, 1)
    work = instructions(lambda: play(alarm, "chat", levels))
    later = play(alarm, "chat", requests(rng, 2000))
    assert len(save(later)) < before + 500 < 16_000
    assert instructions(lambda: play(later, "chat", levels)) <= 1.2 * work < 25_000
    many = init(SETTINGS)
    for number in range(300):
        many = play(many, str(number), levels, now=float(number))
    assert len(kind_readings(many)) == 128
    assert of_kind(many, "299").baseline_requests == 1


def test_a_baseline_without_any_noise_bets_on_noise():
    usual = fit_baseline(np.array([request_spread(np.zeros(20)).row()] * 100))
    test = ChangeTest(0.005, 1.25)
    for _ in range(50):
        test = test.update(usual, request_spread(np.zeros(20)))
    assert test.crossing is None
    for _ in range(12):
        test = test.update(usual, request_spread(np.full(20, 0.01)))
    assert test.crossing.requests <= 12
    assert request_spread(np.full(3, math.nan)) is None
    assert request_spread(np.ones(1)).contrast == 0.0


def test_arguments():
    with pytest.raises(InvalidArgumentError, match="at least 30"):
        fit_baseline(np.ones((5, 3)))
    for wrong, name in (
        ({"alpha": 1.0}, "alpha"),
        ({"budget": 0.0}, "budget"),
        ({"budget": 9.0}, "budget"),
        ({"cap": math.inf}, "cap"),
        ({"clear_after": 0}, "clear_after"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"baseline_requests": 29}, "baseline_requests"),
        ({"tolerance": 0.9}, "tolerance"),
    ):
        with pytest.raises(InvalidArgumentError, match=name):
            Settings(**wrong)


def test_runs_of_alike_requests_make_a_baseline_longer_and_evidence_slower():
    """The baseline of independent requests is complete as soon as there are enough of them."""
    rng = np.random.default_rng(0)
    settings = replace(SETTINGS, budget=None)

    def run(length):
        return [level for level in requests(rng, 400 // length) for _ in range(length)]

    alone, alike = (play(init(settings), "chat", run(length)) for length in (1, 5))
    assert of_kind(alone, "chat").baseline_requests < of_kind(alike, "chat").baseline_requests
    assert of_kind(alone, "chat").inflation < 2.0
    assert of_kind(alike, "chat").inflation > 4.0
    assert of_kind(load(save(alike), settings), "chat") == of_kind(alike, "chat")


def test_a_baseline_that_takes_long_keeps_every_second_request(monkeypatch):
    monkeypatch.setattr(alarm_module, "MAX_LEARNING", 200)
    given = [requests(np.random.default_rng(n // 40), 1)[0] for n in range(250)]
    state = play(init(replace(SETTINGS, budget=None)), "chat", given)
    of_chat = of_kind(state, "chat")
    assert (of_chat.watched, of_chat.baseline_requests) == (False, 250)
    assert (state.kinds["chat"].stride, len(state.kinds["chat"].learning)) == (2, 125)


def test_a_baseline_spans_a_cycle():
    settings = replace(SETTINGS, budget=None, baseline_requests=30, cycle=99.0)
    state = init(settings)
    for now, levels in enumerate(requests(np.random.default_rng(0), 101)):
        state = update(state, "chat", Observation(float(now), np.full(len(levels), 0.1), levels))
        assert of_kind(state, "chat").watched == (now >= 99)


def test_another_tolerance_reaches_a_test_that_has_begun():
    rng = np.random.default_rng(0)
    alarm = play(learned(init(SETTINGS), "chat", rng), "chat", requests(rng, 20))
    wider = replace(SETTINGS, tolerance=4.0)
    again = with_settings(alarm, wider)
    assert reading(again, AlarmTest.CHANGE).requests == 0
    again = play(again, "chat", requests(rng, 40, scale=2.0), now=1000.0)
    assert reading(again, AlarmTest.CHANGE).raised is None
    alarm = play(alarm, "chat", requests(rng, 40, scale=2.0), now=1000.0)
    assert reading(alarm, AlarmTest.CHANGE).raised is not None
    assert reading(with_settings(alarm, wider), AlarmTest.CHANGE).raised is None
    assert not with_settings(alarm, replace(SETTINGS, baseline_requests=0)).change


def test_a_clock_that_is_set_is_no_evidence():
    """A machine starts in 1970, and has the time of the network before its second request."""
    rng = np.random.default_rng(0)
    usual = fit_baseline(np.array([request_spread(each).row() for each in requests(rng, 200)]))
    test, typical = ChangeTest(0.001, 1.25), request_spread(requests(rng, 1)[0])
    for now in (5.0, 1.7e9, 5.0, 1.7e9, 1.7e9 + 1.0):
        test = test.update(usual, typical, now)
    assert test.crossing is None
    assert test.wealth.log_evidence < 0.0
    budget = BudgetTest(0.1, 5.0, 64, 0.001)
    for now in (5.0, 1.7e9):
        budget = budget.update(np.full(1, 0.1), 0.0, now)
    assert budget.crossing is None


def test_a_clock_that_is_set_opens_no_gate():
    rng = np.random.default_rng(0)
    settings = replace(SETTINGS, cycle=86_400.0)
    alarm = play(init(settings), "chat", requests(rng, 200), now=5.0)
    alarm = play(alarm, "chat", requests(rng, 200), now=1.7e9)
    assert not of_kind(alarm, "chat").watched
    assert not alarm.budget_tests
    assert not alarm.workload.complete
    for day in range(1, 3):
        alarm = play(alarm, "chat", requests(rng, 10), now=1.7e9 + 86_400.0 * day)
    assert of_kind(alarm, "chat").watched
    assert alarm.budget_tests == 1
