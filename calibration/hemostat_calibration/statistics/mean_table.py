"""Means of many figures of the same requests, updated together.

Row by row they are what `confidence.MeanSequence` and `running_mean.RunningMean` are, to the last bit: an update has a
fixed cost of some array operations, which all figures of a request share.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hemostat_calibration.arrays import Floats
from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.statistics.confidence import MeanSequence
from hemostat_calibration.statistics.running_mean import RunningMean
from hemostat_calibration.statistics.streaming import RatioEstimate

_REQUESTS, _XX, _NN, _CUBES = 0, 3, 5, 6
_MEANS = slice(1, 3)
"""The rows of `MeanTable.sums`."""


@dataclass(frozen=True, slots=True, eq=False)
class MeanTable:
    """The means per token, Σx/Σn over requests, of S figures.

    sums: float64 [10, S]: the number of requests, the means of x and of n, the second moments about them (xx, xn, nn),
    and Σ of x³, x²n, xn², n³.

    >>> table = MeanTable.of(2)
    >>> for n in range(100):
    ...     table = table.update(np.array([2.0 + n % 3, 0.0]), np.array([1.0, 0.0]))
    >>> round(table.row(0).get().mean, 6), table.row(1).moments.requests
    (2.99, 0)
    """

    sums: Floats

    @classmethod
    def of(cls, figures: int) -> MeanTable:
        """Returns the state before the first request."""
        return cls(np.zeros((10, figures)))

    def update(self, x: Floats, n: Floats) -> MeanTable:
        """Returns the state with one more request: x, n float64 [S], the sum of each figure and its number of tokens.
        Figures with n = 0 stay as they are. Raises InvalidArgumentError for another shape, or unless all x and n are
        finite and n is not negative."""
        if x.shape != self.sums.shape[1:] or n.shape != x.shape:
            raise InvalidArgumentError(f"x and n have shapes {x.shape} and {n.shape}: they must be one for each figure")
        old = self.sums
        given = np.empty((2, len(x)))
        given[0], given[1] = x, n
        if not (np.isfinite(given).all() and (n >= 0.0).all()):
            raise InvalidArgumentError("a request adds sums that are not finite, or a negative number of tokens")
        added = (n > 0.0).astype(np.float64)
        given[0] *= added
        # What is added to each sum, with as few operations as there can be: they are short.
        more = np.empty_like(old)
        more[_REQUESTS] = added
        share = added / np.maximum(old[_REQUESTS] + added, 1.0)
        difference = given - old[_MEANS]
        np.multiply(difference, share, out=more[_MEANS])
        np.multiply(difference[0], difference, out=more[_XX:_NN])
        np.multiply(difference[1], difference[1], out=more[_NN])
        more[_XX:_CUBES] *= old[_REQUESTS] * share
        np.multiply(given[0], given[0], out=more[_CUBES : _CUBES + 2])
        np.multiply(given[1], given, out=more[_CUBES + 2 :])
        more[_CUBES] *= given[0]
        more[_CUBES + 1 :] *= given[1]
        return MeanTable(old + more)

    def row(self, figure: int) -> MeanSequence:
        """Returns one figure's mean, with its intervals."""
        requests, mean_x, mean_n, xx, xn, nn, *cubes = self.sums[:, figure].tolist()
        moments = RatioEstimate(int(requests), mean_x, mean_n, xx, xn, nn)
        return MeanSequence(moments, (cubes[0], cubes[1], cubes[2], cubes[3]))


@dataclass(frozen=True, slots=True, eq=False)
class RunningMeanTable:
    """The running means of S figures between lo and hi, float64 [S] each, lo < hi and both finite
    (InvalidArgumentError).

    sums: float64 [3, S]: the fields `observations`, `total` and `squares` of `RunningMean`.

    >>> table = RunningMeanTable.of(np.array([0.0, -1.0]), np.array([1.0, 1.0]))
    >>> table = table.update(np.array([0.5, np.nan])).update(np.array([0.25, -0.5]))
    >>> table.row(0).mean, table.row(1).mean
    (0.375, -0.5)
    """

    lo: Floats
    hi: Floats
    sums: Floats

    @classmethod
    def of(cls, lo: Floats, hi: Floats) -> RunningMeanTable:
        """Returns the state before the first observation."""
        if not (np.isfinite(lo).all() and np.isfinite(hi).all() and (lo < hi).all()):
            raise InvalidArgumentError("a range must be finite and increase")
        return cls(lo, hi, np.zeros((3, len(lo))))

    def update(self, x: Floats) -> RunningMeanTable:
        """Returns the state with one more observation of each figure, float64 [S]; a figure with NaN stays as it is.
        Raises InvalidArgumentError if one is outside lo … hi (by more than rounding)."""
        lo, hi = self.lo, self.hi
        kept = np.minimum(np.maximum(x, lo), hi)
        # NaN is not above any limit.
        if (np.abs(x - kept) > 1e-9 * np.maximum(np.maximum(np.abs(lo), np.abs(hi)), 1.0)).any():
            raise InvalidArgumentError("an observation is outside of its range")
        observations, total, _ = self.sums
        first = np.minimum(np.maximum(0.0, lo), hi)
        centre = np.where(observations > 0.0, total / np.maximum(observations, 1.0), first)
        added = np.empty_like(self.sums)
        added[0], added[1] = 1.0, kept
        added[2] = ((kept - centre) / (hi - lo)) ** 2
        return RunningMeanTable(lo, hi, self.sums + np.where(np.isnan(x), 0.0, added))

    def row(self, figure: int) -> RunningMean:
        """Returns one figure's mean, with its interval."""
        observations, total, squares = self.sums[:, figure].tolist()
        return RunningMean(float(self.lo[figure]), float(self.hi[figure]), int(observations), total, squares)
