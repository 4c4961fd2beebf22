"""The figure by which a request counts in the change test, and the baseline of a kind: the distribution of such
figures.

A request counts once, by its *level*: the mean over its tokens of the logarithm of the spread (`spread`). A level of n
tokens is the noisier the fewer they are, so what is compared is a *score*, (level − centre) / √(1 + h/n): with h the
number of tokens at which the noise within a request is as large as the differences between requests, scores of short
and long requests are about equally wide, and other lengths of the answers do not look like another model.

The first eighth of a baseline fixes centre, h and the scores' *scale* (their median absolute deviation, scaled as for a
normal distribution). What is bet on are *ramps*: r(s) rises from 0 to 1 between two scores, in units of the scale. They
are independent of the other requests of the baseline, whose ramps say what E[r] is without any assumption on the
distribution, by betting (Waudby-Smith & Ramdas, JRSS-B 2024): if g is the mean, e(g) = Π (1 + λ (g − r_i)) has an
expected value of 1; it grows with g. λ is the best one for the variance in the first eighth. A ramp says more than
whether a score is in the tail: a doubled spread of requests that depend on each other (log-sd 0.3, v = 10 to 25) is
found with about half of the requests that bets on tails with Clopper-Pearson limits took.

What E[r] is, is not fixed at one limit: wealth is kept for several g, those at which ln e(g) is one of `LEVELS`, and
multiplied by e(g) of the level below; of these the least counts. At the true g the product has an expected value of
at most 1 (1 + exp(`LEVELS[0]`), as lower ones count as that), so the least has, too. A larger g makes later bets lose
and the baseline's own evidence against it grow: what counts is the g that explains both best. With one limit, that
holds with a probability of 1 − α/2, a doubled spread took 1.3 to 1.5 times as many requests. Beyond the last level
nothing is known: `TAIL` is the probability that any g is there.

Requests that depend on each other say less: with v̂ the variance inflation of sums of levels
(`statistics.dependence`; of one in s requests v̂/s is enough), the product is raised to the power 1/v̂, and so is every
bet, before strategies are mixed. For the baseline's own evidence v̂ is frozen with it. Dependence may begin later: bets
use the largest one of that v̂, v̂ of recent requests (`statistics.dependence.RecentInflation`) and v̂ of the few requests
before this one (`SuccessiveDifferences`).

The *tolerance* c ≥ 1: a score bets upwards as if every spread had been smaller by the factor c, and downwards as if it
had been larger. So whatever multiplies the spreads of a kind by something between 1/c and c is no evidence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from hemostat_calibration.arrays import Floats
from hemostat_calibration.errors import InvalidArgumentError

MIN_SPREAD = 1e-3
"""The least spread, in nats. Smaller differences of logits count as this large: they are rounding."""

FIRST_PART, MIN_FIRST = 8, 20
"""One in so many requests of a baseline fixes the score, at least so many requests, but not more than a third."""

MAX_HALF_TOKENS = 512.0

MIN_SCALE = 0.02
"""The least scale of scores: a change of two percent counts as none."""

UPWARD_RAMPS = ((0.0, 3.0), (1.5, 3.0))
"""The ramps upwards, each as the two scores between which it rises, in units of the scale: a flat one for changes of
the size of the differences between requests, a steep one for larger ones.
"""

DOWNWARD_RAMPS = ((0.0, 3.0),)
"""The ramps downwards, in the same form, of scores with the other sign."""

MIN_LIMIT = 0.05
"""The least limit of a ramp: no limit is taken to be smaller, so that one request multiplies the wealth by at most
1/MIN_LIMIT.
"""

MIN_BASELINE_REQUESTS = 30
"""The least number of requests in a baseline: with fewer, no ramp has a limit that a bet could gain with."""

STAKES = (0.85, 0.2)
"""The parts of the wealth that strategies stake on each ramp: the small one finds what only some of the requests show,
such as a change of one engine of four."""

LOG_WEIGHTS = np.log([0.45, 0.2, 0.1, 0.05, 0.1, 0.1])
"""The natural logarithms of the parts of what is funded, by stake and ramp. Most of it is for a large stake on the flat
ramp upwards, since requests that depend on each other leave few effective ones to find a change with.
"""

LEVELS = np.array([-2.0, -1.0, *np.arange(0.0, 4.5, 0.5), 5.0, 6.0, 8.0, 10.0, 14.0])
"""The natural logarithms of the evidence of a baseline against a mean, float64 [J]."""
LEVEL_WEIGHTS = np.concatenate([LEVELS[:1], LEVELS[:-1]])[:, None] + LOG_WEIGHTS
"""The natural logarithms of the parts of what is funded, [J, S], multiplied by the baseline's evidence. The evidence of
the level below counts, as the true mean may be anywhere above that.
"""
MEAN_FACTOR = 1.0 + math.exp(LEVELS[0])
"""The largest expected value of the least wealth, as a multiple of what was funded."""
TAIL = (len(UPWARD_RAMPS) + len(DOWNWARD_RAMPS)) * math.exp(-LEVELS[-1])
CLEARING = LEVELS.tolist().index(4.0)
"""The level whose bets say whether an alarm is over."""

MAX_STAKE, MIN_DEVIATION, SUPPOSED = 0.95, 0.02, 2.0
"""The parameters of the bets on a baseline's means: the largest part of the wealth, the least standard deviation, and
the evidence that the bets are best for."""
_MEANS = np.linspace(0.0, 1.0, 65)
_DEVIATION = 0.6745
"""The median absolute deviation of a normal distribution, in units of its standard deviation."""


@dataclass(frozen=True, slots=True)
class RequestSpread:
    """The figures of one request.

    level: the mean over its tokens of ln(spread in nats). tokens: the number of tokens that have a spread, 1 or more.
    contrast: the level of the first half of the tokens minus the level of the rest; 0 for a single token.
    """

    level: float
    tokens: int
    contrast: float = 0.0

    def row(self) -> Floats:
        """Returns the figures as float64 [3], as `fit_baseline` takes them."""
        return np.array([self.level, self.tokens, self.contrast])


def request_spread(spreads: Floats) -> RequestSpread | None:
    """Returns the figures of a request from its tokens' spreads, float64 [T] nats, where NaN is left out. It is None if
    no token has a spread.

    >>> request_spread(np.array([0.1, np.nan, 0.1, 0.1])).tokens
    3
    """
    logs = np.log(np.maximum(spreads[~np.isnan(spreads)], MIN_SPREAD))
    if not len(logs):
        return None
    half = len(logs) // 2
    contrast = float(logs[:half].mean() - logs[half:].mean()) if half else 0.0
    return RequestSpread(float(logs.mean()), len(logs), contrast)


@dataclass(frozen=True, slots=True, eq=False)
class Baseline:
    """The frozen baseline of one kind.

    level: the mean level of its requests. centre, half_tokens, scale: the parameters of the score. limits: float64 [J,
    B], the means of the ramps (`UPWARD_RAMPS`, then `DOWNWARD_RAMPS`) at each of `LEVELS`. requests: the number of
    requests in it. inflation: v̂ of its levels.
    """

    level: float
    centre: float
    half_tokens: float
    scale: float
    limits: Floats
    requests: int
    inflation: float = 1.0

    def log_factors(self, levels: Floats, tokens: Floats, tolerance: float, inflation: float = 1.0) -> Floats:
        """Returns ln of the factors by which each strategy's wealth is multiplied, to the power 1/v̂: [R, J, S] from
        levels and tokens, both float64 [R]. inflation: v̂ of recent requests; the baseline's v̂ counts if it is larger.

        >>> baseline = fit_baseline(np.array([[math.sin(n), 50, 0.0] for n in range(150)]))
        >>> factors = baseline.log_factors(np.array([0.0, 9.0]), np.array([50.0, 50.0]), 1.25)
        >>> factors[:, CLEARING].max(axis=1).round(1).tolist()
        [-0.2, 2.8]
        """
        width, allowed = self._width(tokens), math.log(tolerance)
        distance = levels - self.centre
        gains = _ramps((distance - allowed) / width, (distance + allowed) / width)[:, None, :] / self.limits
        factors = [np.log(1.0 - stake + stake * gains) for stake in STAKES]
        result: Floats = np.concatenate(factors, axis=2) / max(self.inflation, inflation)
        return result

    def scores(self, levels: Floats, tokens: Floats) -> Floats:
        """Returns the scores of requests in units of the scale, float64 [R], from levels and tokens, both [R].

        >>> baseline = fit_baseline(np.array([[math.sin(n), 50, 0.0] for n in range(150)]))
        >>> baseline.scores(np.array([0.0, 1.0]), np.array([50.0, 50.0])).round(1).tolist()
        [-0.1, 1.0]
        """
        return (levels - self.centre) / self._width(tokens)

    def _width(self, tokens: Floats) -> Floats:
        width: Floats = self.scale * np.sqrt(1.0 + self.half_tokens / tokens)
        return width


def _ramps(upward: Floats, downward: Floats) -> Floats:
    """Returns the ramps of scores [R] as the bets in either direction take them: [R, B], between 0 and 1."""
    ramps = [(upward - low) / (high - low) for low, high in UPWARD_RAMPS]
    ramps += [(-downward - low) / (high - low) for low, high in DOWNWARD_RAMPS]
    clipped: Floats = np.clip(np.stack(ramps, axis=1), 0.0, 1.0)
    return clipped


def fit_baseline(requests: Floats, part: float = 1.0, inflation: float = 1.0, stride: int = 1) -> Baseline:
    """Returns the baseline of a kind from its first requests, in their order: float64 [R, 3], rows of
    `RequestSpread.row`. part: of the evidence against means of all baselines; together they are at most 1. inflation:
    v̂ of the levels of all of them, 1 or more. stride: one in so many is given.

    The true mean of a ramp is above its limit at level ℓ with a probability of at most part · exp(−ℓ), if the requests
    are independent and of one distribution, whatever it is. Raises InvalidArgumentError for fewer than
    `MIN_BASELINE_REQUESTS` effective ones.

    >>> fit_baseline(np.array([[math.sin(n), 50, 0.0] for n in range(150)])).requests
    150
    """
    v = max(inflation / stride, 1.0)
    if (effective := len(requests) / v) < MIN_BASELINE_REQUESTS:
        raise InvalidArgumentError(
            f"the baseline has {effective:.0f} effective requests: at least {MIN_BASELINE_REQUESTS} are needed"
        )
    levels, tokens, _ = requests.T
    first = max(len(requests) // FIRST_PART, min(MIN_FIRST, len(requests) // 3))
    centre = float(np.median(levels[:first]))
    half_tokens = _half_tokens(requests[:first], centre)
    scores = (levels - centre) / np.sqrt(1.0 + half_tokens / tokens)
    scale = max(float(np.median(np.abs(scores[:first]))) / _DEVIATION, MIN_SCALE)
    ramps = _ramps(scores / scale, scores / scale)
    deviations = ramps[:first].std(axis=0).tolist()
    limits = [level_means(ramp[first:], part, sd, v) for ramp, sd in zip(ramps.T, deviations, strict=True)]
    return Baseline(
        level=float(levels.mean()),
        centre=centre,
        half_tokens=half_tokens,
        scale=scale,
        limits=np.maximum(np.stack(limits, axis=1), MIN_LIMIT),
        requests=len(requests) * stride,
        inflation=inflation,
    )


def _half_tokens(requests: Floats, centre: float) -> float:
    """Returns the number of tokens at which the variance of a level's noise, from both halves of a request, is the
    variance between requests."""
    levels, tokens, contrasts = requests[requests[:, 1] > 1.0].T
    if not len(levels):
        return 0.0
    halves = np.floor(tokens / 2.0)
    within = float(np.mean(contrasts**2 / (1.0 / halves + 1.0 / (tokens - halves))))
    # By the median absolute deviation: one odd request must not decide.
    total = float(np.median(np.abs(levels - centre)) / _DEVIATION) ** 2
    between = total - within * float(np.mean(1.0 / tokens))
    return min(within / between, MAX_HALF_TOKENS) if between > 0.0 else MAX_HALF_TOKENS


def level_means(values: Floats, part: float, deviation: float, inflation: float = 1.0) -> Floats:
    """Returns the means g against which values between 0 and 1, float64 [m], are so much evidence that ln(part · e(g))
    = ℓ, for each ℓ of `LEVELS`: [J]; 1 where there is none.

    deviation: about their standard deviation, from other data; means are nearest where it is right. inflation: v̂ of
    their sums, 1 or more.

    >>> values = np.tile([0.0, 0.5, 1.0, 0.5], 50)
    >>> [level_means(values, 1.0, 0.35, inflation=v)[CLEARING].round(3).tolist() for v in (1.0, 4.0)]
    [0.575, 0.65]
    """
    best = math.sqrt(2.0 * SUPPOSED * inflation / len(values)) / max(deviation, MIN_DEVIATION)
    # Capital that is left is at least 1 − MAX_STAKE where a value is 1; 1 − mean may round to 0.
    stakes = np.minimum(best, MAX_STAKE / np.maximum(1.0 - _MEANS, 1e-9))[:, None]
    evidence = np.log1p(stakes * (_MEANS[:, None] - values)).sum(axis=1) / inflation + math.log(part)
    result: Floats = np.interp(LEVELS, evidence, _MEANS, right=1.0)
    return result
