"""What one request says to the change test, and the baseline of a kind: how such requests were distributed.

A request counts once, by its *level*: the mean over its tokens of the logarithm of the spread (`spread`). A level of n
tokens is the noisier the fewer they are, so what is compared is a *score*, (level − centre) / √(1 + h/n): with h the
number of tokens at which the noise within a request is as large as the differences between requests, scores of short
and long requests are about equally wide, and other lengths of the answers do not look like another model.

The first fifth of a baseline fixes centre and h. The scores of the other m requests are then independent of that
choice, and their order statistics give limits without any assumption on the distribution: a new score of the same
distribution is above the (j+1)-th largest of m with a probability of more than g in no more than a part P(Binomial(m,
g) ≤ j) of all baselines (Clopper & Pearson, 1934; Wilks, 1941). `Baseline.limits` are such g.

Requests that depend on each other say less: limits are of m/v̂ scores, of which j/v̂ are above, with v̂ the variance
inflation of sums of levels (`statistics.dependence`; of one in s requests v̂/s is enough; for proportions so Korn &
Graubard, Survey Methodology 1998), and every bet is raised to the power 1/v̂ before strategies are mixed. v̂ is frozen
with the baseline: afterwards a change of the model would look like dependence.

The *tolerance* c ≥ 1: a score bets upwards as if every spread had been smaller by the factor c, and downwards as if it
had been larger. So whatever multiplies the spreads of a kind by something between 1/c and c is no evidence.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

from hemostat_calibration.arrays import Floats
from hemostat_calibration.errors import InvalidArgumentError

MIN_SPREAD = 1e-3
"""Nats; smaller differences of logits count as this large: they are rounding."""

FIRST_PART = 5
"""One in so many requests of a baseline fixes the score."""

MAX_HALF_TOKENS = 512.0

UPPER_SHARES = (0.0, 0.05, 0.2)
"""Ranges that are bet on: above the score that this part of the baseline is above."""

LOWER_SHARES = (0.0, 0.1)
"""Likewise: below the score that this part of the baseline is below."""

MIN_LIMIT = 0.05
"""No limit is taken to be smaller, so that one request multiplies the wealth by at most 1/MIN_LIMIT."""

MIN_BASELINE_REQUESTS = 30
"""With fewer, no range has a limit that a bet could gain with."""

BETS = (0.9, 0.6, 0.3, 0.1)
"""Parts of the wealth that strategies of the change test stake; each on each range."""

STRATEGIES = len(BETS) * (len(UPPER_SHARES) + len(LOWER_SHARES))

LOG_WEIGHTS = np.log([0.5] + [0.5 / (STRATEGIES - 1)] * (STRATEGIES - 1))
"""ln of the parts of what is funded: half is for the largest bet on what is above all of the baseline, which finds a
large change soonest."""


@dataclass(frozen=True, slots=True)
class RequestSpread:
    """One request.

    level: mean over its tokens of ln(spread in nats). tokens: that have a spread, 1 or more. contrast: level of the
    first half of the tokens minus that of the rest, 0 for a single token.
    """

    level: float
    tokens: int
    contrast: float = 0.0

    def row(self) -> Floats:
        """float64 [3], as `fit_baseline` takes it."""
        return np.array([self.level, self.tokens, self.contrast])


def request_spread(spreads: Floats) -> RequestSpread | None:
    """Of float64 [T] nats; NaN is left out. None without a token that has a spread.

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
    """Of one kind, frozen.

    level: mean level of its requests. centre, half_tokens: of the score. edges: float64 [B], scores: first the ranges
    above an edge (`UPPER_SHARES`), then those below one (`LOWER_SHARES`). limits: float64 [B], of the probability that
    a score falls into each range. requests: in the baseline. inflation: v̂ of its levels.
    """

    level: float
    centre: float
    half_tokens: float
    edges: Floats
    limits: Floats
    requests: int
    inflation: float = 1.0

    def log_factors(self, levels: Floats, tokens: Floats, tolerance: float) -> Floats:
        """ln of what each strategy's wealth is multiplied by, to the power 1/v̂: levels, tokens float64 [R] ->
        [R, `STRATEGIES`].

        >>> baseline = fit_baseline(np.array([[math.sin(n), 50, 0.0] for n in range(150)]), alpha=0.0025)
        >>> baseline.log_factors(np.array([0.0, 9.0]), np.array([50.0, 50.0]), 1.25).max(axis=1).round(1).tolist()
        [-0.1, 2.7]
        """
        width = np.sqrt(1.0 + self.half_tokens / tokens)[:, None]
        upper, allowed = len(UPPER_SHARES), math.log(tolerance)
        distance = levels[:, None] - self.centre
        inside = np.concatenate(
            [
                (distance - allowed) / width > self.edges[:upper],
                (distance + allowed) / width < self.edges[upper:],
            ],
            axis=1,
        )
        stakes = np.array(BETS)[:, None]
        factors = 1.0 - stakes + stakes * (inside / self.limits)[:, None, :]
        result: Floats = np.log(factors).reshape(len(levels), STRATEGIES) / self.inflation
        return result


