"""Survival against what it stands for: coupled texts by enumeration, product limits by hand, coverage by simulation."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.records import Truth, log_softmax, make_record

from hemostat_calibration.divergence.trajectory import POSITIONS, Survival, agreement
from hemostat_calibration.errors import InvalidArgumentError


def observed(requests):
    state = Survival()
    for factors in requests:
        state = state.update(np.asarray(factors, dtype=np.float64))
    return state


@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 70))
def test_equally_long_requests_are_averaged(seed, requests, tokens):
    factors = np.random.default_rng(seed).random((requests, tokens)) ** 0.1
    curve = observed(factors).get()
    expected = np.cumprod(factors, axis=1).mean(0)
    assert list(curve.positions) == [t for t in POSITIONS if t <= tokens]
    np.testing.assert_allclose(curve.survival, expected[curve.positions - 1], rtol=1e-9)
    assert ((curve.low <= curve.survival) & (curve.survival <= curve.high)).all()
    assert (curve.at_risk == requests).all()
    if tokens <= 16:
        assert curve.prefix == pytest.approx(expected.sum())


def test_the_emitted_tokens_give_the_coupled_texts_exactly():
    """Two models with memory over three tokens, every text of five: the mean of Π min(1, r/c) along texts of c is
    Σ Π min(r, c), what a coupling token by token attains, and at most 1 − TV of the two distributions of texts."""
    rng = np.random.default_rng(0)
    tokens, length = 3, 5
    c = {}
    r = {}
    for n in range(length):
        for context in itertools.product(range(tokens), repeat=n):
            counts = rng.permutation([2, 1, 1])  # quarters, so that copies of a text stand for its probability
            c[context], r[context] = counts / 4.0, rng.dirichlet(np.ones(tokens))
    state = Survival()
    coupled, best = np.zeros(length), 0.0
    for text in itertools.product(range(tokens), repeat=length):
        c_x = np.array([c[text[:t]][text[t]] for t in range(length)])
        r_x = np.array([r[text[:t]][text[t]] for t in range(length)])
        best += min(c_x.prod(), r_x.prod())
        coupled[-1] += np.minimum(c_x, r_x).prod()
        for _ in range(round(c_x.prod() * 4**length)):
            state = state.update(np.minimum(1.0, r_x / c_x))
    curve = state.get()
    assert state.requests == 4**length
    assert curve.survival[-1] == pytest.approx(coupled[-1], rel=1e-12)
    assert curve.survival[-1] <= best


def test_agreement_is_read_from_a_record():
    rng = np.random.default_rng(1)
    log_r, log_c = log_softmax(rng.normal(size=(6, 9))), log_softmax(rng.normal(size=(6, 9)))
    emitted = rng.integers(0, 9, size=6)
    probabilities = agreement(make_record(Truth(log_r, log_c, emitted), 2))
    at = np.arange(6), emitted
    np.testing.assert_allclose(probabilities, np.minimum(1.0, np.exp(log_r[at] - log_c[at])))


def test_a_request_that_ended_says_nothing_about_later():
    """Kaplan and Meier by hand: 5 greedy texts that part or end at different tokens."""
    requests = [[1, 1, 0], [1, 1, 1, 1, 1, 1], [1, 0, 1, 1], [1, 1], [1, 1, 1, 1, 0, 1]]
    curve = observed(requests).get()
    np.testing.assert_array_equal(curve.at_risk, [5, 5, 4, 3, 2, 2])
    # One of 5 alive parts at the second token; one of 3 still together at the third; one of 2 at the fifth.
    steps = [1, 4 / 5, 2 / 3, 1, 1 / 2, 1]
    np.testing.assert_allclose(curve.survival, np.cumprod(steps))
    assert curve.prefix == pytest.approx(np.cumprod(steps).sum())
    assert curve.half_life == pytest.approx(4 + (8 / 15 - 0.5) / (8 / 15 - 4 / 15))


def test_bounds_of_tv_turn_round():
    """A lower bound of TV gives an upper bound of survival."""
    rng = np.random.default_rng(2)
    low = rng.random((20, 30)) * 0.05
    high = low + rng.random((20, 30)) * 0.05
    above, below = observed(1.0 - low).get(), observed(1.0 - high).get()
    assert (above.survival >= below.survival).all()
    assert above.half_life >= below.half_life


def test_the_intervals_cover():
    """Requests of unequal length whose tokens go astray together: 95 % of intervals hold the truth."""
    rng = np.random.default_rng(3)
    streams, requests, horizon = 400, 60, 32
    # A request's hazard is one of three: survival is a mixture, its tokens are as correlated as can be.
    hazards = np.array([0.005, 0.03, 0.12])
    truth = ((1.0 - hazards[:, None]) ** np.arange(1, horizon + 1)).mean(0)
    inside = np.zeros(4)
    for _ in range(streams):
        state = Survival()
        for _ in range(requests):
            tokens = int(rng.integers(horizon, 3 * horizon))
            hazard = hazards[rng.integers(3)]
            state = state.update(1.0 - hazard * rng.binomial(1, 0.5, size=tokens) * 2.0)
        curve = state.get(horizon)
        at = {t: i for i, t in enumerate(curve.positions.tolist())}
        inside += [
            *(curve.low[at[t]] <= truth[t - 1] <= curve.high[at[t]] for t in (4, 16, 32)),
            curve.prefix_low <= truth.sum() <= curve.prefix_high,
        ]
    assert (inside / streams > 0.92).all(), inside / streams
    assert (inside / streams < 0.985).all(), inside / streams


def test_the_half_life_has_an_interval():
    rng = np.random.default_rng(4)
    curve = observed(1.0 - 0.04 * rng.random((50, 200)) * 2.0).get()
    truth = math.log(0.5) / math.log(0.96)
    assert curve.half_life_low < curve.half_life < curve.half_life_high
    assert curve.half_life == pytest.approx(truth, rel=0.1)
    assert observed([[0.9] * 3] * 5).get().half_life == math.inf


def test_the_prefix_between_positions():
    """Positions beyond 16 are apart; what is interpolated stays within half a percent for a smooth curve."""
    curve = observed([np.full(300, 0.98)] * 3).get(256)
    assert curve.horizon == 256
    assert curve.prefix == pytest.approx((0.98 ** np.arange(1, 257)).sum(), rel=5e-3)
    assert observed([np.full(300, 0.98)] * 3).get(10**6).horizon == 256


def test_too_little_says_so():
    nothing = Survival().get()
    assert len(nothing.positions) == 0
    assert math.isnan(nothing.prefix)
    assert nothing.half_life == math.inf
    curve = observed([[0.9, 0.8]]).get()
    np.testing.assert_array_equal(curve.low, 0.0)
    np.testing.assert_array_equal(curve.high, 1.0)
    assert (curve.prefix_low, curve.prefix_high) == (0.0, 2.0)
    # Twenty requests without a loss do not prove that there is none.
    lossless = observed([[1.0, 1.0]] * 20).get()
    np.testing.assert_allclose(lossless.low, 0.025 ** (1 / 20))
    np.testing.assert_array_equal(lossless.high, 1.0)
    lost = observed([[0.0, 1.0]] * 20).get()
    np.testing.assert_array_equal(lost.survival, 0.0)
    np.testing.assert_allclose(lost.high, 1.0 - 0.025 ** (1 / 20))


@pytest.mark.parametrize(
    "factors", [np.zeros(0), np.array([0.5, 1.1]), np.array([-0.1]), np.array([np.nan]), np.ones((2, 2))]
)
def test_nonsense_is_refused(factors):
    with pytest.raises(InvalidArgumentError, match="factors"):
        Survival().update(factors)


def test_a_horizon_is_a_number_of_tokens():
    with pytest.raises(InvalidArgumentError, match="horizon"):
        Survival().get(0)


def test_intervals_of_runs_of_alike_texts_cover_with_their_inflation_and_not_without():
    """Runs of 5 equal texts of 20 tokens, 60 of them, each of which keeps a token with a probability of its own."""
    rng, lives, covered = np.random.default_rng(3), 150, {1.0: 0, 5.0: 0}
    for _ in range(lives):
        survival = Survival()
        for keep in rng.uniform(0.9, 1.0, 60):
            factors = np.full(20, keep)
            for _ in range(5):
                survival = survival.update(factors)
        for v in covered:
            curve = survival.get(inflation=v)
            truth = (1.0 - 0.9 ** (curve.positions + 1.0)) / (0.1 * (curve.positions + 1.0))
            covered[v] += curve.low[11] <= truth[11] <= curve.high[11]
    assert covered[5.0] >= 0.9 * lives
    assert covered[1.0] < 0.8 * lives
