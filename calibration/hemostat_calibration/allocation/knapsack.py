"""One option for each unit, with the least sum of losses within a budget of bytes: a multiple-choice knapsack.

The continuous relaxation, in which a unit may be between two options, is solved by steps along the lower convex hull of
each unit's options, taken in the order of the loss that they take away per byte (Sinha & Zoltners 1979, "The
multiple-choice knapsack problem"; the same points as the Lagrangian λ · bytes + loss has for all λ). It is the
lower bound of every choice. Steps that fit are taken. After the first step that does not fit, later ones fill the rest,
at last with options that are not on the hull. So the sum is above the least one by at most the loss that one step takes
away, which is little where there are many units.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

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
