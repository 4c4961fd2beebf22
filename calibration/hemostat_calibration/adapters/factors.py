"""The two factors of a layer's correction."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hemostat_calibration.arrays import Singles
from hemostat_calibration.errors import InvalidArgumentError


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """A change b @ a of a layer's weight [outputs, inputs], its rank at most r.

    a: float32 [r, inputs]. b: float32 [outputs, r]. The components are sorted, the most important first: the first k
    rows of a and columns of b are the correction of rank k. InvalidArgumentError where shapes or types do not fit.

    >>> found = LowRank(np.ones((2, 3), np.float32), np.ones((5, 2), np.float32))
    >>> found.rank, found.first(1).product().shape
    (2, (5, 3))
    """

    a: Singles
    b: Singles

    def __post_init__(self) -> None:
        if self.a.ndim != 2 or self.b.ndim != 2 or self.a.shape[0] != self.b.shape[1]:
            raise InvalidArgumentError(f"a has shape {self.a.shape}, b {self.b.shape}: [r, inputs] and [outputs, r]")
        if self.a.dtype != np.float32 or self.b.dtype != np.float32:
            raise InvalidArgumentError(f"a is {self.a.dtype}, b {self.b.dtype}: they must be float32")

    @property
    def rank(self) -> int:
        return len(self.a)

    def first(self, rank: int) -> LowRank:
        """The first `rank` components, all of them where there are fewer."""
        return LowRank(self.a[:rank], self.b[:, :rank])

    def product(self) -> Singles:
        """b @ a, float32 [outputs, inputs]."""
        return self.b @ self.a
