"""Variance inflation by batch means, against the batch computation and the known v of processes."""

import json
import math

import numpy as np
import pytest

from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.guard import kind_test
from hemostat_calibration.guard.decisions import Action, Admission
from hemostat_calibration.guard.guard import MIN_CYCLES, Guard
from hemostat_calibration.statistics.dependence import (
    MIN_EFFECTIVE,
    MIN_HISTORY,
    MIN_UNITS,
    BatchMeans,
    ClientBatches,
    KindDependence,
)

SERIES = 200


def runs(rng, length, n, series=SERIES):
    return np.repeat(rng.normal(size=(-(-n // length), series)), length, axis=0)[:n]


def fed(x, n=None):
    means = BatchMeans.of(x.shape[1])
    for at, row in enumerate(x):
        means = means.update(row, 1.0 if n is None else n[at])
    return means


@pytest.mark.parametrize("units", [48, 100, 777, 4096])
def test_ratios_are_those_of_all_batches(units):
    rng = np.random.default_rng(units)
    n = rng.integers(1, 50, (units, 2)).astype(float)
    x = n * rng.gamma(2.0, 0.2, (units, 2))
    result = fed(x, n).ratios()
    mean = x.sum(axis=0) / n.sum(axis=0)
    for level, row in enumerate(result):
        count = units >> level
        residual = (x - mean * n)[: count << level].reshape(count, 1 << level, 2).sum(axis=1)
        first = (x - mean * n) ** 2
        expected = (residual**2).sum(axis=0) / (count - 1) / (1 << level) / (first.sum(axis=0) / (units - 1))
        assert row == pytest.approx(expected)


@pytest.mark.parametrize("length", [1, 3, 10, 20])
def test_v_of_runs_is_their_length(length):
    """At 2,000 units; an upper limit in most series."""
    result = fed(runs(np.random.default_rng(length), length, 2000)).inflation()
    assert length <= np.median(result) <= 1.5 * length
    assert (result >= 0.85 * length).mean() >= 0.9


def test_dependence_over_more_units_than_were_seen_is_not_estimated():
    rng = np.random.default_rng(0)
    few, many = fed(runs(rng, 100, 400)), fed(runs(rng, 3, 400))
    assert not few.enough().any()
    assert many.enough().all()


def test_what_the_units_of_a_day_have_in_common_is_seen_in_a_few_days():
    """Three days of 256 units: 100 units of one day have 100 times the variance of the days in common."""
    rng = np.random.default_rng(0)
    days = fed(np.repeat(rng.normal(0.0, 0.5, (3, SERIES)), 256, axis=0) + rng.normal(size=(768, SERIES)))
    true = (1.0 + 100 * 0.25) / 1.25
    assert (days.inflation() >= true).mean() < 0.3
    assert (days.inflation_of_sums(100) >= true).mean() > 0.8
    alone = fed(rng.normal(size=(768, SERIES)))
    short, long = alone.inflation_of_sums(30), alone.inflation_of_sums(768)
    assert np.median(short) < 2.0
    assert (alone.inflation() <= short).all()
    assert (short <= long).all()


def test_nothing_is_known_of_few_units():
    means = fed(np.random.default_rng(0).normal(size=(MIN_UNITS - 1, 2)))
    assert np.isinf(means.inflation()).all()
    assert not means.enough().any()
    with pytest.raises(InvalidArgumentError, match="shape"):
        means.update(np.zeros(3))


def test_v_of_bets_is_1_until_independence_is_refuted():
    """An upper limit would be above 1.3 in most independent series; what depends is still seen."""
    alone = fed(np.random.default_rng(0).normal(size=(200, SERIES)))
    assert np.median(alone.inflation()) > 1.3
    assert (alone.inflation_of_bets() == 1.0).mean() > 0.7
    for length in (3, 10):
        in_runs = fed(runs(np.random.default_rng(length), length, 400))
        assert (in_runs.inflation_of_bets() >= length).mean() > 0.85
        assert (in_runs.inflation_of_bets() >= in_runs.inflation()).all()


def test_v_of_bets_takes_few_batches_where_asked():
    """Three days of 256 units, as above: of sums of 100 units their upper limit counts, of independent ones nothing."""
    rng = np.random.default_rng(0)
    days = fed(np.repeat(rng.normal(0.0, 0.5, (3, SERIES)), 256, axis=0) + rng.normal(size=(768, SERIES)))
    assert (days.inflation_of_bets(units=100) >= days.inflation_of_sums(100)).mean() > 0.95
    alone = fed(rng.normal(size=(768, SERIES)))
    assert (alone.inflation_of_bets(units=100) == 1.0).mean() > 0.5


def test_units_that_do_not_differ_inflate_nothing():
    assert fed(np.full((100, 1), 0.3)).inflation_of_bets().tolist() == [1.0]
    assert fed(np.full((100, 1), 0.3)).inflation().tolist() == [1.0]


def interleaved(rng, clients, length, units):
    """Each client in runs of alike units, one after the other."""
    x = np.empty((units, SERIES))
    for client in range(clients):
        own = len(x[client::clients])
        x[client::clients] = runs(rng, length, own)
    return x, np.arange(units) % clients


def test_runs_of_one_client_between_those_of_others_are_seen_by_client():
    x, who = interleaved(np.random.default_rng(0), 20, 8, 1000)
    means, clients = fed(x), ClientBatches.of(20, SERIES)
    for at, row in enumerate(x):
        clients = clients.update(np.full(SERIES, who[at]), row)
    by_client = clients.inflation(means.variance)
    assert np.median(by_client) > 7.0
    assert np.median(means.inflation()) < 5.0
    assert (clients.inflation_of_bets(means.variance) > 7.0).mean() > 0.9


def test_clients_that_differ_for_good_are_no_dependence():
    rng = np.random.default_rng(0)
    effects = rng.normal(size=(10, SERIES))
    clients, means = ClientBatches.of(10, SERIES), BatchMeans.of(SERIES)
    for at in range(1000):
        row = effects[at % 10] + 0.5 * rng.normal(size=SERIES)
        clients, means = clients.update(np.full(SERIES, at % 10), row), means.update(row)
    assert np.median(clients.inflation(means.variance)) < 1.2
    assert np.median(clients.inflation_of_bets(means.variance)) == 1.0


def test_a_gain_that_depends_on_nothing_is_proven_by_some_thirty_gains():
    """Not before `MIN_EFFECTIVE` of them, however large."""
    rng, guard, units = np.random.default_rng(1), with_history(0.0), 0
    while guard.decide("test", "kind").action is Action.WAIT:
        gain = float(np.clip(rng.normal(0.35, 0.1), -1.0, 1.0))
        guard.update("test", "kind", b"%d" % units, b"client %d" % (units % 8), gain, gain, 50)
        units += 1
    assert MIN_EFFECTIVE <= units <= 30


def test_for_what_serves_the_upper_limit_of_the_noted_v_counts():
    """A watch goes on for so long that a v that is a little too small would take back what does no harm."""
    guard = with_history(0.0)
    assert guard.evidence("test", "kind").inflation == 1.0
    guard.begin_watch("serving", "kind", 1.0, like="test")
    assert guard.evidence("serving", "kind").inflation == guard.noted_inflation("kind", 1) > 1.05


def test_a_kind_is_known_after_enough_units_that_are_not_all_alike():
    rng = np.random.default_rng(0)
    alike, different = KindDependence(), KindDependence()
    for at in range(MIN_HISTORY):
        assert not different.known_for(0.0)
        client = b"client %d" % (at % 100)
        alike, different = alike.update(client, float(at // 20)), different.update(client, float(rng.normal()))
    assert not alike.known_for(0.0)
    assert different.known_for(0.0)
    assert 1.0 <= different.inflation < 3.0


def test_units_of_less_than_a_cycle_give_no_estimate_and_a_new_kind_borrows_what_all_have():
    rng = np.random.default_rng(0)
    guard = Guard(cycle=24.0)
    day = MIN_CYCLES * 24.0
    for at in range(240):
        guard.update_dependence("old", b"client %d" % (at % 8), float(rng.normal()), now=0.2 * at)
        assert not guard.is_known("old")
        assert not guard.has_seen_cycles
    guard.update_dependence("old", b"client", float(rng.normal()), now=day)
    assert guard.is_known("old")
    assert guard.has_seen_cycles
    guard.update_dependence("new", b"client", 5.0, now=day)
    assert guard.is_known("new")
    alike = Guard(cycle=24.0)
    for at in range(2 * MIN_HISTORY):
        alike.update_dependence("alike", b"client", float(at // 20), now=float(at))
    assert not alike.is_known("alike")
    assert Guard(cycle=day).is_known("never noted")
    assert Guard(cycle=day).has_seen_cycles


def in_test(guard: Guard, first: int, count: int, step: float, gain: float = 0.3) -> None:
    """Units that count, one every `step` hours, after a first one at hour 100."""
    rng = np.random.default_rng(first)
    for at in range(first, first + count):
        drawn, now = float(np.clip(rng.normal(gain, 0.1), -1.0, 1.0)), 3600.0 * (100.0 + step * at)
        guard.update("test", "kind", b"%d" % at, b"client %d" % (at % 8), drawn, drawn, 50, now=now)


def with_history(cycle_hours: float = 24.0) -> Guard:
    """A guard that knows how much the figure that is noted depends: not at all."""
    rng, guard = np.random.default_rng(1), Guard(cycle=3600.0 * cycle_hours)
    for at in range(200):
        guard.update_dependence("kind", b"client %d" % (at % 8), float(rng.normal()), now=3600.0 * 0.5 * at)
    guard.begin_candidate("test", {"kind": (1.0, 1.0)})
    return guard


def test_a_candidate_is_not_promoted_before_its_gains_span_a_cycle():
    guard = with_history()
    in_test(guard, 0, 239, 0.1)
    assert guard.evidence("test", "kind").progress == 1.0
    assert not guard.spans_cycle("test", "kind")
    assert guard.decide("test", "kind").action is Action.WAIT
    guard = Guard.load(guard.save(), 0.05, 0.25, 3600.0 * 24.0)
    in_test(guard, 239, 2, 0.1)
    assert guard.spans_cycle("test", "kind")
    assert guard.decide("test", "kind").action is Action.PROMOTE
    without = with_history(0.0)
    in_test(without, 0, 30, 0.25)
    assert without.decide("test", "kind").action is Action.PROMOTE, "where there is no cycle, nothing waits for it"


def test_a_clock_that_is_set_spans_no_cycle():
    guard = with_history()
    in_test(guard, 0, 40, 0.01)
    in_test(guard, 1_000_000, 40, 0.01)
    assert not guard.spans_cycle("test", "kind"), "the time begins anew"
    in_test(guard, 1_010_000, 40, 0.01)
    assert not guard.spans_cycle("test", "kind"), "a pause counts as half a cycle"
    in_test(guard, 1_020_000, 40, 0.01)
    assert guard.spans_cycle("test", "kind")


def test_a_full_test_learns_how_much_its_gains_depend_until_they_span_a_cycle(monkeypatch):
    monkeypatch.setattr(kind_test, "MAX_UNITS", 90)
    guard = with_history()
    in_test(guard, 0, 90, 0.1)
    assert guard.decide("test", "kind").action is Action.WAIT
    assert guard.admit("test", "kind", b"more", b"client 1") is Admission.FULL
    before = guard.evidence("test", "kind")
    rng = np.random.default_rng(7)
    for at in range(90, 400):
        guard.update_gain_dependence("test", "kind", float(rng.normal(0.3, 0.1)), 3600.0 * (100.0 + 0.1 * at))
    assert guard.evidence("test", "kind").units == before.units == 90
    assert guard.decide("test", "kind").action is Action.PROMOTE


def test_gains_by_day_and_night_count_though_there_are_few_batches_of_a_length():
    guard = with_history()
    for at in range(140):
        gain = 0.02 + 0.3 * math.sin(2.0 * math.pi * at / 120.0)
        guard.update("test", "kind", b"%d" % at, b"client %d" % (at % 8), gain, gain, 50, now=3600.0 * (100 + 0.2 * at))
    assert guard.evidence("test", "kind").inflation > 20.0


def test_a_state_that_was_stored_before_times_were_goes_on():
    guard = with_history()
    in_test(guard, 0, 97, 0.25)
    stored = json.loads(guard.save()) | {"schema": 4}
    for test in stored["state"]["tests"]["test"].values():
        del test["last"], test["elapsed"]
    again = Guard.load(json.dumps(stored).encode(), 0.05, 0.25, 3600.0 * 24.0)
    assert again.evidence("test", "kind") == guard.evidence("test", "kind")
    assert not again.spans_cycle("test", "kind")
    in_test(again, 100, 200, 0.25)
    assert again.decide("test", "kind").action is Action.PROMOTE


def test_a_guard_promotes_where_it_knows_how_much_units_depend_on_each_other():
    rng = np.random.default_rng(0)
    guard = Guard()
    guard.begin_candidate("test", {"kind": (1.0, 1.0)})
    for at in range(MIN_HISTORY):
        unit, client = b"%d" % at, b"client %d" % (at % 8)
        guard.update_dependence("kind", client, float(rng.normal()))
        gain = float(rng.normal(0.3, 0.1))
        guard.update("test", "kind", unit, client, gain, gain, 50)
        assert guard.decide("test", "kind").action is (Action.PROMOTE if at + 1 == MIN_HISTORY else Action.WAIT)
    again = Guard.load(guard.save(), 0.05, 0.25)
    assert again.evidence("test", "kind") == guard.evidence("test", "kind")
    assert again.save() == guard.save()
    assert 1.0 <= guard.evidence("test", "kind").inflation < 5.0
    again.forget()
    assert again.noted_inflation("kind", 10) == 1.0
    with pytest.raises(InvalidArgumentError, match="finite"):
        guard.update_dependence("kind", b"", math.nan)
