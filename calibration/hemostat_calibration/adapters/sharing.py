"""Ranks of the layers within a budget of bytes, by the error that each rank takes away."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from hemostat_calibration.errors import InvalidArgumentError


def share_ranks(
    errors: Mapping[str, npt.NDArray[np.floating[Any]]],
    bytes_per_rank: Mapping[str, int],
    budget_bytes: int,
    max_rank: int,
) -> dict[str, int]:
    """The rank of each layer, 0 to `max_rank`, that together need at most `budget_bytes`.

    errors: by layer the error that is left by rank, [R + 1], from `correction.low_rank` with the metric of the outputs:
        only then can they be compared between layers. (With the squared error of the outputs alone the result is worse
        than the same rank everywhere.) Ranks above R are not given.
    bytes_per_rank: of one component of the layer, above 0.

    The component that takes away most per byte comes first. The k-th component of a layer takes away its k-th squared
    singular value, and those are sorted: errors is convex in the rank, and a component never comes before another one
    of its layer. So the components that are taken before the first that does not fit are, of all sets of components,
    those with the least error for the bytes that they need: any other set exchanges some of them for others, all of
    which take away no more per byte (a knapsack's greedy solution, Dantzig 1957). After it, smaller components fill
    the rest, which is less than one component. With equal bytes the result is the optimum.

    InvalidArgumentError on missing or non-positive bytes, or errors that are not finite or increase.

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
    ranks = dict.fromkeys(errors, 0)
    left_bytes = budget_bytes
    waiting: list[tuple[float, str]] = []

    def offer(name: str) -> None:
        rank = ranks[name]
        if rank < min(max_rank, len(errors[name]) - 1) and errors[name][rank] > errors[name][rank + 1]:
            heapq.heappush(waiting, (float(errors[name][rank + 1] - errors[name][rank]) / bytes_per_rank[name], name))

    for name in errors:
        offer(name)
    while waiting:
        _, name = heapq.heappop(waiting)
        if bytes_per_rank[name] <= left_bytes:  # else the layer has the rank that it keeps
            left_bytes -= bytes_per_rank[name]
            ranks[name] += 1
            offer(name)
    return ranks
