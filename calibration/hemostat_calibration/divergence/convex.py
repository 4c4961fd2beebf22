"""Lower bounds of convex functions on an interval, by cutting planes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hemostat_calibration.arrays import Floats

_CUTS = 4
"""The number of cutting planes after the first two: what is left open is then far below the bound itself."""


def convex_lower_bound(function: Callable[[Floats], tuple[Floats, Floats]], left: Floats, right: Floats) -> Floats:
    """Returns a lower bound of a convex function over left ≤ w ≤ right, elementwise, all [T].

    function: w [T] -> (value [T], derivative [T]). Kelley's cutting-plane method: the maximum of the tangents at some
    points lies below the function. The bound is at least 0, which suits divergences.
    Source: J. E. Kelley, "The cutting-plane method for solving convex programs", J. SIAM 8 (1960).

    >>> import numpy as np
    >>> low = convex_lower_bound(lambda w: ((w - 2.0) ** 2 + 1.0, 2.0 * (w - 2.0)), np.array([0.0]), np.array([3.0]))
    >>> bool(0.99 < low[0] <= 1.0)
    True
    """
    (left_value, left_slope), (right_value, right_slope) = function(left), function(right)
    for _ in range(_CUTS):
        middle = left + _crossing(left_value, right_value, left_slope, right_slope, right - left)[0]
        value, slope = function(middle)
        rising = slope > 0.0
        left, right = np.where(rising, left, middle), np.where(rising, middle, right)
        left_value, right_value = np.where(rising, left_value, value), np.where(rising, value, right_value)
        left_slope, right_slope = np.where(rising, left_slope, slope), np.where(rising, slope, right_slope)
    return np.maximum(_crossing(left_value, right_value, left_slope, right_slope, right - left)[1], 0.0)


def _crossing(
    left: Floats, right: Floats, left_slope: Floats, right_slope: Floats, width: Floats
) -> tuple[Floats, Floats]:
    """Returns where, from the left end, the larger of two tangents is least over an interval, and that least value."""
    bend = right_slope - left_slope
    offset = (left - right + right_slope * width) / np.where(bend > 0.0, bend, 1.0)
    offset = np.where(left_slope >= 0.0, 0.0, np.where(right_slope <= 0.0, width, np.clip(offset, 0.0, width)))
    inner = left + left_slope * offset
    return offset, np.where((left_slope < 0.0) & (right_slope <= 0.0), right, inner)
