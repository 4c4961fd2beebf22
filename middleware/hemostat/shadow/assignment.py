"""Which requests are sampled, and which are in the control arm: pure functions of a key, a seed and a rate.

A keyed hash (BLAKE2b, 8 bytes) of the key is read as a uniform number u in [0, 1); a request is selected when u < rate.
Every worker thus decides alike about a request, and so does every retry of it, and a request that is selected at some
rate is selected at every higher one. `purpose` makes the decisions independent of each other.
"""

from __future__ import annotations

from hashlib import blake2b

SHADOW = b"hemostat shadow"
ARM = b"hemostat arm"


def uniform(key: bytes, seed: int, purpose: bytes) -> float:
    """A number in [0, 1), determined by its arguments; `seed` is taken modulo 2^64, `purpose` is at most 16 bytes."""
    digest = blake2b(
        key, digest_size=8, key=(seed & 0xFFFF_FFFF_FFFF_FFFF).to_bytes(8, "little"), person=purpose
    ).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def is_sampled(request_id: str, rate: float, seed: int) -> bool:
    """True for a fraction `rate` of all request ids."""
    if rate <= 0.0:
        return False
    return rate >= 1.0 or uniform(request_id.encode("utf-8", "surrogateescape"), seed, SHADOW) < rate


def in_control_arm(key: bytes, fraction: float, seed: int) -> bool:
    """True for a fraction `fraction` of all keys (a key is a conversation's, or a request's id)."""
    return uniform(key, seed, ARM) < fraction
