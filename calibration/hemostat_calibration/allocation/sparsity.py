"""The number of weights that each layer loses within one budget of the whole model."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from hemostat_calibration.arrays import Floats
from hemostat_calibration.errors import InvalidArgumentError

GROWTH = 7.5
"""A layer's loss is taken to grow as exp(GROWTH · sparsity)."""
LEAST_LOST = 0.4
"""The least part that a layer loses of what it would lose if all layers had the same sparsity."""
LEAST_KEPT = 0.5
"""The least part that a layer keeps of what it would keep if all layers had the same sparsity."""
_BISECTIONS = 60


def share_zeros(losses: Mapping[str, float], sizes: Mapping[str, int], sparsity: float) -> dict[str, int]:
    """Returns the number of weights that each layer loses, together exactly `round(sparsity · Σ sizes)`.

    losses: by layer, what it is predicted to lose at one sparsity, which is the same for all layers; at least 0. sizes:
    by layer, its number of weights.

    With a loss of a layer of n weights that grows with its sparsity s as L · exp(GROWTH · s), the sum of all losses is
    the least where another weight costs the same everywhere: s = (log(n / L) + c) / GROWTH, with one c for all layers;
    here between the bounds that `LEAST_LOST` and `LEAST_KEPT` set. Raises InvalidArgumentError if sparsity is not
    between 0 and 1, losses are not finite, or sizes are missing.

    >>> share_zeros({"a": 1.0, "b": 2.0}, {"a": 1000, "b": 1000}, 0.5)
    {'a': 546, 'b': 454}
    """
    if not 0.0 < sparsity < 1.0:
        raise InvalidArgumentError(f"sparsity is {sparsity}: it must be above 0 and below 1")
    predicted = np.array(list(losses.values()), np.float64)
    if not (np.isfinite(predicted).all() and (predicted >= 0.0).all()):
        raise InvalidArgumentError("losses must be finite numbers of at least 0")
    if any(sizes.get(name, 0) <= 0 for name in losses):
        raise InvalidArgumentError("sizes has no positive number for some layer of losses")
    weights = np.array([sizes[name] for name in losses], np.float64)
    least, most = LEAST_LOST * sparsity, 1.0 - LEAST_KEPT * (1.0 - sparsity)
    # Up to the constant c: where the loss is 0, as much as is allowed.
    wanted = (np.log(weights) - np.log(np.maximum(predicted, np.finfo(np.float64).tiny))) / GROWTH

    def shared(offset: float) -> Floats:
        shares: Floats = np.clip(wanted + offset, least, most) * weights
        return shares

    total = round(sparsity * float(weights.sum()))
    low, high = least - wanted.max(initial=0.0), most - wanted.min(initial=0.0)
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if shared(middle).sum() < total else (low, middle)
    return dict(zip(losses, _rounded(shared(high), weights, total), strict=True))


def _rounded(exact: Floats, most: Floats, total: int) -> list[int]:
    """Returns integers near `exact`, at most `most`, whose sum is `total`: the largest remainders are rounded up."""
    rounded = np.floor(exact + 1e-6)
    order = np.argsort(rounded - exact, kind="stable")
    while (missing := int(total - rounded.sum())) > 0:
        room = [n for n in order if rounded[n] < most[n]]
        rounded[room[:missing]] += 1.0
    return [int(value) for value in rounded]


def share_units(
    scores: npt.NDArray[np.floating], weights: npt.NDArray[np.integer], sparsity: float
) -> npt.NDArray[np.bool_]:
    """Returns the units of a layer, such as neurons and heads, that are lost, so that the part `sparsity` of all
    weights is.

    scores: of each unit, [units]. weights: the number of weights of each unit, [units], above 0.

    Units with the least score for each weight go first, until the part is reached: at most one unit too much. Raises
    InvalidArgumentError if sparsity is not from 0 to 1, or scores are not finite.

    >>> share_units(np.array([1.0, 6.0, 4.0]), np.array([1, 1, 2]), 0.7)
    array([ True, False,  True])
    """
    if not 0.0 <= sparsity <= 1.0:
        raise InvalidArgumentError(f"sparsity is {sparsity}: it must be from 0 to 1")
    if not np.isfinite(scores).all():
        raise InvalidArgumentError("scores are not finite")
    order = np.argsort(scores / weights, kind="stable")
    before = np.concatenate([[0], np.cumsum(weights[order])[:-1]])
    lost = np.zeros(len(scores), np.bool_)
    lost[order] = before < sparsity * float(weights.sum())
    return lost