def fit_baseline(requests: Floats, alpha: float, inflation: float = 1.0, stride: int = 1) -> Baseline:
    """The baseline of a kind from its first requests, in their order: float64 [R, 3], rows of `RequestSpread.row`.
    inflation: v̂ of the levels of all of them, 1 or more. stride: one in so many is given.

    With a probability of at least 1 − alpha no limit is below the true probability of its range, if the requests are
    independent and of one distribution, whatever it is. InvalidArgumentError for fewer than `MIN_BASELINE_REQUESTS`
    effective ones.

    >>> fit_baseline(np.array([[math.sin(n), 50, 0.0] for n in range(150)]), alpha=0.0025).requests
    150
    """
    v = max(inflation / stride, 1.0)
    if (effective := len(requests) / v) < MIN_BASELINE_REQUESTS:
        raise InvalidArgumentError(
            f"the baseline has {effective:.0f} effective requests: at least {MIN_BASELINE_REQUESTS} are needed"
        )
    levels, tokens, _ = requests.T
    first = len(requests) // FIRST_PART
    centre = float(np.median(levels[:first]))
    half_tokens = _half_tokens(requests[:first], centre)
    scores = np.sort((levels[first:] - centre) / np.sqrt(1.0 + half_tokens / tokens[first:]))
    m = len(scores)
    above, below = ([int(share * m) for share in shares] for shares in (UPPER_SHARES, LOWER_SHARES))
    edges = np.array([scores[m - 1 - j] for j in above] + [scores[j] for j in below])
    part = alpha / len(edges)
    counts = [(math.ceil(j / v), int(m / v)) for j in (*above, *below)]
    limits = np.array([max(upper_limit(hits, trials, part), MIN_LIMIT) for hits, trials in counts])
    return Baseline(float(levels.mean()), centre, half_tokens, edges, limits, len(requests) * stride, inflation)


def _half_tokens(requests: Floats, centre: float) -> float:
    """Tokens at which the variance of a level's noise, from both halves of a request, is the variance between
    requests."""
    levels, tokens, contrasts = requests[requests[:, 1] > 1.0].T
    if not len(levels):
        return 0.0
    halves = np.floor(tokens / 2.0)
    within = float(np.mean(contrasts**2 / (1.0 / halves + 1.0 / (tokens - halves))))
    # By the median absolute deviation: one odd request must not decide.
    total = float(np.median(np.abs(levels - centre)) / 0.6745) ** 2
    between = total - within * float(np.mean(1.0 / tokens))
    return min(within / between, MAX_HALF_TOKENS) if between > 0.0 else MAX_HALF_TOKENS


@functools.lru_cache(maxsize=1024)
def upper_limit(hits: int, trials: int, alpha: float) -> float:
    """Upper limit of a probability, at least 1 − alpha certain: the g with P(Binomial(trials, g) ≤ hits) = alpha.

    >>> round(upper_limit(0, 100, 0.05), 4), round(upper_limit(5, 100, 0.05), 4)
    (0.0295, 0.1023)
    """
    low, high = hits / trials, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _binomial_at_most(hits, trials, middle) > alpha else (low, middle)
    return high


def _binomial_at_most(hits: int, trials: int, probability: float) -> float:
    if probability >= 1.0:
        return 0.0 if hits < trials else 1.0
    counts = np.arange(hits + 1.0)
    ways = np.array([math.lgamma(trials + 1) - math.lgamma(n + 1) - math.lgamma(trials - n + 1) for n in counts])
    terms = ways + counts * math.log(probability) + (trials - counts) * math.log1p(-probability)
    return float(np.exp(terms).sum())
