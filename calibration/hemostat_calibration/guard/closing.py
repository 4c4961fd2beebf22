"""The closed test over the kinds of one candidate: which kinds' hypotheses are rejected, with one error for all of
them."""

from __future__ import annotations

import math
from collections.abc import Sequence


def adjusted(log_e: Sequence[float], weights: Sequence[float], j: int) -> float:
    """Returns the logarithm of the adjusted e-value of kind j: it is rejected at alpha where this reaches log(1/alpha).

    log_e, weights: of each kind; weights above 0, chosen before the first observation.

    Closed testing with e-values (Vovk & Wang, Annals of Statistics 2021): for each set S of kinds there is one e-value
    of the hypothesis that none of S gains,

        1/2 (weighted mean over S of e) + 1/2 (product over S of e)

    and kind j is rejected where it reaches 1/alpha for every S that contains j. Why one error holds for all kinds: let
    S be the kinds whose mean gain is at most 0. Rejecting one of them needs the e-value of S to reach 1/alpha. Both of
    its
    parts are supermartingales, whatever the dependence between kinds: a unit changes the value of one kind, and the
    expectation of that value given all units before, of all kinds, is not above it. So by Ville's inequality it ever
    reaches 1/alpha with a probability of at most alpha. A kind whose test has ended (promoted, or dropped) stays in
    with
    the value that it had: a stopped e-process is one.

    The mean is good where some kinds lose: they cost no more than their weight. The product is good where kinds gain,
    or
    are little known: they cost nothing. The smallest of each over all S is found by itself, so the result is at most
    the smallest of their sum.

    >>> [round(math.exp(adjusted([math.log(100), math.log(50), 0.0], [1, 1, 2], j))) for j in range(3)]
    [67, 34, 1]
    """
    own = log_e[j]
    # The product is the smallest with all kinds in it whose e-value is below 1.
    losses = math.exp(sum(min(value, 0.0) for value in log_e) - min(own, 0.0))
    return own + math.log(0.5 * least_mean(log_e, weights, j) + 0.5 * losses)


def least_mean(log_e: Sequence[float], weights: Sequence[float], j: int) -> float:
    """Returns the least weighted mean of the e-values over all sets that contain kind j, in units of kind j's e-value:
    0 to 1. It alone is an adjusted e-value, whatever the dependence between the kinds.

    >>> round(100 * least_mean([math.log(100), 0.0], [1, 1], 0), 1)
    50.5
    """
    own = log_e[j]
    lower = sorted((other, weight) for other, weight in zip(log_e, weights, strict=True) if other < own)
    total = mass = weights[j]
    # Those with less evidence come in ascending order, as long as they lower the mean.
    for other, weight in lower:
        ratio = math.exp(other - own)
        if ratio * mass >= total:
            break
        total += weight * ratio
        mass += weight
    return total / mass
