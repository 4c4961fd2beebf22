"""The two-arm test of a binary outcome against brute force, and its level and power in simulated lives."""

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.support.slow import examples

from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.statistics.two_arms import TwoArms, log_e_value

LIVES, UNITS = 1000, 1000
counts = st.integers(0, 40).flatmap(lambda units: st.tuples(st.integers(0, units), st.just(units)))
margins = st.floats(-0.95, 0.95)


def likelihood(arms, p, q):
    """log likelihood at rates p and q, arrays."""
    total = np.zeros(np.broadcast(p, q).shape)
    for bad, units, rate in ((arms.treated_bad, arms.treated, p), (arms.control_bad, arms.control, q)):
        with np.errstate(divide="ignore"):
            total = total + (bad * np.log(rate) if bad else 0.0)
            total = total + ((units - bad) * np.log1p(-rate) if units > bad else 0.0)
    return total


def mixture(arms):
    """log mean of the likelihood over Beta(½, ½) of both rates, by quadrature in the angle of p = sin²."""
    angle = (np.arange(20000) + 0.5) * (math.pi / 2) / 20000
    total = 0.0
    for bad, units in ((arms.treated_bad, arms.treated), (arms.control_bad, arms.control)):
        values = 2 * bad * np.log(np.sin(angle)) + 2 * (units - bad) * np.log(np.cos(angle))
        total += values.max() + math.log(np.mean(np.exp(values - values.max())))
    return total


def best_under_the_hypothesis(arms, margin):
    """The maximum over p ≤ q + margin, on a grid that is refined around its best point."""
    low, high = np.array([0.0, 0.0]), np.array([1.0, 1.0])
    best = -np.inf
    for _ in range(12):
        q = np.linspace(low[1], high[1], 41)
        # The points of the hypothesis' own boundary belong to the grid.
        p = np.union1d(np.linspace(low[0], high[0], 41), np.clip(q + margin, 0.0, 1.0))
        values = np.where(p[:, None] <= q + margin + 1e-15, likelihood(arms, p[:, None], q), -np.inf)
        i, j = np.unravel_index(np.argmax(values), values.shape)
        best = max(best, values[i, j])
        half = (high - low) / 4
        middle = np.array([p[i], q[j]])
        low, high = np.clip(middle - half, 0.0, 1.0), np.clip(middle + half, 0.0, 1.0)
    return best


@settings(max_examples=examples(60), deadline=None)
@given(counts, counts, margins)
@example((0, 0), (0, 0), 0.05)
@example((0, 7), (7, 7), 0.05)
@example((7, 7), (0, 7), 0.05)
@example((7, 7), (0, 0), -0.5)
@example((0, 0), (0, 7), -0.5)
@example((26, 30), (5, 35), 0.0)
def test_the_e_value_is_the_brute_force_one(treated, control, margin):
    arms = TwoArms(*treated, *control)
    expected = mixture(arms) - best_under_the_hypothesis(arms, margin)
    assert arms.log_e(margin) == pytest.approx(expected, abs=2e-3)


@settings(max_examples=examples(100), deadline=None)
@given(counts, counts, margins, margins)
def test_a_wider_margin_is_harder_to_refute(treated, control, one, other):
    arms = TwoArms(*treated, *control)
    assert arms.log_e(max(one, other)) <= arms.log_e(min(one, other)) + 1e-9


@settings(max_examples=examples(100), deadline=None)
@given(counts, counts, st.sampled_from([0.2, 0.05, 0.001]))
@example((1, 28), (1, 1), 0.001)
@example((0, 3), (0, 1), 0.001)
def test_the_interval_and_the_test_agree(treated, control, alpha):
    arms = TwoArms(*treated, *control)
    result = arms.get(alpha)
    assert -1.0 <= result.low <= result.high <= 1.0
    if math.isnan(result.mean):
        assert (result.low, result.high) == (-1.0, 1.0)
        return
    assert result.low <= result.mean <= result.high
    needed = -math.log(alpha)
    # log e is steep near -1, so that no tolerance in it fits: the points are a hundredth of the way outside and inside.
    if result.low > -1.0 + 1e-9:
        assert arms.log_e(result.low - 0.01 * (result.low + 1.0)) >= needed - 1e-6
    inside = result.low + 0.01 * (result.mean - result.low)
    if -1.0 < inside < 1.0:
        assert arms.log_e(inside) <= needed + 1e-6
    swapped = TwoArms(*control, *treated).get(alpha)
    assert (swapped.low, swapped.high) == pytest.approx((-result.high, -result.low), abs=1e-6)


