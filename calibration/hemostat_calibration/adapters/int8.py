"""Matrices as int8 with a scale for each row: half the bytes of bfloat16.

The rounding error of an entry is at most half of its row's scale, which is the row's largest magnitude / 127.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from hemostat_calibration.arrays import Singles
from hemostat_calibration.errors import InvalidArgumentError

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
