"""Second moments of a layer's inputs, or of the gradients at its outputs: streaming.

S = E[x xᵀ] is what the error of a layer depends on: E‖ΔW x‖² = tr(ΔW S ΔWᵀ). The full matrix needs 8 d² bytes, its
diagonal 8 d. `metric_for_budget` chooses between them.

The products of float32 rows are computed in float32, and added up in float64. The rounding error of entry (i, j) is at
most about n 6e-8 √(S_ii S_jj) for n rows in one product, relative to the scales of i and j: it is not larger where some
inputs are 1,000 times larger than others. It is far below the sampling error, which is about √(S_ii S_jj / n). float64
rows are multiplied in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from hemostat_calibration.arrays import Floats, frozen
from hemostat_calibration.errors import InvalidArgumentError

_ROWS = 1024
"""The number of rows in one product."""
_BYTES = 8


class Metric(StrEnum):
    """The form in which a layer's second moments are kept."""

    FULL = "full"
    DIAGONAL = "diagonal"


@dataclass(frozen=True, slots=True, eq=False)
class FullGram:
    """All second moments of vectors of d entries. Its fields are its whole state.

    count: number of vectors. total: Σ x xᵀ, float64 [d, d]. Raises InvalidArgumentError on another shape, type, or
    values that are not finite.

    >>> gram = FullGram.init(2).update(np.array([[1.0, 2.0], [3.0, 0.0]]))
    >>> gram.count, gram.mean().tolist()
    (2, [[5.0, 1.0], [1.0, 2.0]])
    """

    count: int
    total: Floats = field(repr=False)

    def __post_init__(self) -> None:
        _check(self.count, self.total, 2)

    @classmethod
    def init(cls, width: int) -> FullGram:
        """Returns the moments of no vectors, of `width` entries."""
        return cls(0, np.zeros((width, width)))

    @property
    def width(self) -> int:
        return len(self.total)

    def update(self, rows: npt.NDArray[np.floating[Any]]) -> FullGram:
        """Returns the second moments with the vectors `rows` [n, d], float32 or float64."""
        total = self.total.copy()
        for part in _parts(rows, self.width):
            total += part.T @ part
        return FullGram(self.count + len(rows), frozen(total))

    def mean(self) -> Floats:
        """Returns E[x xᵀ], float64 [d, d]; 0 without vectors."""
        return self.total / max(self.count, 1)

    def diagonal(self) -> DiagonalGram:
        """Returns the squares alone."""
        return DiagonalGram(self.count, frozen(self.total.diagonal().copy()))


@dataclass(frozen=True, slots=True, eq=False)
class DiagonalGram:
    """The same without the products of different entries, which count as 0. total: Σ x², float64 [d].

    >>> DiagonalGram.init(2).update(np.array([[1.0, 2.0], [3.0, 0.0]])).mean().tolist()
    [5.0, 2.0]
    """

    count: int
    total: Floats = field(repr=False)

    def __post_init__(self) -> None:
        _check(self.count, self.total, 1)

    @classmethod
    def init(cls, width: int) -> DiagonalGram:
        """Returns the moments of no vectors, of `width` entries."""
        return cls(0, np.zeros(width))

    @property
    def width(self) -> int:
        return len(self.total)

    def update(self, rows: npt.NDArray[np.floating[Any]]) -> DiagonalGram:
        """Returns the second moments with the vectors `rows` [n, d], float32 or float64."""
        total = self.total.copy()
        for part in _parts(rows, self.width):
            total += np.square(part, dtype=np.float64).sum(axis=0)
        return DiagonalGram(self.count + len(rows), frozen(total))

    def mean(self) -> Floats:
        """Returns E[x²], float64 [d]; 0 without vectors."""
        return self.total / max(self.count, 1)

    def diagonal(self) -> Self:
        """Returns itself."""
        return self


Gram = FullGram | DiagonalGram


def gram_bytes(metric: Metric, width: int) -> int:
    """Returns the memory of statistics of that kind.

    >>> gram_bytes(Metric.FULL, 4096)
    134217728
    """
    return _BYTES * width * (width if metric is Metric.FULL else 1)


def metric_for_budget(widths: Mapping[str, int], budget_bytes: int) -> dict[str, Metric]:
    """Returns the form in which the second moments of each of the vectors that are measured at the same time are kept,
    within a budget of memory.

    widths: number of entries by name. Full statistics are given to the narrowest first: so most of the vectors get
    them. The diagonals are kept in any case, even where they alone exceed the budget.

    >>> metric_for_budget({"attention": 4096, "mlp": 11008}, 512 << 20)
    {'attention': <Metric.FULL: 'full'>, 'mlp': <Metric.DIAGONAL: 'diagonal'>}
    """
    left = budget_bytes - sum(gram_bytes(Metric.DIAGONAL, width) for width in widths.values())
    result = dict.fromkeys(widths, Metric.DIAGONAL)
    for name, width in sorted(widths.items(), key=lambda item: (item[1], item[0])):
        left -= gram_bytes(Metric.FULL, width) - gram_bytes(Metric.DIAGONAL, width)
        if left < 0:
            break
        result[name] = Metric.FULL
    return result


def _parts(rows: npt.NDArray[np.floating[Any]], width: int) -> list[npt.NDArray[np.floating[Any]]]:
    if rows.ndim != 2 or rows.shape[1] != width:
        raise InvalidArgumentError(f"rows has shape {rows.shape}: it must be [n, {width}]")
    if rows.dtype not in (np.float32, np.float64):
        raise InvalidArgumentError(f"rows is {rows.dtype}: it must be float32 or float64")
    return [rows[start : start + _ROWS] for start in range(0, len(rows), _ROWS)]


def _check(count: int, total: Floats, dimensions: int) -> None:
    shape = total.shape
    if count < 0 or len(shape) != dimensions or len(set(shape)) > 1 or total.dtype != np.float64:
        raise InvalidArgumentError(f"statistics of {count} vectors, {total.dtype} {shape}: not those of second moments")
    if not np.isfinite(total).all():
        raise InvalidArgumentError("second moments are not finite: the vectors hold NaN or an infinity")
