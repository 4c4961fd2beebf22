"""Ranks of the layers within a budget of bytes, by the error that each rank takes away."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from hemostat_calibration.allocation.knapsack import Options, allocate
from hemostat_calibration.errors import InvalidArgumentError


def share_ranks(
    errors: Mapping[str, npt.NDArray[np.floating[Any]]],
    bytes_per_rank: Mapping[str, int],
    budget_bytes: int,
    max_rank: int,
) -> dict[str, int]:
    """Returns the rank of each layer, 0 to `max_rank`, that together need at most `budget_bytes`.

    errors: by layer the error that is left by rank, [R + 1], from `correction.low_rank` with the metric of the outputs:
        only then can they be compared between layers. (With the squared error of the outputs alone the result is worse
        than the same rank everywhere.) Ranks above R are not given.
    bytes_per_rank: of one component of the layer, above 0.

    The component that takes away most per byte comes first (`allocate`). The k-th component of a layer takes away its
    k-th squared singular value, and those are sorted, so that errors is convex in the rank. With equal bytes the
    result is the optimum. Raises InvalidArgumentError on missing or non-positive bytes, or errors that are not finite
    or increase.

    >>> share_ranks({"q": np.array([9.0, 1.0, 0.0]), "v": np.array([5.0, 3.0, 2.0])}, {"q": 2, "v": 1}, 3, max_rank=2)
    {'q': 1, 'v': 1}
    """
    if max_rank < 0:
        raise InvalidArgumentError(f"max_rank is {max_rank}: it must be 0 or more")
    for name, left in errors.items():
        if left.ndim != 1 or not left.size or not np.isfinite(left).all() or (np.diff(left) > 0.0).any():
            raise InvalidArgumentError(f"errors of {name} must be finite and never increase")
        if bytes_per_rank.get(name, 0) <= 0:
            raise InvalidArgumentError(f"bytes_per_rank of {name} is missing or not above 0")
    options = {}
    for name, left in errors.items():
        ranks = np.arange(min(max_rank, len(left) - 1) + 1)
        options[name] = Options(ranks * bytes_per_rank[name], left[: len(ranks)].astype(np.float64))
    return allocate(options, budget_bytes).chosen
