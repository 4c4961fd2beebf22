"""`Guard`: tests by kind, units, clients, windows, and the state in bytes."""

import math

import numpy as np
import pytest

from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.guard.closing import adjusted
from hemostat_calibration.guard.decisions import Action, Admission, Reason, Role
from hemostat_calibration.guard.guard import MAX_COUNTED_KINDS, MAX_WINDOW, Guard, window_after_promotion
from hemostat_calibration.guard.kind_test import MAX_UNITS, KindTest
from hemostat_calibration.guard.wealth import (
    FRACTIONS,
    PRIOR,
    SLOTS,
    log_bound,
    log_evidence,
    log_factors,
    log_proof,
)
from hemostat_calibration.statistics.dependence import MAX_CLIENTS

CLIENTS = 10
TEST, WATCH = "candidate", "serving"


def key(n):
    return n.to_bytes(8, "big")


def count(guard, name, kind, gains, *, first=0, clients=CLIENTS, tokens=20, unsure=0.0):
    """Count units until something is decided; the decision, and how many counted."""
    counted = 0
    for n, gain in enumerate(gains, start=first):
        if guard.admit(name, kind, key(n), b"client %d" % (n % clients)) is not Admission.ADMITTED:
            continue
        counted += 1
        guard.update(name, kind, key(n), b"client %d" % (n % clients), gain - unsure, gain + unsure, tokens)
        decision = guard.decide(name, kind)
        if decision.action in (Action.PROMOTE, Action.ROLL_BACK):
            break
    return guard.decide(name, kind), counted


def gains(seed, mean, n=600, spread=0.05):
    return np.random.default_rng(seed).normal(mean, spread, n).clip(-0.5, 0.5)


def candidate(kinds=("a",), width=1.0):
    guard = Guard()
    guard.begin_candidate(TEST, dict.fromkeys(kinds, (width, 1.0)))
    return guard


def serving(window=200, width=1.0, kind="a"):
    guard = Guard()
    guard.begin_watch(WATCH, kind, width, window)
    return guard


# --- candidates -----------------------------------------------------------------------------------------------------


def test_what_helps_in_a_kind_is_promoted_there_with_its_evidence():
    guard = candidate()
    decision, n = count(guard, TEST, "a", gains(0, 0.06))
    assert decision.action is Action.PROMOTE
    result = guard.evidence(TEST, "a")
    assert (result.units, result.tokens, result.test, result.clients) == (n, 20 * n, 1, CLIENTS)
    assert result.mean_gain == pytest.approx(gains(0, 0.06)[:n].mean())
    assert result.mean_gain_by_token == pytest.approx(result.mean_gain)
    assert result.low < result.mean_gain < result.high
    assert result.alpha == 0.025
    assert result.log_e_adjusted == result.log_e >= result.needed == pytest.approx(math.log(40))
    assert result.progress == 1.0
    assert n <= 200


@pytest.mark.parametrize("mean", [-0.06, 0.0])
def test_what_harms_or_does_nothing_is_not(mean):
    guard = candidate()
    assert count(guard, TEST, "a", gains(1, mean))[0].action is Action.WAIT
    assert guard.evidence(TEST, "a").progress < 1.0


def test_promotion_needs_what_is_certain():
    assert count(candidate(), TEST, "a", gains(0, 0.06), unsure=0.07)[0].action is Action.WAIT


def test_no_kind_is_promoted_by_anothers_evidence():
    guard = candidate(["a", "b"])
    assert count(guard, TEST, "a", gains(0, 0.06))[0].action is Action.PROMOTE
    guard.freeze(TEST, "a")
    assert guard.decide(TEST, "b").action is Action.WAIT
    assert count(guard, TEST, "b", gains(1, -0.06))[0].action is Action.WAIT
    assert count(guard, TEST, "a", gains(2, 0.06), first=5000) == (guard.decide(TEST, "a"), 0)
    assert guard.evidence(TEST, "a").frozen
    assert not guard.is_running(TEST, "a")


def test_promotion_needs_the_gain_by_token_too():
    guard = candidate()
    for n in range(300):
        long = n % 10 == 0
        guard.update(
            TEST, "a", key(n), b"client %d" % (n % 7), *([-0.3] * 2 if long else [0.1] * 2), 2000 if long else 5
        )
        assert guard.decide(TEST, "a").action is Action.WAIT
    result = guard.evidence(TEST, "a")
    assert result.log_e_adjusted > result.needed
    assert result.mean_gain > 0.0 > result.mean_gain_by_token


