import math

import numpy as np
import pytest

from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.statistics.streaming import Histogram, RatioEstimate, student_975


def test_too_few_values_give_no_figure():
    nothing = RatioEstimate().get()
    assert math.isnan(nothing.mean)
    assert (nothing.low, nothing.high, nothing.requests) == (-math.inf, math.inf, 0)
    estimate = RatioEstimate().update(3.0, 6.0).get()
    assert (estimate.mean, estimate.low, estimate.high, estimate.requests, estimate.tokens) == (
        0.5,
        -math.inf,
        math.inf,
        1,
        6.0,
    )
    empty = RatioEstimate().update(0.0, 0.0).update(0.0, 0.0).get()
    assert math.isnan(empty.mean)


def test_the_interval_counts_requests_not_tokens():
    """Tokens of a request repeat one another: a thousand of them tell no more than ten."""
    rng = np.random.default_rng(0)
    x = rng.normal(1.0, 0.3, size=30)
    few, many = RatioEstimate(), RatioEstimate()
    for value in x:
        few, many = few.update(10 * value, 10), many.update(1000 * value, 1000)
    assert few.get().low == pytest.approx(many.get().low)


def test_the_interval_covers():
    """95 % of intervals hold the truth, also with few requests of very different lengths."""
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(2000):
        state = RatioEstimate()
        for _ in range(12):
            n = int(rng.integers(20, 60))
            state = state.update(n * (0.5 + 0.1 * rng.normal()) + rng.normal(), n)
        value = state.get()
        held += value.low <= 0.5 <= value.high
    assert 0.93 < held / 2000 < 0.97


def test_student():
    for degrees, value in ((1, 12.7062), (10, 2.2281), (30, 2.0423), (31, 2.0395), (60, 2.0003), (10**6, 1.95997)):
        assert student_975(degrees) == pytest.approx(value, abs=1e-4)


def test_nonsense_is_refused():
    for x, n in ((math.nan, 1.0), (math.inf, 1.0), (1.0, -1.0), (1.0, math.nan)):
        with pytest.raises(InvalidArgumentError):
            RatioEstimate().update(x, n)
    for edges in ((), (1.0, 1.0), (2.0, 1.0)):
        with pytest.raises(InvalidArgumentError, match="edges"):
            Histogram(edges)
    with pytest.raises(InvalidArgumentError, match="edges"):
        Histogram((1.0,)).merge(Histogram((2.0,)))
    with pytest.raises(InvalidArgumentError, match="counts"):
        Histogram((1.0,), (1, 2, 3))


def test_buckets_hold_their_upper_edge():
    state = Histogram((0.0, 1.0)).update(np.array([[-1.0, 0.0], [0.5, 1.0], [1.5, np.inf], [np.nan, np.nan]]))
    assert state.get() == (2, 2, 2)
    assert state.total == 2.0
