"""Names for the array types that the core passes about."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Singles = npt.NDArray[np.float32]
Halves = npt.NDArray[np.float16]
Ids = npt.NDArray[np.int32]
"""An array of token ids; -1 where a row is padded."""
Indices = npt.NDArray[np.integer]
Bools = npt.NDArray[np.bool_]


def frozen(array: Floats) -> Floats:
    """Returns `array` itself, which is read-only from now on.

    >>> frozen(np.zeros(2)).flags.writeable
    False
    """
    array.flags.writeable = False
    return array