@settings(max_examples=examples(50), deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=40), st.integers(0, 40))
def test_parts_add_up(units, at):
    def counted(part):
        arms = TwoArms()
        for treated, bad in part:
            arms = arms.update(treated=treated, bad=bad)
        return arms

    whole, first, second = counted(units), counted(units[:at]), counted(units[at:])
    assert first.merge(second) == whole
    assert whole.without(first) == second
    expected = log_e_value([whole.treated_bad], whole.treated, whole.control_bad, whole.control, 0.05)
    assert whole.log_e(0.05) == pytest.approx(float(expected[0]))


def test_wrong_arguments():
    for call in (
        lambda: TwoArms(2, 1),
        lambda: TwoArms(0, 0, -1, 1),
        lambda: TwoArms(1, 2).without(TwoArms(2, 2)),
        lambda: TwoArms().log_e(1.0),
        lambda: TwoArms().log_e(math.nan),
        lambda: TwoArms().get(0.0),
        lambda: TwoArms().get(1.0),
    ):
        with pytest.raises(InvalidArgumentError):
            call()


def simulated_counts(seed, treated_rate, control_rate, control_fraction, lives=LIVES, units=UNITS):
    """Cumulative counts at every unit, four arrays [lives, units]; rates may change by unit."""
    rng = np.random.default_rng(seed)
    treated = rng.random((lives, units)) >= control_fraction
    bad = rng.random((lives, units)) < np.where(treated, treated_rate, control_rate)
    return [np.cumsum(x, axis=1) for x in (treated & bad, treated, ~treated & bad, ~treated)]


def ever_harm(lives_counts, margin=0.05, alpha=0.05, every=10):
    """Lives whose test ever rejects, looked at after every unit up to 100, then after every `every`-th."""
    units = lives_counts[0].shape[1]
    looks = np.unique(np.concatenate([np.arange(min(100, units)), np.arange(0, units, every)]))
    log_e = log_e_value(*(x[:, looks] for x in lives_counts), margin)
    return int((log_e.max(axis=1) >= -math.log(alpha)).sum())


STEPS = np.repeat([0.0, 0.9, 0.1, 0.8, 0.3], UNITS // 5)
WORLDS = {
    "rare outcome": (0.06, 0.01, 0.1),
    "half": (0.55, 0.5, 0.1),
    "half, arms alike in size": (0.55, 0.5, 0.5),
    "treated never good": (1.0, 0.95, 0.1),
    "drift of both arms": (np.linspace(0.05, 0.95, UNITS), np.linspace(0.0, 0.9, UNITS), 0.1),
    "steps of both arms": (STEPS + 0.05, STEPS, 0.1),
    "steps of both arms, alike in size": (STEPS + 0.05, STEPS, 0.5),
}


@pytest.mark.parametrize("name", WORLDS)
def test_no_false_harm_at_the_margin(name):
    """≤ 64 of 1,000 lives at a nominal 5 %, the treated rate at the margin."""
    assert ever_harm(simulated_counts(1, *WORLDS[name])) <= 64


def test_the_null_test_can_fail():
    """The same simulation catches a test that is valid for one look only."""
    a, n, b, m = simulated_counts(1, *WORLDS["half, arms alike in size"])
    p, q = a / np.maximum(n, 1), b / np.maximum(m, 1)
    spread = np.sqrt(p * (1 - p) / np.maximum(n, 1) + q * (1 - q) / np.maximum(m, 1))
    rejected = ((p - q - 0.05) > 1.645 * spread) & (n > 20) & (m > 20)
    assert rejected.any(axis=1).sum() > 150


@pytest.mark.parametrize("name", WORLDS)
def test_the_interval_covers_at_every_look(name):
    """The difference stays inside in ≥ 937 of 1,000 lives: it is outside only if the e-value against it is large."""
    counts = simulated_counts(2, *WORLDS[name])
    treated_rate, control_rate, _ = WORLDS[name]
    difference = float(np.mean(treated_rate - np.asarray(control_rate)))
    low = ever_harm(counts, difference)
    a, n, b, m = counts
    high = ever_harm([b, m, a, n], -difference)
    assert low + high <= 63


def test_power():
    """Median units until a fall of valid JSON from 37.5 % to 10 % is proven, margin 5 %, alpha 0.05 / 6 / 2."""
    medians = {}
    for fraction in (0.1, 0.5):
        log_e = log_e_value(*simulated_counts(3, 0.9, 0.625, fraction, lives=200, units=2000), 0.05)
        result = log_e >= math.log(240)
        units = np.where(result.any(axis=1), result.argmax(axis=1) + 1, np.inf)
        medians[fraction] = float(np.median(units))
    print(medians)
    assert medians[0.1] < 1100
    assert medians[0.5] < 350
