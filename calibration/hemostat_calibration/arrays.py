"""Names for the array types that the core passes about, and the bytes of arrays as they are sent."""

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


def frozen(values: Floats) -> Floats:
    """Returns `values` itself, which is read-only from now on.

    >>> frozen(np.zeros(2)).flags.writeable
    False
    """
    values.flags.writeable = False
    return values


def little_endian(values: npt.ArrayLike) -> bytes:
    """Returns the bytes of `values`, little-endian, as they are sent between processes; `values` stay as they are.

    >>> little_endian(np.array([1, -1], np.int32))[:4]
    b'\\x01\\x00\\x00\\x00'
    """
    own = np.asarray(values)
    return own.astype(own.dtype.newbyteorder("<"), copy=False).tobytes()
