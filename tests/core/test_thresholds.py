"""Thresholds of curves: the fit and Student's quantiles against brute force, verdicts, and simulated worlds."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.statistics.streaming import student_975
from hemostat_calibration.thresholds.breaks import Break, Existence, break_existence, find_break, kink
from hemostat_calibration.thresholds.curve import Curve, leaves_floor, student_quantile
from hemostat_calibration.thresholds.statements import Verdict, always_better, breaks_within, difference


def one_setting(values):
    return Curve(np.array([0.0]), np.array([values], dtype=float), np.ones(len(values)))


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 9, 30, 200])
def test_student_quantile(degrees):
    assert student_quantile(0.05, degrees) == pytest.approx(student_975(degrees), rel=2e-3)


def test_student_quantile_in_the_tail_is_that_of_its_density():
    """Numerical integration of the density beyond the quantile."""
    for degrees, alpha in ((3, 0.005), (7, 0.01), (23, 0.002)):
        t = np.linspace(student_quantile(alpha, degrees), 400.0, 200_001)
        density = (1 + t**2 / degrees) ** (-(degrees + 1) / 2)
        whole = np.linspace(0.0, 400.0, 200_001)
        total = (1 + whole**2 / degrees) ** (-(degrees + 1) / 2)
        assert np.trapezoid(density, t) / np.trapezoid(total, whole) == pytest.approx(alpha, rel=0.02)


def test_contrast_is_that_of_paired_differences():
    """With one token each and all requests measured, the paired t interval."""
    rng = np.random.default_rng(0)
    sums = rng.gamma(1.0, 1.0, (3, 12))
    curve = Curve(np.array([0.0, 1.0, 2.0]), sums, np.ones(12))
    value, low, high = curve.contrast(np.array([-1.0, 0.0, 1.0]), 0.05)
    result = sums[2] - sums[0]
    assert value == pytest.approx(result.mean())
    assert high - low == pytest.approx(2 * 2.2010 * result.std(ddof=1) / np.sqrt(12), rel=1e-3)


def test_means_of_resamples_count_tokens_and_skip_what_is_not_measured():
    curve = Curve(np.array([0.0, 1.0]), np.array([[2.0, 9.0, 4.0], [1.0, np.nan, 8.0]]), np.array([1.0, 3.0, 2.0]))
    assert curve.means().tolist() == [2.5, 3.0]
    assert curve.means(np.array([[2.0, 1.0, 0.0]])).tolist() == [[13.0 / 5.0, 1.0]]


@given(st.floats(0.05, 4.95), st.floats(0.0, 1.0), st.floats(2.5, 9.0), st.floats(0.1, 5.0))
def test_the_kink_is_found_or_bracketed(at, before, after, offset):
    x = np.arange(6.0)
    y = offset + before * x + after * np.maximum(x - at, 0.0)
    low, high = (float(end[0]) for end in kink(x, y[None]))
    assert low <= high
    # To the grid of candidates; with a single setting after it, anywhere between the settings around it.
    assert low - 1 / 16 <= at <= high + 1 / 16 or np.floor(low) <= at <= np.ceil(high)


def test_kink_against_brute_force():
    """On a convex curve: no other kink with any three coefficients has a smaller sum of squares."""
    rng = np.random.default_rng(1)
    x = np.array([0.0, 1.0, 2.0, 4.0, 5.0, 6.0])
    for _ in range(10):
        y = np.cumsum([0.0, *np.cumsum(rng.random(5)) * np.diff(x)])

        def error(knot, y=y):
            design = np.stack([np.ones_like(x), x, np.maximum(x - knot, 0.0)], 1)
            return float(((y - design @ np.linalg.lstsq(design, y, rcond=None)[0]) ** 2).sum())

        low, high = kink(x, y[None])
        knots = np.linspace(0.05, 5.95, 400)
        best = knots[np.argmin([error(knot) for knot in knots])]
        assert abs(float(low[0]) - best) <= 0.1
        assert abs(float(high[0]) - best) <= 0.1


def test_saturation_does_not_move_the_break():
    x = np.arange(8.0)
    rise = np.maximum(x - 2.5, 0.0)
    low, high = kink(x, np.stack([rise, np.minimum(rise, 2.5)]))
    assert np.abs(low - 2.5).max() < 0.1
    assert np.abs(high - 2.5).max() < 0.1


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (np.maximum(np.arange(8.0) - 4.0, 0.0), Existence.FOUND),
        (np.arange(8.0), Existence.NONE),
        (1.0 - np.exp(-np.arange(8.0)), Existence.NONE),
        (-np.maximum(np.arange(8.0) - 4.0, 0.0), Existence.UNDECIDED),
        (np.zeros(8), Existence.UNDECIDED),
    ],
)
def test_existence(shape, expected):
    rng = np.random.default_rng(0)
    noise = 0.01 * rng.normal(size=(8, 20))
    assert break_existence(Curve(np.arange(8.0), shape[:, None] + noise, np.ones(20))) is expected


def test_the_floor_is_left_at_the_first_setting_of_an_unbroken_run():
    rng = np.random.default_rng(0)
    means = np.array([0.0, 0.5, 0.0, 0.5, 2.0])
    sums = means[:, None] + 0.2 * rng.normal(size=(5, 20))
    assert leaves_floor(Curve(np.arange(5.0), sums, np.ones(20))) == 3
    assert leaves_floor(Curve(np.arange(2.0), sums[:1].repeat(2, 0) - 1.0, np.ones(20))) is None


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.4, 0.5, Verdict.CONFIRMED), (0.3, 0.5, Verdict.UNDECIDED), (0.1, 0.4, Verdict.NOT_CONFIRMED)],
)
def test_verdict_on_a_range(low, high, verdict):
    assert breaks_within(Break(Existence.FOUND, 0.0, low, high), 0.4, 0.6) is verdict
    assert breaks_within(Break(Existence.NONE), 0.4, 0.6) is Verdict.NOT_CONFIRMED
    assert breaks_within(Break(Existence.UNDECIDED), 0.4, 0.6) is Verdict.UNDECIDED


def test_verdict_on_an_order():
    rng = np.random.default_rng(0)
    least, more = one_setting(rng.random(20)), one_setting(rng.random(20) + 1.0)
    assert always_better([(least, more), (least, more)]) is Verdict.CONFIRMED
    assert always_better([(least, more), (more, least)]) is Verdict.NOT_CONFIRMED
    assert always_better([(least, more), (least, one_setting(rng.random(20)))]) is Verdict.UNDECIDED
    assert always_better([]) is Verdict.UNDECIDED
    assert difference(least, least).value == 0.0


@pytest.mark.parametrize(
    "arguments",
    [
        ([1.0, 0.0], [[1.0, 1.0], [1.0, 1.0]], [1.0, 1.0]),
        ([0.0, 1.0], [[1.0, np.inf], [1.0, 1.0]], [1.0, 1.0]),
        ([0.0, 1.0], [[1.0, np.nan], [1.0, 1.0]], [1.0, 1.0]),
        ([0.0], [[1.0, 1.0]], [1.0, 0.0]),
        ([0.0], [[1.0, 1.0, 1.0]], [1.0, 1.0]),
    ],
)
def test_invalid_curves(arguments):
    with pytest.raises(InvalidArgumentError):
        Curve(*map(np.array, arguments))


def test_a_break_needs_four_settings():
    curve = Curve(np.arange(3.0), np.ones((3, 4)), np.ones(4))
    with pytest.raises(InvalidArgumentError, match="four settings"):
        find_break(curve, np.ones((1, 4)))


def test_differences_are_paired_by_request():
    """The level of each request moves all of its settings; without pairing it hides an order that is there."""
    rng = np.random.default_rng(0)
    gain, shared = 0.3 + 0.05 * rng.normal(size=24), 20.0 * rng.random(24)
    assert difference(one_setting(shared), one_setting(shared + gain)).low > 0.0
    assert difference(one_setting(shared), one_setting(rng.permutation(shared) + gain)).low < 0.0


def test_the_interval_is_in_whole_settings_around_the_break():
    rng = np.random.default_rng(0)
    x = np.arange(9.0)
    shape = np.maximum(x - 4.3, 0.0)[:, None] * (1.0 + 0.2 * rng.normal(size=(9, 24)))
    counts = rng.multinomial(24, np.full(24, 1 / 24), 300).astype(float)
    result = find_break(Curve(x, shape, np.ones(24)), counts)
    assert result.existence is Existence.FOUND
    assert result.low <= result.raw_low <= result.at <= result.raw_high <= result.high
    assert result.low in x
    assert result.high in x
    assert result.low <= 4.3 <= result.high
    assert result.high - result.low <= 3.0


def test_looking_again_does_not_make_a_wrong_order_likelier():
    """Two settings that lose the same on average, heavy-tailed by request, asked for after 8, 16 and 32 requests."""

    def wrong(looks: int) -> int:
        rng = np.random.default_rng(11)
        count = 0
        for _ in range(600):
            first, second = rng.standard_t(3, (2, 32))
            verdicts = (
                always_better([(one_setting(first[:n]), one_setting(second[:n]))], looks=looks) for n in (8, 16, 32)
            )
            count += any(verdict is not Verdict.UNDECIDED for verdict in verdicts)
        return count

    # 5 % of 600 are 30, with a standard deviation of 5.3: at the whole level at each look it is about twice as many.
    assert wrong(3) <= 46 < wrong(1)
