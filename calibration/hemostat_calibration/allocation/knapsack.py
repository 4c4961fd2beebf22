"""One option for each unit, with the least sum of losses within a budget of bytes: a multiple-choice knapsack.

The continuous relaxation, in which a unit may be between two options, is solved by steps along the lower convex hull of
each unit's options, taken in the order of the loss that they take away per byte (Sinha & Zoltners 1979, "The
multiple-choice knapsack problem"; the same points as the Lagrangian λ · bytes + loss has for all λ). It is the
lower bound of every choice. Steps that fit are taken. After the first step that does not fit, later ones fill the rest,
at last with options that are not on the hull. So the sum is above the least one by at most the loss that one step takes
away, which is little where there are many units.

`share_ranks` divides bytes between the ranks of an adapter's layers in this way.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hemostat_calibration.arrays import Floats
from hemostat_calibration.errors import InvalidArgumentError

Sizes = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Options:
    """The options of one unit. Raises InvalidArgumentError if they are not as stated.

    sizes: bytes, int64 [n], not negative. losses: float64 [n], finite, in one unit of measurement for all units.
    """

    sizes: Sizes
    losses: Floats

    def __post_init__(self) -> None:
        if self.sizes.ndim != 1 or self.sizes.shape != self.losses.shape or not self.sizes.size:
            raise InvalidArgumentError(
                f"options of shapes {self.sizes.shape} and {self.losses.shape}: one size and one loss for each"
            )
        if (self.sizes < 0).any() or not np.isfinite(self.losses).all():
            raise InvalidArgumentError("options must have sizes of 0 or more and finite losses")


@dataclass(frozen=True, slots=True)
class Allocation:
    """The chosen options.

    chosen: the index of each unit's option. size: the bytes of all. loss: the sum of their losses. lower_bound: no
    choice within the budget has a smaller sum of losses.
    """

    chosen: dict[str, int]
    size: int
    loss: float
    lower_bound: float


def allocate(options: Mapping[str, Options], budget: int) -> Allocation:
    """Returns the option of each unit; the choice is deterministic. Raises InvalidArgumentError if even the smallest
    options exceed `budget`.

    >>> bits = np.array([2, 4, 8])
    >>> q, v = Options(bits, np.array([9.0, 1.0, 0.0])), Options(bits, np.array([3.0, 2.0, 0.0]))
    >>> result = allocate({"q": q, "v": v}, 8)
    >>> result.chosen, result.size, result.loss
    ({'q': 1, 'v': 1}, 8, 3.0)
    """
    hulls = {name: _hull(option) for name, option in options.items()}
    chosen = {name: hull[0] for name, hull in hulls.items()}
    left = budget - sum(int(options[name].sizes[n]) for name, n in chosen.items())
    if left < 0:
        raise InvalidArgumentError(f"the budget is {budget} bytes: the smallest options need {budget - left}")
    loss = sum(float(options[name].losses[n]) for name, n in chosen.items())
    waiting: list[tuple[float, int, str]] = []
    order = {name: n for n, name in enumerate(options)}
    at = dict.fromkeys(options, 0)

    def offer(name: str) -> None:
        hull, option = hulls[name], options[name]
        if at[name] + 1 < len(hull):
            before, after = hull[at[name]], hull[at[name] + 1]
            gain = float(option.losses[before] - option.losses[after])
            heapq.heappush(waiting, (-gain / int(option.sizes[after] - option.sizes[before]), order[name], name))

    for name in options:
        offer(name)
    bound: float | None = None
    while waiting:
        slope, _, name = heapq.heappop(waiting)
        option, before, after = options[name], hulls[name][at[name]], hulls[name][at[name] + 1]
        size = int(option.sizes[after] - option.sizes[before])
        if size > left:  # the unit stays where it is
            bound = loss + slope * left if bound is None else bound
            continue
        left -= size
        loss += float(option.losses[after] - option.losses[before])
        at[name] += 1
        chosen[name] = after
        offer(name)
    left = _fill(options, chosen, left)
    total = float(sum(options[name].losses[n] for name, n in chosen.items()))
    return Allocation(chosen, budget - left, total, total if bound is None else min(bound, total))


def _hull(options: Options) -> list[int]:
    """Returns the lower convex hull from the smallest option to the one with the least loss; points on its edges
    included."""
    hull: list[int] = []
    sizes, losses = options.sizes.tolist(), options.losses.tolist()
    for n in sorted(range(len(sizes)), key=lambda n: (sizes[n], losses[n], n)):
        if hull and losses[n] >= losses[hull[-1]]:
            continue
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            # b is above the line from a to n.
            if (losses[a] - losses[b]) * (sizes[n] - sizes[a]) < (losses[a] - losses[n]) * (sizes[b] - sizes[a]):
                hull.pop()
            else:
                break
        hull.append(n)
    return hull


def _fill(options: Mapping[str, Options], chosen: dict[str, int], left: int) -> int:
    """Changes single units while the rest of the budget allows, the largest gain first. Returns what is left."""
    while True:
        best, gain = None, 0.0
        for name, now in chosen.items():
            option = options[name]
            gains = np.where(option.sizes - option.sizes[now] <= left, option.losses[now] - option.losses, 0.0)
            other = int(gains.argmax())
            if gains[other] > gain:
                best, gain = (name, other), float(gains[other])
        if best is None:
            return left
        name, other = best
        left -= int(options[name].sizes[other] - options[name].sizes[chosen[name]])
        chosen[name] = other


def share_ranks(
    errors: Mapping[str, npt.NDArray[np.floating[Any]]],
    bytes_per_rank: Mapping[str, int],
    budget_bytes: int,
    max_rank: int,
) -> dict[str, int]:
    """Returns the rank of each layer, 0 to `max_rank`, that together need at most `budget_bytes`.

    errors: by layer the error that is left by rank, [R + 1], from `adapters.correction.low_rank` with the metric of
        the outputs: only then can they be compared between layers. (With the squared error of the outputs alone the
        result is worse than the same rank everywhere.) Ranks above R are not given.
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
