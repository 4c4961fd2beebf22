"""The first setting at which a figure is above its noise floor."""

from __future__ import annotations

import numpy as np

from hemostat_calibration.thresholds.curve import ALPHA, Curve


def leaves_floor(excess: Curve) -> int | None:
    """Returns the index of the least setting whose mean excess over the noise floor is established; None: not even the
    last one's.

    Settings are tested from the most compressed one on, each at 2.5 % (one-sided), up to the first that is not
    established: with a fixed order no correction is needed for the probability that any setting at the floor is named
    (Maurer, Hothorn, Lehmacher 1995). It is the least setting where noise can be excluded, not the least with a loss.

    >>> sums = np.array([[-0.1, 0.2, 0.0], [1.0, 1.2, 1.4], [5.0, 6.0, 7.0]])
    >>> leaves_floor(Curve(np.array([1.0, 2.0, 3.0]), sums, np.ones(3)))
    1
    """
    first = None
    for k in range(len(excess.settings) - 1, -1, -1):
        weights = np.zeros(len(excess.settings))
        weights[k] = 1.0
        _, low, _ = excess.contrast(weights, ALPHA)
        if low <= 0.0:
            break
        first = k
    return first
