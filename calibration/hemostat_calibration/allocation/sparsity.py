"""How many weights each layer loses within one budget of the whole model."""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from typing import Literal

import numpy as np
import numpy.typing as npt

from hemostat_calibration.arrays import Floats
from hemostat_calibration.errors import InvalidArgumentError


def share_zeros(
    quantiles: Mapping[str, Floats], sizes: Mapping[str, int], sparsity: float, max_sparsity: float
) -> dict[str, int]:
    """The number of weights that each layer loses, together exactly `round(sparsity · Σ sizes)`, or, if `max_sparsity`
    does not allow as many, as many as it allows.

    quantiles: by layer the scores of its weights in ascending order; or fewer of them at equal steps, each of which
        stands for as many weights. Scores must mean the same in all layers, such as a rise of the loss.
    sizes: number of weights by layer. max_sparsity: at most this part of a layer's weights is lost.

    One threshold for all layers: of all choices with that many zeros, the sum of the scores that are lost is the least
    (exactly so with all scores given). What has the score of the threshold is lost in each layer in proportion to how
    much of it there is.

    InvalidArgumentError where sparsity is above `max_sparsity`, or quantiles are missing, unsorted or not finite.

    >>> share_zeros({"a": np.array([1.0, 2.0, 3.0]), "b": np.array([2.5, 4.0, 5.0])}, {"a": 3, "b": 3}, 0.5, 1.0)
    {'a': 2, 'b': 1}
    """
    if not 0.0 <= sparsity <= max_sparsity <= 1.0:
        raise InvalidArgumentError(f"sparsity is {sparsity}: it must be from 0 to max_sparsity, {max_sparsity}")
    for name, values in quantiles.items():
        if values.ndim != 1 or not len(values) or not np.isfinite(values).all() or (np.diff(values) < 0.0).any():
            raise InvalidArgumentError(f"quantiles of {name} must be finite numbers in ascending order")
        if sizes.get(name, 0) <= 0:
            raise InvalidArgumentError(f"sizes has no positive number for {name}")
    wanted = round(sparsity * sum(sizes[name] for name in quantiles))
    most = np.array([int(max_sparsity * sizes[name] + 1e-9) for name in quantiles], np.float64)
    wanted = min(wanted, int(most.sum()))
    if wanted == 0:
        return dict.fromkeys(quantiles, 0)

    def lost(threshold: float, side: Literal["left", "right"]) -> Floats:
        """By layer, with all scores below the threshold lost (`left`), or also those that are equal to it."""
        parts = [np.searchsorted(values, threshold, side) / len(values) for values in quantiles.values()]
        return np.minimum(np.array(parts) * [sizes[name] for name in quantiles], most)

    candidates = np.unique(np.concatenate(list(quantiles.values())))
    found = bisect.bisect_left(candidates, wanted, hi=len(candidates) - 1, key=lambda c: lost(c, "right").sum())
    least, largest = lost(candidates[found], "left"), lost(candidates[found], "right")
    part = (wanted - least.sum()) / max(float((largest - least).sum()), 1e-9)
    exact = least + np.clip(part, 0.0, 1.0) * (largest - least)
    return dict(zip(quantiles, _rounded(exact, most, wanted), strict=True))


def _rounded(exact: Floats, most: Floats, total: int) -> list[int]:
    """Integers near `exact`, at most `most`, whose sum is `total`: the largest remainders are rounded up."""
    found = np.floor(exact + 1e-6)
    order = np.argsort(found - exact, kind="stable")
    while (missing := int(total - found.sum())) > 0:
        room = [n for n in order if found[n] < most[n]]
        found[room[:missing]] += 1.0
    return [int(value) for value in found]


def share_units(
    scores: Mapping[str, Floats], weights: Mapping[str, npt.NDArray[np.integer]], sparsity: float, max_sparsity: float
) -> dict[str, npt.NDArray[np.bool_]]:
    """The units, such as neurons and heads, that each layer loses, so that the part `sparsity` of all weights is lost.

    scores: by layer the score of each unit, [units]; they must mean the same in all layers. weights: by layer the
        number of weights of each unit, [units], above 0. max_sparsity: at most this part of a layer's weights is lost.

    Units with the least score for each weight go first, until the part is reached: at most one unit too much; less
    than the part where `max_sparsity` leaves no room for another unit.

    InvalidArgumentError where sparsity is above `max_sparsity`, or scores are not finite.

    >>> share_units({"a": np.array([1.0, 6.0, 4.0])}, {"a": np.array([1, 1, 2])}, 0.7, 0.8)
    {'a': array([ True, False,  True])}
    """
    if not 0.0 <= sparsity <= max_sparsity <= 1.0:
        raise InvalidArgumentError(f"sparsity is {sparsity}: it must be from 0 to max_sparsity, {max_sparsity}")
    if not all(np.isfinite(values).all() for values in scores.values()):
        raise InvalidArgumentError("scores are not finite")
    lost = {name: np.zeros(len(values), np.bool_) for name, values in scores.items()}
    room = {name: max_sparsity * float(weights[name].sum()) for name in scores}
    left = sparsity * sum(float(weights[name].sum()) for name in scores)
    order = sorted(
        (float(score) / int(weights[name][n]), position, name, n)
        for position, (name, values) in enumerate(scores.items())
        for n, score in enumerate(values)
    )
    for _, _, name, n in order:
        if left <= 0.0:
            break
        size = int(weights[name][n])
        if size <= room[name]:
            lost[name][n] = True
            room[name] -= size
            left -= size
    return lost
