"""The split into learning and held-out requests by a key alone, such as the hash of a template or a prompt: what has
the same key is never on both sides.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from hemostat_calibration.errors import InvalidArgumentError

_KEY_BYTES = 16


def prompt_key(ids: npt.NDArray[np.integer]) -> bytes:
    """Returns the 16-byte digest of the prompt's token ids [P]. Raises InvalidArgumentError for another shape.

    >>> prompt_key(np.array([1, 2, 3])).hex()
    'b30a3c159d7e8193559a42a84f1fcae1'
    """
    if ids.ndim != 1:
        raise InvalidArgumentError(f"ids has shape {ids.shape}: it must be [P]")
    return hashlib.blake2b(ids.astype("<i4").tobytes(), digest_size=_KEY_BYTES).digest()


def held_out(key: bytes, fraction: float) -> bool:
    """Returns True for about `fraction` of all keys, and always for the same ones. A larger fraction includes all keys
    of a smaller one.

    Raises InvalidArgumentError unless 0 ≤ fraction ≤ 1.

    >>> sum(held_out(bytes([n]), 0.25) for n in range(256))
    61
    """
    if not 0.0 <= fraction <= 1.0:
        raise InvalidArgumentError(f"fraction is {fraction}: it must be 0 to 1")
    # Hashed once more, so that a key which is itself a hash of something else, or short, is spread evenly.
    digest = hashlib.blake2b(key, digest_size=8, person=b"hemostat.split").digest()
    return int.from_bytes(digest, "big") < fraction * 2.0**64
