"""Coverage over all looks at once, by simulation: streams of requests whose tokens are correlated."""

import functools
import math

import numpy as np
import pytest

from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.statistics import confidence
from hemostat_calibration.statistics.confidence import ClippedMean, MeanSequence, Proportion
from hemostat_calibration.statistics.streaming import RatioEstimate

STREAMS = 1000
NEEDED = 937  # of 1,000 at a nominal 95 %: what a binomial share of 0.95 reaches in all but 3 % of simulations
REQUESTS = 1000
CAP = 5.0


def simulate(rng, streams, requests, *, tail=1.0, longer=0.0):
    """Sums x and lengths n of requests, float64 [streams, requests]: tokens of a log-normal figure clipped at CAP.

    A request has an effect of its own, and its tokens an autoregression on top; `longer` makes requests of a high
    figure longer, `tail` widens the distribution.
    """
    effect = rng.standard_normal((streams, requests), np.float32)
    n = 1 + rng.poisson(6.0 * np.exp(longer * effect))
    n = np.minimum(n, 24)
    x = np.zeros((streams, requests), np.float32)
    noise = rng.standard_normal((streams, requests), np.float32)
    for t in range(int(n.max())):
        value = np.exp(tail * (0.6 * effect + 0.8 * noise) - 1.0)
        x += np.where(t < n, np.minimum(value, CAP), 0.0)
        noise = 0.7 * noise + math.sqrt(1 - 0.49) * rng.standard_normal(noise.shape, np.float32)
    return x.astype(np.float64), n.astype(np.float64)


def running(x, n):
    """What `reach` wants after every request, along the last axis."""
    t = np.arange(1, x.shape[-1] + 1)
    mean_x, mean_n = x.cumsum(-1) / t, n.cumsum(-1) / t
    xx = (x**2).cumsum(-1) - t * mean_x**2
    xn = (x * n).cumsum(-1) - t * mean_x * mean_n
    nn = (n**2).cumsum(-1) - t * mean_n**2
    cubes = [power.cumsum(-1) for power in (x**3, x**2 * n, x * n**2, n**3)]
    return t, mean_x, mean_n, xx, xn, nn, cubes


CASES = {
    "log-normal": {"tail": 1.0},
    "heavy tail, clipped": {"tail": 1.8},
    "long requests are the bad ones": {"tail": 1.0, "longer": 0.5},
}


