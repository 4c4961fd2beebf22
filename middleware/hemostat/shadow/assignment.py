"""Which requests are shadowed and which arm they stand in: pure functions of a key, a seed and a rate.

A keyed hash (BLAKE2b, 8 bytes) of the key is read as a uniform number u in [0, 1); a request is in when u < rate. The
same request is thus decided alike by every worker and on every retry, and one that is in at some rate is in at every
higher one. `purpose` separates the decisions, so that being sampled says nothing about the arm.
"""

from __future__ import annotations

from hashlib import blake2b

SHADOW = b"hemostat shadow"
ARM = b"hemostat arm"


def uniform(key: bytes, seed: int, purpose: bytes) -> float:
    """A number in [0, 1), fixed by its arguments; `seed` is taken modulo 2^64, `purpose` is at most 16 bytes."""
    digest = blake2b(
        key, digest_size=8, key=(seed & 0xFFFF_FFFF_FFFF_FFFF).to_bytes(8, "little"), person=purpose
    ).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def sampled(request_id: str, rate: float, seed: int) -> bool:
    """True for a share `rate` of all request ids."""
    if rate <= 0.0:
        return False
    return rate >= 1.0 or uniform(request_id.encode("utf-8", "surrogateescape"), seed, SHADOW) < rate


def controlled(key: bytes, fraction: float, seed: int) -> bool:
    """True for a share `fraction` of all keys (a conversation's, or a request's id)."""
    return uniform(key, seed, ARM) < fraction
