"""`Guard`: gains of the total variation, with the gain in KL beside them, never added to gains in nats."""

import math

import pytest

from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.guard.decisions import Action, Figure
from hemostat_calibration.guard.guard import Guard

TEST, WATCH = "candidate", "serving"


def key(n):
    return n.to_bytes(8, "big")


def candidate():
    guard = Guard()
    guard.begin_candidate(TEST, {"a": (1.0, 1.0)})
    return guard


def adapter_guard(kinds=("a",)):
    guard = Guard()
    guard.begin_candidate(TEST, dict.fromkeys(kinds, (1.0, 1.0)), dict.fromkeys(kinds, Figure.TOTAL_VARIATION))
    return guard


def feed_variation(guard, values, kl_gain=0.5, tokens=20, first=0):
    for n, value in enumerate(values, first):
        given = kl_gain(n) if callable(kl_gain) else kl_gain
        guard.update(TEST, "a", key(n), b"client %d" % (n % 7), value, value, tokens, given)


def test_promotion_on_total_variation_needs_the_gain_in_kl_too():
    guard = adapter_guard()
    feed_variation(guard, [0.2] * 60, kl_gain=-0.01)
    result = guard.evidence(TEST, "a")
    assert result.figure is Figure.TOTAL_VARIATION
    assert result.log_e_adjusted > result.needed
    assert (result.mean_kl_gain, result.mean_kl_gain_by_token) == (pytest.approx(-0.01), pytest.approx(-0.01))
    assert guard.decide(TEST, "a").action is Action.WAIT
    feed_variation(guard, [0.2] * 60, kl_gain=0.05, first=60)
    assert guard.decide(TEST, "a").action is Action.PROMOTE


def test_one_unit_without_a_distribution_outweighs_all_gains():
    """Of a client beside whom there are others; one client alone can always be left out."""
    guard = adapter_guard()
    feed_variation(guard, [0.2] * 200, kl_gain=lambda n: -math.inf if n in (30, 31) else 5.0)
    result = guard.evidence(TEST, "a")
    assert result.mean_kl_gain == result.mean_kl_gain_by_token == -math.inf
    assert guard.decide(TEST, "a").action is Action.WAIT
    one_client = adapter_guard()
    feed_variation(one_client, [0.2] * 200, kl_gain=lambda n: -math.inf if n % 7 == 3 else 5.0)
    assert one_client.decide(TEST, "a").action is Action.WAIT, "nor are the others' gains shown without it"


def test_the_gain_in_kl_is_needed_by_token_too():
    guard = adapter_guard()
    for n in range(200):
        long = n % 10 == 0
        given = (-0.2, 2000) if long else (0.1, 5)
        guard.update(TEST, "a", key(n), b"client %d" % (n % 7), 0.2, 0.2, given[1], given[0])
    result = guard.evidence(TEST, "a")
    assert result.mean_kl_gain > 0.0 > result.mean_kl_gain_by_token
    assert guard.decide(TEST, "a").action is Action.WAIT


def test_gains_of_two_figures_never_add_up():
    nats, variation = candidate(), adapter_guard()
    with pytest.raises(InvalidArgumentError, match="the gain is of total_variation, the test's are of nats"):
        nats.update(TEST, "a", b"u", b"", 0.1, 0.1, 5, 0.1)
    with pytest.raises(InvalidArgumentError, match="the gain is of nats, the test's are of total_variation"):
        variation.update(TEST, "a", b"u", b"", 0.1, 0.1, 5)
    with pytest.raises(InvalidArgumentError, match="do not add up"):
        nats.oppose(TEST, "a", -0.1, Figure.TOTAL_VARIATION)
    with pytest.raises(InvalidArgumentError, match="do not add up"):
        variation.oppose(TEST, "a", -0.1)
    with pytest.raises(InvalidArgumentError, match="kl_gain is NaN"):
        variation.update(TEST, "a", b"u", b"", 0.1, 0.1, 5, math.nan)
    with pytest.raises(InvalidArgumentError, match="that of the total variation is 1"):
        Guard().begin_candidate(TEST, {"a": (2.0, 1.0)}, {"a": Figure.TOTAL_VARIATION})
    for guard in (nats, variation):
        assert guard.evidence(TEST, "a").units == 0
    variation.oppose(TEST, "a", -0.1, Figure.TOTAL_VARIATION)
    assert (nats.figure(TEST, "a"), variation.figure(TEST, "a")) == (Figure.NATS, Figure.TOTAL_VARIATION)
    assert nats.figure("another", "a") is None


def test_the_figure_is_kept_over_windows_and_restarts():
    guard = adapter_guard()
    feed_variation(guard, [0.2] * 30)
    guard.begin_watch(WATCH, "a", 1.0, window=20, figure=Figure.TOTAL_VARIATION)
    for n in range(25):
        guard.admit(WATCH, "a", key(n), b"client %d" % (n % 7))
        guard.update(WATCH, "a", key(n), b"client %d" % (n % 7), 0.2, 0.2, 10, 0.3)
    again = Guard.load(guard.save(), 0.05, 0.25)
    for name in (TEST, WATCH):
        assert again.evidence(name, "a") == guard.evidence(name, "a")
        assert again.figure(name, "a") is Figure.TOTAL_VARIATION
    assert guard.evidence(WATCH, "a").units == 5, "of the second window"


def test_what_has_counted_is_known_before_its_gain():
    guard = adapter_guard()
    assert not guard.has_counted(TEST, "a", key(0))
    feed_variation(guard, [0.2])
    assert guard.has_counted(TEST, "a", key(0))
    assert not guard.has_counted(TEST, "a", key(1))
    assert not guard.has_counted(TEST, "a", b""), "it counts every time"
    assert guard.has_counted(TEST, "b", key(0)), "nothing is under test there"
    guard.freeze(TEST, "a")
    assert guard.has_counted(TEST, "a", key(1))