def test_the_closed_test_holds_for_all_sets_of_kinds():
    """At most the e-value of every set that contains the kind, and no less than its parts allow."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        e, w = np.exp(rng.normal(1.0, 2.0, 6)), rng.uniform(0.1, 1.0, 6)
        for j in range(6):
            sets = [[j, *(i for i in range(6) if mask >> i & 1 and i != j)] for mask in range(64)]
            means, products = [(e[s] * w[s]).sum() / w[s].sum() for s in sets], [e[s].prod() for s in sets]
            result = math.exp(adjusted(np.log(e).tolist(), w.tolist(), j))
            assert result == pytest.approx(0.5 * min(means) + 0.5 * min(products))
            assert result <= min(0.5 * m + 0.5 * p for m, p in zip(means, products, strict=True)) + 1e-9


def test_kinds_that_all_gain_pay_little_for_their_number():
    alone = count(candidate(), TEST, "a", gains(0, 0.06))[1]
    guard, needed = candidate([f"kind {k}" for k in range(10)]), {}
    for n in range(300):
        for k in range(10):
            kind = f"kind {k}"
            if kind not in needed:
                guard.update(TEST, kind, key(n), b"client %d" % (n % CLIENTS), *[gains(k, 0.06)[n]] * 2, 20)
                if guard.decide(TEST, kind).action is Action.PROMOTE:
                    guard.freeze(TEST, kind)
                    needed[kind] = n + 1
    assert np.median(list(needed.values())) < 1.35 * alone


def test_a_kind_that_ends_stays_in_the_closed_test_as_it_was():
    guard = candidate(["a", "b"])
    count(guard, TEST, "b", gains(1, -0.06, n=50))
    count(guard, TEST, "a", gains(0, 0.06, n=60))
    before = guard.evidence(TEST, "a").log_e_adjusted
    guard.end_kind(TEST, "b")
    assert guard.evidence(TEST, "a").log_e_adjusted == before < guard.evidence(TEST, "a").log_e
    assert guard.kinds(TEST) == ("a",)
    saved = len(guard.save())
    for _ in range(300):
        guard.begin_kind(TEST, "a", 1.0)
    assert len(guard.save()) < saved, "what no running test needs is not held"


def test_a_kind_that_appears_later_is_a_test_of_its_own():
    guard = candidate(["a"])
    assert guard.begin_kind(TEST, "b", 1.0) == 2
    assert guard.evidence(TEST, "b").alpha == pytest.approx(0.05 / 6)
    assert count(guard, TEST, "a", gains(0, 0.06))[0].action is Action.PROMOTE
    assert guard.begin_kind(TEST, "a", 1.0) == 3, "begun anew"
    assert guard.evidence(TEST, "a").units == 0
    assert guard.candidate_tests == 3


def test_alpha_is_spent_over_all_tests_of_candidates():
    guard, spent = Guard(alpha=0.06), []
    for k in range(50):
        assert guard.begin_candidate(TEST, {"a": (1.0, 1.0)}) == k + 1
        spent.append(guard.evidence(TEST, "a").alpha)
        guard.end(TEST)
    assert spent[:3] == pytest.approx([0.03, 0.01, 0.005])
    assert 0.05 < sum(spent) < 0.06
    guard.raise_counts(80, {})
    guard.raise_counts(10, {})
    assert guard.begin_candidate(TEST, {"a": (1.0, 1.0)}) == 81
    assert guard.begin_candidate(TEST, {}) == 81, "no alpha is spent on nothing"
    assert guard.begin_kind(TEST, "a", 1.0) == 82


# --- units and clients ----------------------------------------------------------------------------------------------


def test_a_unit_counts_once_in_a_test_and_kind():
    guard = candidate(["a", "b"])
    assert guard.admit(TEST, "a", key(1), b"x") is Admission.ADMITTED
    guard.update(TEST, "a", key(1), b"x", 0.1, 0.1, 5)
    assert guard.admit(TEST, "a", key(1), b"y") is Admission.COUNTED
    assert guard.admit(TEST, "b", key(1), b"x") is Admission.ADMITTED
    assert guard.admit(TEST, "c", key(1), b"x") is Admission.UNKNOWN
    assert guard.admit("another", "a", key(1), b"x") is Admission.UNKNOWN
    with pytest.raises(InvalidArgumentError, match="has counted"):
        guard.update(TEST, "a", key(1), b"x", 0.1, 0.1, 5)
    for _ in range(2):
        assert guard.admit(TEST, "a", b"", b"x") is Admission.ADMITTED, "without a conversation each counts"
        guard.update(TEST, "a", b"", b"x", 0.1, 0.1, 5)


def test_a_test_counts_so_many_units():
    guard = candidate()
    for n in range(MAX_UNITS):
        guard.update(TEST, "a", key(n), b"", 0.0, 0.0, 5)
    assert guard.admit(TEST, "a", key(MAX_UNITS), b"") is Admission.FULL


def test_no_client_has_more_than_its_share():
    guard = candidate()
    for n in range(1000):
        client = b"busy" if n % 2 else b"client %d" % (n % 14)
        if guard.admit(TEST, "a", key(n), client) is Admission.ADMITTED:
            guard.update(TEST, "a", key(n), client, 0.0, 0.0, 5)
    result = guard.evidence(TEST, "a")
    busy = result.units - 500
    assert busy <= math.ceil(0.25 * result.units)
    assert result.refused == 500 - busy > 300
    assert result.client_share_active


def test_equal_clients_at_the_smallest_number_are_all_counted():
    guard = candidate()
    for n in range(400):
        assert guard.admit(TEST, "a", key(n), b"client %d" % (n % 4)) is Admission.ADMITTED
        guard.update(TEST, "a", key(n), b"client %d" % (n % 4), 0.0, 0.0, 5)
    three = candidate()
    for n in range(100):
        client = b"client %d" % min(n % 50, 2)
        assert three.admit(TEST, "a", key(n), client) is Admission.ADMITTED, "not active below four clients"
        three.update(TEST, "a", key(n), client, 0.0, 0.0, 5)
    assert not three.evidence(TEST, "a").client_share_active


def brute_force(by_client):
    """The evidence as `wealth` defines it, one exponential at a time."""
    clients = len(by_client)

    def k(*left_out):
        kept = [by_client[c] for c in range(clients) if c not in left_out]
        return float((np.exp(np.sum(kept, axis=0) if kept else np.zeros(len(FRACTIONS))) * PRIOR).sum())

    def mixture(*left_out):
        others = [k(*left_out, b) for b in range(clients)] + [k(*left_out)] * (MAX_CLIENTS - clients)
        return 0.5 * k(*left_out) + 0.5 * float(SLOTS @ others)

    return mixture() if clients < 4 else min(mixture(a) for a in range(clients))


@pytest.mark.parametrize("clients", [1, 2, 3, 4, 5, 9, 64])
def test_the_evidence_is_as_defined(clients):
    rng = np.random.default_rng(clients)
    by_client = np.array([log_factors(x) * 3 for x in rng.uniform(-0.6, 0.8, clients)])
    assert log_evidence(by_client, clients) == pytest.approx(math.log(brute_force(by_client)))
    kept = [by_client] + [np.delete(by_client, a, axis=0) for a in range(clients if clients >= 4 else 0)]
    proofs = [float(np.exp(rows.sum(axis=0)) @ PRIOR) for rows in kept]
    assert log_proof(by_client, clients) == pytest.approx(math.log(min(proofs)))


def test_no_client_decides():
    """One client's gains alone prove nothing, its losses alone do not hide the others' gains, and nothing overflows."""
    honest = np.array([log_factors(0.1)] * 9) * 8
    for x in (1.0, -1.0):
        attacked = np.vstack([honest, [log_factors(x) * 500]])
        assert log_evidence(attacked, 10) == pytest.approx(log_evidence(honest, 9), abs=-math.log(0.5 * SLOTS[9]) + 1)
    alone = np.vstack([np.zeros((9, len(FRACTIONS))), [log_factors(1.0) * 500]])
    assert log_evidence(alone, 10) < 1e-9
    assert math.isfinite(log_evidence(np.array([log_factors(-1.0) * 4000] * 64), 64))


def test_others_gains_do_not_hide_what_one_client_loses():
    """The mean over all is below 0: that all but one client gain is no proof. What serves is not taken back for it."""
    mixed = np.vstack([np.array([log_factors(0.1)] * 9) * 30, [log_factors(-0.9) * 60]])
    assert log_proof(mixed[:9], 9) > 10.0
    assert log_proof(mixed, 10) < 0.0
    assert log_evidence(mixed, 10) > 10.0


def test_what_is_refused_for_its_share_can_prevent_a_promotion():
    """The busy client has most of the traffic, and loses there; of what counts it has a quarter."""
    guard, blind = candidate(), candidate()
    rng = np.random.default_rng(0)
    for n in range(900):
        busy = n % 10 < 6
        client = b"busy" if busy else b"client %d" % (n % 14)
        gain = float(np.clip(rng.normal(-0.1 if busy else 0.1, 0.1), -1.0, 1.0))
        for each in (guard, blind):
            admission = each.admit(TEST, "a", key(n), client)
            if admission is Admission.ADMITTED:
                each.update(TEST, "a", key(n), client, gain, gain, 5)
            elif each is guard:
                each.oppose(TEST, "a", gain)
    assert blind.decide(TEST, "a").action is Action.PROMOTE
    assert guard.decide(TEST, "a").action is Action.WAIT
    assert guard.evidence(TEST, "a").units == blind.evidence(TEST, "a").units
    loaded = Guard.load(guard.save(), 0.05, 0.25)
    assert loaded.evidence(TEST, "a") == guard.evidence(TEST, "a")


def test_what_opposes_is_of_a_candidate_and_in_range():
    with pytest.raises(InvalidArgumentError, match="only a candidate"):
        serving().oppose(WATCH, "a", 0.0)
    for wrong in (-9.0, math.nan):
        with pytest.raises(InvalidArgumentError, match="at least"):
            candidate().oppose(TEST, "a", wrong)


@pytest.mark.parametrize("inflation", [1.0, 3.0])
@pytest.mark.parametrize("mean", [-0.3, 0.0, 0.3])
@pytest.mark.parametrize("role", Role)
def test_what_is_not_evaluated_would_not_be_enough(role, mean, inflation):
    """The evidence is evaluated only where its bound allows a decision: the bound is never below it."""
    rng = np.random.default_rng(0)
    test = KindTest(role, 1.0, 1, window=1000 if role is Role.SERVING else 0)
    for n in range(300):
        gain = float(np.clip(rng.normal(mean, 0.5), -1.0, 1.0))
        test.update(key(n), b"client %d" % rng.integers(12), gain, gain, int(rng.integers(1, 2000)))
        if n % 3 == 0 and role is Role.CANDIDATE:
            test.oppose(float(np.clip(rng.normal(mean, 0.5), -1.0, 1.0)))
        v = max(inflation, test.own_inflation())
        for needed in (0.5, 1.0, 3.0):
            enough = test.may_decide(False) and test.log_e(v) >= needed
            assert test.reaches(needed, lambda v=v: v) == enough
            if role is Role.SERVING:
                harms = test.may_decide(False) and test.log_harm(v) >= needed
                assert test.harm_reaches(needed, v) == harms
        exact = log_evidence if role is Role.SERVING else log_proof
        result = float(exact(test.wealth[: test.clients], test.clients, inflation=v))
        assert max(log_bound(test.wealth[: test.clients]), 0.0) >= result


def test_further_clients_share_places():
    guard = candidate()
    for n in range(1000):
        client = key(n)
        if guard.admit(TEST, "a", key(n), client) is Admission.ADMITTED:
            guard.update(TEST, "a", key(n), client, 0.1, 0.1, 5)
    result = guard.evidence(TEST, "a")
    assert result.clients == MAX_CLIENTS
    assert result.units == 1000
    assert result.refused == 0


# --- serving profiles -----------------------------------------------------------------------------------------------


def test_what_turns_harmful_is_rolled_back_at_once():
    guard = serving()
    decision, n = count(guard, WATCH, "a", gains(0, 0.06, n=400))
    assert (decision.action, n) == (Action.HOLD, 400)
    decision, n = count(guard, WATCH, "a", gains(1, -0.06), first=400)
    assert (decision.action, decision.reason) == (Action.ROLL_BACK, Reason.HARM)
    result = guard.evidence(WATCH, "a")
    assert result.mean_gain < 0.0
    assert (result.test, result.alpha) == (3, pytest.approx(0.05 / 2)), "one sum, over all windows"
    assert result.needed == pytest.approx(-math.log(result.alpha))
    assert n < 200, "before the window's end"


def test_harm_by_token_is_found():
    guard = Guard()
    guard.begin_candidate(TEST, {"a": (1.0, 1.0)})
    for n in range(100):
        guard.update(TEST, "a", key(n), b"client %d" % (n % 7), 0.1, 0.1, 2000 if n % 10 == 0 else 5)
    guard.begin_watch(WATCH, "a", 1.0, window=1000, like=TEST)
    for n in range(1000):
        long = n % 10 == 0
        guard.update(
            WATCH, "a", key(n), b"client %d" % (n % 7), *([-0.6] * 2 if long else [0.1] * 2), 2000 if long else 5
        )
        if guard.decide(WATCH, "a").reason is not None:
            break
    assert guard.decide(WATCH, "a").reason is Reason.HARM
    assert guard.evidence(WATCH, "a").mean_gain > 0.0 > guard.evidence(WATCH, "a").mean_gain_by_token
    assert n < 400


def test_what_no_longer_helps_is_rolled_back_at_the_windows_end():
    guard = serving()
    decision, n = count(guard, WATCH, "a", gains(1, 0.0))
    assert (decision.reason, n) == (Reason.UNSUPPORTED, 200)
    # Not acted upon (a pinned profile): the next window begins with the next unit.
    assert guard.admit(WATCH, "a", key(0), b"client 0") is Admission.ADMITTED, "units count anew"
    guard.update(WATCH, "a", key(0), b"client 0", 0.0, 0.0, 20)
    assert guard.decide(WATCH, "a").action is Action.HOLD
    assert guard.evidence(WATCH, "a").test == 2


def test_a_window_ends_where_only_one_client_is_left():
    """Nearly all that it sends is refused; that does not keep what serves for ever."""
    guard = serving(window=100)
    count(guard, WATCH, "a", gains(0, 0.06, n=40), clients=4)
    decision, n = count(guard, WATCH, "a", [0.0] * 400, first=1000, clients=1)
    assert (decision.reason, n) == (Reason.UNSUPPORTED, 2)
    result = guard.evidence(WATCH, "a")
    assert (result.units, result.units + result.refused) == (42, 400)


def test_support_within_a_window_lasts_to_its_end():
    guard = serving()
    decision, n = count(guard, WATCH, "a", [*gains(0, 0.1, n=120), *gains(1, -0.005, n=80)])
    assert (decision.action, n) == (Action.HOLD, 200)
    assert guard.evidence(WATCH, "a").supported


def test_what_is_unknown_neither_harms_nor_supports():
    assert count(serving(), WATCH, "a", gains(0, -0.05, n=199), unsure=0.06)[0].action is Action.HOLD
    assert count(serving(), WATCH, "a", gains(0, 0.05), unsure=0.06)[0].reason is Reason.UNSUPPORTED


def test_windows_are_counted_by_kind_over_the_whole_run():
    guard = serving()
    guard.begin_watch(WATCH, "b", 1.0)
    guard.begin_watch(WATCH, "a", 1.0)
    assert guard.windows == {"a": 2, "b": 1}
    guard.raise_counts(0, {"a": 1, "b": 7})
    assert guard.windows == {"a": 2, "b": 7}
    for k in range(2 * MAX_COUNTED_KINDS):
        guard.begin_watch(WATCH, f"kind {k}", 1.0)
        guard.end_kind(WATCH, f"kind {k}")
    assert len(guard.windows) == MAX_COUNTED_KINDS + 1
    guard.begin_watch(WATCH, "one more", 1.0)
    assert guard.evidence(WATCH, "one more").test == guard.windows[""] > 200


def test_a_window_is_as_long_as_the_proof_makes_it():
    guard = candidate()
    n = count(guard, TEST, "a", gains(0, 0.06))[1]
    assert window_after_promotion(guard.evidence(TEST, "a")) == max(400, 5 * n)
    guard.begin_watch(WATCH, "a", 1.0, window=10**6)
    assert guard.evidence(WATCH, "a").window == MAX_WINDOW


# --- the state ------------------------------------------------------------------------------------------------------


def busy_guard():
    guard = candidate(["a", "b", "c"])
    guard.begin_watch(WATCH, "a", 1.0, window=100)
    count(guard, TEST, "a", gains(0, 0.06))
    guard.freeze(TEST, "a")
    guard.end_kind(TEST, "c")
    guard.begin_kind(TEST, "c", 0.7)
    for kind in ("b", "c"):
        count(guard, TEST, kind, gains(1, 0.01, n=80))
    count(guard, WATCH, "a", gains(2, 0.02, n=150))
    return guard


def test_a_saved_guard_continues_as_before():
    guard = busy_guard()
    other = Guard.load(guard.save(), 0.05, 0.25)
    assert other.save() == guard.save()
    for again in (guard, other):
        count(again, TEST, "b", gains(3, 0.05, n=100), first=60)
        count(again, WATCH, "a", gains(4, -0.02, n=120), first=140)
    assert other.save() == guard.save()
    assert (other.names, other.windows, other.candidate_tests) == (guard.names, guard.windows, guard.candidate_tests)
    for name in guard.names:
        for kind in guard.kinds(name):
            assert other.evidence(name, kind) == guard.evidence(name, kind)


def test_the_size_of_the_state_is_bounded():
    guard = Guard()
    kinds = [f"kind {k}" for k in range(5)]
    guard.begin_candidate(TEST, dict.fromkeys(kinds, (1.0, 1.0)))
    for kind in kinds:
        guard.begin_watch(WATCH, kind, 1.0, window=4000)
        for n in range(4000):
            for name in (TEST, WATCH):
                guard.update(name, kind, key(n), key(n), 0.01, 0.01, 5)
    # 25 kinds, two candidates: five times the watches and ten times the candidate's kinds.
    watches, tests = Guard.load(guard.save(), 0.05, 0.25), Guard.load(guard.save(), 0.05, 0.25)
    watches.end(TEST)
    tests.end(WATCH)
    assert 5 * len(watches.save()) + 10 * len(tests.save()) < 3.5e6


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"[]",
        lambda data: data[:-100],
        lambda data: data.replace(b'"schema":5', b'"schema":3'),
        lambda data: data.replace(b'"units":', b'"units":-'),
        lambda data: data.replace(b'"counted":[4,"', b'"counted":[4,"!'),
        lambda data: data.replace(b'"role":"serving"', b'"role":"other"'),
        lambda data: data.replace(b'"width":1.0', b'"width":NaN'),
        lambda data: data.replace(b'"counts":[', b'"counts":[1,'),
        lambda data: data.replace(b'"wealth":["<f8",[', b'"wealth":["<f8",[1,'),
        lambda data: data.replace(b'"frozen":false', b'"frozen":0'),
        lambda data: data.replace(b'"refused":0,', b""),
    ],
)
def test_a_damaged_state_is_refused(damage):
    data = busy_guard().save()
    assert damage(data) != data
    with pytest.raises(InvalidArgumentError):
        Guard.load(damage(data), 0.05, 0.25)


def test_arguments():
    for alpha in (0.0, 1.0, math.nan):
        with pytest.raises(InvalidArgumentError, match="alpha"):
            Guard(alpha)
    for share in (0.0, 1.1, math.nan):
        with pytest.raises(InvalidArgumentError, match="client_share"):
            Guard(0.05, share)
    guard = candidate()
    for width in (0.0, math.inf, math.nan):
        with pytest.raises(InvalidArgumentError, match="width"):
            guard.begin_candidate(TEST, {"a": (width, 1.0)})
    with pytest.raises(InvalidArgumentError, match="weight"):
        guard.begin_candidate(TEST, {"a": (1.0, 0.0)})
    with pytest.raises(InvalidArgumentError, match="window"):
        guard.begin_watch(WATCH, "a", 1.0, window=0)
    assert guard.candidate_tests == 1
    assert guard.windows == {}
    guard.begin_watch(WATCH, "a", 1.0)
    for name, ends, tokens, match in (
        (TEST, (0.2, 0.1), 5, "above upper"),
        (TEST, (-1.5, 0.1), 5, "within"),
        (TEST, (math.nan, math.nan), 5, "above upper"),
        (WATCH, (0.1, 1.5), 5, "within"),
        (TEST, (0.1, 0.1), 0, "tokens"),
    ):
        with pytest.raises(InvalidArgumentError, match=match):
            guard.update(name, "a", key(1), b"", *ends, tokens)
    guard.freeze(TEST, "a")
    with pytest.raises(InvalidArgumentError, match="frozen"):
        guard.update(TEST, "a", key(1), b"", 0.1, 0.1, 5)
    assert guard.admit(TEST, "a", key(1), b"") is Admission.FROZEN
    for call in (guard.decide, guard.evidence, guard.freeze):
        with pytest.raises(InvalidArgumentError, match="not under test"):
            call(TEST, "z")
    with pytest.raises(InvalidArgumentError, match="not under test"):
        guard.begin_kind("another", "a", 1.0)
    guard.end("another")
    guard.end_kind("another", "a")
