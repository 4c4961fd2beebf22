"""Where the next figure falls among those before it, predicted from which of these are an engine's own.

The figures of a stratum, sorted, have n + 1 gaps. A strategy supposes a threshold in one of them: the engine's figures
lie below it, others' above it (or the other way round), each with a probability of `noise` that it is not so; on either
side all gaps are equally likely. The threshold is in gap t with a probability proportional to the likelihood of the
labels of all n figures, given that t of them lie below it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hemostat_calibration.arrays import Floats

NOISES = (0.02, 0.15, 0.35)
"""Probabilities of being on the wrong side of the threshold; a strategy for each and for either direction."""
FARTHER = np.tile([False, True], len(NOISES))
"""Strategies that suppose that the engine's figures are higher."""
LOG_WEIGHTS = np.log(np.repeat([0.4, 0.07, 0.03], 2))
"""ln of the parts of what is funded."""
_BELOW = np.where(FARTHER, np.repeat(NOISES, 2), 1.0 - np.repeat(NOISES, 2))
"""[S], probabilities that a figure of the engine lies below the threshold; of another's lies above it."""


def placements(labels: npt.NDArray[np.bool_], place: int) -> tuple[Floats, Floats]:
    """Each strategy's probability that the next figure falls into gap `place`, if it is the engine's own and if it is
    another's: float64 [..., S] each. Each sums to 1 over the gaps.

    labels: bool [..., n], whether the figures are the engine's own, from the lowest. place: 0 to n.

    >>> lower = [placements(np.array([True, False, False, False]), place) for place in range(5)]
    >>> [round(float(own[0]), 2) for own, _ in lower], [round(float(other[0]), 2) for _, other in lower]
    ([0.49, 0.49, 0.02, 0.01, 0.01], [0.01, 0.25, 0.25, 0.25, 0.25])
    """
    gaps = labels.shape[-1] + 1
    below = np.arange(gaps)
    above = gaps - 1 - below
    own_below = np.zeros((*labels.shape[:-1], gaps))
    np.cumsum(labels, axis=-1, out=own_below[..., 1:])
    # Labels that agree with the threshold are own ones below and others' above: a constant more than this.
    agree = (2.0 * own_below - below)[..., None, :]
    share = (below + 0.5) / gaps
    log_weights = agree * (np.log(_BELOW) - np.log1p(-_BELOW))[:, None]
    log_weights -= below * np.log(share) + above * np.log1p(-share)
    weights = np.exp(log_weights - log_weights.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    lies_below = weights[..., place:] @ (1.0 / (below[place:] + 1.0))
    lies_above = weights[..., : place + 1] @ (1.0 / (above[: place + 1] + 1.0))
    return _BELOW * lies_below + (1.0 - _BELOW) * lies_above, (1.0 - _BELOW) * lies_below + _BELOW * lies_above
