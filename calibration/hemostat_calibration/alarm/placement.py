"""Where the next figure falls among those before it, predicted from which of these are an engine's own.

The figures of a stratum, sorted, have n + 1 gaps. A strategy supposes a threshold in one of them: the engine's figures
lie below it, others' above it (or the other way round), each with a probability of `noise` that it is not so; on either
side all gaps are equally likely. The threshold is in gap t with a probability proportional to the likelihood of the
labels of all n figures, given that t of them lie below it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hemostat_calibration.arrays import Floats, frozen

NOISES = (0.02, 0.15, 0.35)
"""The probabilities of being on the wrong side of the threshold; a strategy for each and for either direction."""
FARTHER = np.tile([False, True], len(NOISES))
"""The strategies that suppose that the engine's figures are higher."""
LOG_WEIGHTS = np.log(np.repeat([0.4, 0.07, 0.03], 2))
"""The natural logarithms of the parts of what is funded, by strategy."""
_BELOW = np.where(FARTHER, np.repeat(NOISES, 2), 1.0 - np.repeat(NOISES, 2))
"""The probabilities, [S], that a figure of the engine lies below the threshold, and another's above it."""
_LOG_ODDS = np.log(_BELOW) - np.log1p(-_BELOW)


def placements(labels: npt.NDArray[np.bool_], place: int) -> tuple[Floats, Floats]:
    """Returns each strategy's probability that the next figure falls into gap `place`, if it is the engine's own and if
    it is another's: float64 [..., S] each. Each sums to 1 over the gaps.

    labels: bool [..., n], whether the figures are the engine's own, from the lowest. place: 0 to n.

    >>> lower = [placements(np.array([True, False, False, False]), place) for place in range(5)]
    >>> [round(float(own[0]), 2) for own, _ in lower], [round(float(other[0]), 2) for _, other in lower]
    ([0.49, 0.49, 0.02, 0.01, 0.01], [0.01, 0.25, 0.25, 0.25, 0.25])
    """
    by_threshold = _by_threshold(labels.shape[-1])
    own_below = np.zeros((*labels.shape[:-1], labels.shape[-1] + 1))
    np.cumsum(labels, axis=-1, out=own_below[..., 1:])
    # Labels that agree with the threshold are own ones below and others' above: a constant more than this.
    agree = (2.0 * own_below - by_threshold.below)[..., None, :]
    # Of 128 figures no exponent is above 600, so that nothing overflows.
    weights = np.exp(agree * _LOG_ODDS[:, None] - by_threshold.log_likelihood)
    sums = np.zeros((labels.shape[-1] + 1, 3))
    sums[:, 0] = 1.0
    sums[place:, 1] = by_threshold.each_below[place:]
    sums[: place + 1, 2] = by_threshold.each_above[: place + 1]
    total, lies_below, lies_above = np.moveaxis(weights @ sums, -1, 0)
    lies_below, lies_above = lies_below / total, lies_above / total
    return _BELOW * lies_below + (1.0 - _BELOW) * lies_above, (1.0 - _BELOW) * lies_below + _BELOW * lies_above


class _ByThreshold(NamedTuple):
    """float64 [n + 1] each, by the threshold's gap: figures below it; ln of the likelihood of so many of n, where this
    is the share that is expected; and the probability of each gap on either side."""

    below: Floats
    log_likelihood: Floats
    each_below: Floats
    each_above: Floats


@lru_cache(maxsize=256)
def _by_threshold(figures: int) -> _ByThreshold:
    below = np.arange(figures + 1.0)
    above, share = figures - below, (below + 0.5) / (figures + 1.0)
    likelihood = below * np.log(share) + above * np.log1p(-share)
    return _ByThreshold(*map(frozen, (below, likelihood, 1.0 / (below + 1.0), 1.0 / (above + 1.0))))
