"""The closed test over the kinds of one candidate: which kinds' hypotheses are rejected, with one error for all of
them."""

from __future__ import annotations

import math
from collections.abc import Sequence


def adjusted(log_e: Sequence[float], weights: Sequence[float], j: int) -> float:
    """Logarithm of the smallest weighted mean of e-values over all sets of kinds that contain kind j.

    log_e, weights: of each kind; weights above 0, chosen before the first observation.

    Closed testing with weighted arithmetic means (Vovk & Wang, Annals of Statistics 2021): kind j is rejected at alpha
    where its adjusted e-value reaches 1/alpha. Why one error holds for all kinds: let S be the kinds whose mean gain
    is at most 0. To reject one of them, the weighted mean over S has to reach 1/alpha. That mean is an e-process
    whatever the dependence between kinds, since a unit changes the value of one kind, and the expectation of that
    value given the past does not grow; so by Ville's inequality it ever does so with a probability of at most alpha. A
    kind whose test has ended (promoted, or dropped) stays in with the value that it had: a stopped e-process is one.

    Kinds that all gain pay little for their number: a kind is only ever averaged with those of less evidence.

    >>> [round(math.exp(adjusted([math.log(100), math.log(50), 0.0], [1, 1, 2], j))) for j in range(3)]
    [34, 17, 1]
    """
    own = log_e[j]
    lower = sorted((other, weight) for other, weight in zip(log_e, weights, strict=True) if other < own)
    total = mass = weights[j]
    # In units of kind j's e-value. Those with less evidence come in ascending order, as long as they lower the mean.
    for other, weight in lower:
        ratio = math.exp(other - own)
        if ratio * mass >= total:
            break
        total += weight * ratio
        mass += weight
    return own + math.log(total / mass)