@pytest.mark.parametrize("name", CASES)
def test_the_interval_of_a_mean_covers_at_every_look(name):
    rng = np.random.default_rng(1)
    x, n = simulate(rng, 250, 6_000, **CASES[name])
    truth = x.sum() / n.sum()
    covered, narrow = 0, []
    for _ in range(STREAMS // 250):
        x, n = simulate(rng, 250, REQUESTS, **CASES[name])
        t, mean_x, mean_n, xx, xn, nn, cubes = running(x, n)
        ratio = mean_x / mean_n
        below, above = confidence.reach(t, mean_x, mean_n, xx, xn, nn, cubes, 0.05)
        covered += int(((ratio - below <= truth) & (truth <= ratio + above)).all(-1).sum())
        residual = xx - 2 * ratio * xn + ratio**2 * nn
        fixed = 2 * 1.962 * np.sqrt(residual * t / (t - 0.999)) / (t * mean_n)
        narrow.append(((below + above) / fixed)[:, -1])
    print(f"{name}: {covered} of {STREAMS} streams covered at every look, width at most {np.max(narrow):.2f} x fixed")
    assert covered >= NEEDED
    assert np.max(narrow) < 2.0


def test_the_interval_of_a_difference_covers_at_every_look():
    rng = np.random.default_rng(2)
    x, n = simulate(rng, 500, 3_000)
    truth = float(x.sum() / n.sum()) * (1.0 - 1.25)
    looks = np.unique(np.geomspace(20, REQUESTS, 30).astype(int)) - 1
    covered = wide = 0
    for _ in range(STREAMS // 250):
        arms = [moments(*simulate(rng, 250, REQUESTS), looks, scale) for scale in (1.0, 1.25)]
        for stream in range(250):
            good = True
            for at, t in enumerate(looks + 1):
                first, second = (
                    MeanSequence(RatioEstimate(int(t), *sums[:5]), tuple(sums[5:]))
                    for sums in (arm[:, stream, at].tolist() for arm in arms)
                )
                result = confidence.difference(first, second)
                good &= result.low <= truth <= result.high
            covered += good
            fixed = math.hypot(*((arm.moments.get().high - arm.moments.get().low) for arm in (first, second)))
            wide = max(wide, (result.high - result.low) / fixed)
    print(f"difference: {covered} of {STREAMS} streams covered at every look, width at most {wide:.2f} x fixed")
    assert covered >= NEEDED
    assert wide < 2.0


def moments(x, n, looks, scale):
    """What a `MeanSequence` holds at every look, [9, streams, looks], the figure being `scale` times as large."""
    _, *second, cubes = running(x, n)
    powers = scale ** np.array([1, 0, 2, 1, 0, 3, 2, 1, 0])
    return np.array([moment[..., looks] for moment in (*second, *cubes)]) * powers[:, None, None]


@pytest.mark.parametrize("share", [0.002, 0.1, 0.5, 1.0])
def test_the_interval_of_a_proportion_covers_at_every_look(share):
    rng = np.random.default_rng(4)
    interval = functools.cache(lambda hits, requests: Proportion(hits, requests).get())
    looks = [t for t in range(1, REQUESTS + 1) if t < 20 or t % 7 == 0]
    covered = 0
    for row in (rng.random((STREAMS, REQUESTS)) < share).cumsum(1):
        result = [interval(int(row[t - 1]), t) for t in looks]
        covered += all(interval.low <= share <= interval.high for interval in result)
    print(f"proportion {share}: {covered} of {STREAMS} streams covered at every look")
    assert covered >= NEEDED
    result = interval(round(share * REQUESTS), REQUESTS)
    assert result.high - result.low < 2 * 2 * 1.96 * math.sqrt(max(share * (1 - share), 0.01) / REQUESTS)


def test_streaming_equals_the_moments_and_nan_is_left_out():
    rng = np.random.default_rng(0)
    state = ClippedMean(0.0, 1.0)
    values = [rng.exponential(0.3, rng.integers(1, 20)) for _ in range(60)]
    for v in values:
        state = state.update(np.append(v, np.nan))
    state = state.update(np.array([np.nan]))
    clipped = [np.minimum(v, 1.0) for v in values]
    result = state.get()
    assert result.mean == pytest.approx(np.concatenate(clipped).mean())
    assert state.clipped / state.tokens == pytest.approx(np.mean(np.concatenate(values) > 1.0))
    x, n = np.array([v.sum() for v in clipped]), np.array([len(v) for v in clipped])
    residual = x - result.mean * n
    skew = (residual**3).sum() / (residual**2).sum() ** 1.5
    assert skew > 0.0
    for m, widening in ((result.low, 0.0), (result.high, skew)):  # the ends solve the inequality that defines them
        kappa = float(confidence._kappa(60, 0.05, widening))
        assert np.sum(x - m * n) ** 2 == pytest.approx(kappa * np.sum((x - m * n) ** 2))


def test_before_there_is_evidence_nothing_is_refuted():
    state = ClippedMean(0.0, 2.0)
    assert math.isnan(state.get().mean)
    for _ in range(10):
        state = state.update(np.array([0.1, 0.3]))
        assert (state.get().low, state.get().high) == (0.0, 2.0)
    assert math.isnan(confidence.difference(state.sequence, state.sequence).mean)
    assert (Proportion().get().low, Proportion().get().high) == (0.0, 1.0)


def test_requests_that_are_all_alike_still_leave_doubt():
    state = ClippedMean(0.0, 1.0)
    for _ in range(1000):
        state = state.update(np.zeros(5))
    result = state.get()
    assert result.low == 0.0
    assert 0.003 < result.high < 0.02


def test_where_a_few_requests_carry_the_tokens_nothing_is_refuted():
    rng = np.random.default_rng(0)
    sequence = MeanSequence()
    for n in rng.integers(20, 301, 400):
        sequence = sequence.update(float(rng.gamma(10.0, 0.01) * n), float(n))
    assert not sequence.carried_by_few()
    assert sequence.carried_by_few(20.0), "of 20 effective requests, some are shorter than others"
    assert sequence.get(0.0, 1.0).high < 0.2
    long = sequence.update(0.1 * 4000.0, 4000.0)
    assert long.carried_by_few()
    assert (long.get(0.0, 1.0).low, long.get(0.0, 1.0).high) == (0.0, 1.0)
    for _ in range(50):
        long = long.update(float(rng.gamma(10.0, 0.01) * 4000.0), 4000.0)
    assert not long.carried_by_few()
    assert long.get(0.0, 1.0).high < 0.2
    assert not MeanSequence().carried_by_few(), "nothing is known"


def test_arguments():
    with pytest.raises(InvalidArgumentError, match="increase"):
        ClippedMean(1.0, 1.0)
    with pytest.raises(InvalidArgumentError, match="below"):
        ClippedMean(0.0, 1.0).update(np.array([-0.1]))
    with pytest.raises(InvalidArgumentError, match="differ"):
        ClippedMean(0.0, 1.0).merge(ClippedMean(0.0, 2.0))
    for alpha in (0.0, 1.0):
        with pytest.raises(InvalidArgumentError, match="alpha"):
            Proportion(1, 2).get(alpha)
        with pytest.raises(InvalidArgumentError, match="alpha"):
            MeanSequence().get(alpha=alpha)
