import numpy as np
import pytest

from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.statistics.sequential import LowerSequence


def ever_above(draw, lo, hi, mean, alpha, streams, length):
    """Share of streams whose lower bound is above the true mean at any moment."""
    wrong = 0
    for stream in range(streams):
        x = draw(np.random.default_rng(stream), length)
        state = LowerSequence.begin(lo, hi)
        for value in x:
            state = state.update(value)
            if state.get(alpha) > mean:
                wrong += 1
                break
    return wrong / streams


NULLS = {
    "small steps": (lambda rng, n: rng.normal(0.0, 0.2, n).clip(-1, 1), 0.0),
    "coin": (lambda rng, n: rng.choice([-1.0, 1.0], n), 0.0),
    "rare and large": (lambda rng, n: np.where(rng.random(n) < 0.02, -0.98, 0.02), 0.0),
    "off the middle": (lambda rng, n: rng.choice([0.2, 0.6], n), 0.4),
}


@pytest.mark.parametrize("name", NULLS)
def test_the_error_holds_over_all_looks(name):
    draw, mean = NULLS[name]
    alpha, streams = 0.1, 150
    rate = ever_above(draw, -1.0, 1.0, mean, alpha, streams, 200)
    assert rate <= alpha + 3 * np.sqrt(alpha * (1 - alpha) / streams)


def test_the_null_test_can_fail():
    """The same simulation catches a bound that is only valid for one look: the plain z interval."""
    wrong = 0
    for stream in range(150):
        x = np.random.default_rng(stream).normal(0.0, 0.2, 200)
        n = np.arange(1, 201)
        wrong += bool((np.cumsum(x) / n - 1.282 * 0.2 / np.sqrt(n) > 0).any())
    assert wrong / 150 > 0.3


def test_a_small_gain_is_found():
    """A gain of 0.04 nats of spread 0.05, range ±2 (clamp 1): about 190 requests at 5 %, half at half the range."""
    needed = {}
    for width in (2.0, 1.0):
        counts = []
        for stream in range(15):
            rng = np.random.default_rng(stream)
            state = LowerSequence.begin(-width, width)
            while state.get(0.05) <= 0.0:
                state = state.update(rng.normal(0.04, 0.05))
            counts.append(state.observations)
        needed[width] = np.median(counts)
    assert 120 < needed[2.0] < 220
    assert 60 < needed[1.0] < 120


def test_the_bound_approaches_the_mean_from_below():
    rng = np.random.default_rng(0)
    state = LowerSequence.begin(-2.0, 2.0)
    last = -2.0
    for n in (100, 1000, 5000):
        while state.observations < n:
            state = state.update(float(rng.normal(0.3, 0.2)))
        bound = state.get(0.05)
        assert last <= bound <= state.mean
        last = bound
    assert last > 0.25


def test_less_certainty_gives_a_higher_bound():
    state = LowerSequence.begin(-1.0, 1.0)
    for _ in range(50):
        state = state.update(0.2)
    bounds = [state.get(alpha) for alpha in (0.001, 0.05, 0.5)]
    assert bounds == sorted(bounds)


def test_what_is_above_the_range_counts_as_its_end():
    a = LowerSequence.begin(-1.0, 1.0).update(5.0)
    b = LowerSequence.begin(-1.0, 1.0).update(1.0)
    np.testing.assert_array_equal(a.log_wealth, b.log_wealth)


def test_the_worst_observation_does_not_end_the_game():
    state = LowerSequence.begin(-1.0, 1.0).update(-1.0)
    for _ in range(200):
        state = state.update(0.5)
    assert state.get(0.05) > 0.0


def test_arguments():
    state = LowerSequence.begin(-1.0, 1.0)
    for x in (float("nan"), -1.1):
        with pytest.raises(InvalidArgumentError, match="observation"):
            state.update(x)
    for lo, hi in ((1.0, 1.0), (0.0, float("inf")), (float("nan"), 1.0)):
        with pytest.raises(InvalidArgumentError, match="range"):
            LowerSequence.begin(lo, hi)
    for alpha in (0.0, 1.0, float("nan")):
        with pytest.raises(InvalidArgumentError, match="alpha"):
            state.get(alpha)
    with pytest.raises(InvalidArgumentError, match="differ"):
        state.merge(LowerSequence.begin(-2.0, 1.0))
    assert 0.0 in state.grid
