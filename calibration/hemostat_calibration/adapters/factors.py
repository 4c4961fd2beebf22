"""The two factors of a layer's correction, and such matrices as int8 with a scale for each row.

That is half the bytes of bfloat16. The rounding error of an entry is at most half of its row's scale, which is the
row's largest magnitude / 127.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hemostat_calibration.arrays import Singles
from hemostat_calibration.errors import InvalidArgumentError


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """A change b @ a of a layer's weight [outputs, inputs], its rank at most r.

    a: float32 [r, inputs]. b: float32 [outputs, r]. The components are sorted, the most important first: the first k
    rows of a and columns of b are the correction of rank k. Raises InvalidArgumentError if shapes or types do not fit.

    >>> factors = LowRank(np.ones((2, 3), np.float32), np.ones((5, 2), np.float32))
    >>> factors.rank, factors.first(1).rank
    (2, 1)
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
        """Returns the first `rank` components, all of them where there are fewer."""
        return LowRank(self.a[:rank], self.b[:, :rank])

    def for_rounding(self) -> LowRank:
        """Returns the same product, with components of equal length in b and ‖a‖ = ‖b‖.

        With one scale for each row, b then loses least by rounding: a row of b has an entry of every component. The
        rows of a may have any lengths, as each has a scale of its own.
        """
        return self._with_lengths(even=True)

    def for_training(self) -> LowRank:
        """Returns the same product, with components that have the same length in a and in b, as optimisers need it that
        move every entry by similar steps."""
        return self._with_lengths(even=False)

    def _with_lengths(self, even: bool) -> LowRank:
        if self.rank == 0:
            return self
        a, b = self.a.astype(np.float64), self.b.astype(np.float64)
        of_a, of_b = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=0)
        products = of_a * of_b
        wanted = np.full_like(products, np.sqrt(np.sqrt(np.mean(products**2)))) if even else np.sqrt(products)
        # A component without effect stays as it is.
        factors = np.divide(of_b, wanted, out=np.ones_like(of_b), where=(products > 0.0) & (wanted > 0.0))
        return LowRank((a * factors[:, None]).astype(np.float32), (b / factors).astype(np.float32))


_MOST = 127.0


def quantize_rows(x: npt.NDArray[np.floating[Any]]) -> tuple[npt.NDArray[np.int8], Singles]:
    """Returns int8 [n, d] from -127 to 127, and scales, float32 [n], 0 or more, with x [n, d] ≈ int8 × scale, by row.
    Raises InvalidArgumentError if x is not a matrix or not finite.

    >>> codes, scales = quantize_rows(np.array([[1.0, -2.54], [0.0, 0.0]]))
    >>> codes.tolist(), scales.round(4).tolist()
    ([[50, -127], [0, 0]], [0.019999999552965164, 0.0])
    """
    if x.ndim != 2 or not np.isfinite(x).all():
        raise InvalidArgumentError(f"x of shape {x.shape} must be a matrix without NaN and infinities")
    exact = x.astype(np.float64)
    scales: Singles = (np.abs(exact).max(axis=1, initial=0.0) / _MOST).astype(np.float32)
    # A scale below the smallest float32 is 0, and the row is, too.
    divisors = np.where(scales > 0.0, scales, np.inf).astype(np.float64)
    codes = np.clip(np.rint(exact / divisors[:, None]), -_MOST, _MOST).astype(np.int8)
    return codes, scales


def dequantize_rows(codes: npt.NDArray[np.int8], scales: Singles) -> Singles:
    """Returns float32 [n, d] from int8 [n, d] and the scales [n] of the rows.

    >>> dequantize_rows(np.array([[50, -127]], np.int8), np.array([0.5], np.float32)).tolist()
    [[25.0, -63.5]]
    """
    return codes.astype(np.float32) * scales[:, None]
