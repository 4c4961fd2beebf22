"""Decides which requests are sampled, and which are in the control arm, and how conversations and clients are named.

No client can choose to be sampled, or the arm of a conversation: whether a request is sampled is drawn, and arms follow
from a keyed hash (BLAKE2b) of the conversation with a secret of the store (`salt`). Every relay thus puts the
turns of a conversation into the same arm. The hashes' purposes make them independent of each other.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterator
from functools import lru_cache
from hashlib import blake2b
from typing import Final

from hemostat.openai.credentials import credential

CONVERSATION_BYTES: Final = 16
CLIENT_BYTES: Final = 8

ARM: Final = b"hemostat arm"
CONVERSATION: Final = b"hemostat talk"
CLIENT: Final = b"hemostat client"
OUTCOME: Final = b"hemostat outcome"

_DRAWN_AT_ONCE: Final = 512
_MAX_HASHES: Final = 32
"""The number of keyed hashes that are kept: four for each secret of a policy."""


def _draws() -> Iterator[float]:
    while True:
        # One system call for many numbers: there is one for every request.
        yield from ((bits >> 11) * 2.0**-53 for bits in array("Q", os.urandom(8 * _DRAWN_AT_ONCE)))


draw: Final[Callable[[], float]] = _draws().__next__
"""A uniform number in [0, 1) from the operating system's generator, which cannot be predicted."""


@lru_cache(_MAX_HASHES)
def _keyed(size: int, salt: bytes, purpose: bytes) -> blake2b:
    """Returns the hash that has read its key: to copy it takes less than half as long as to make it."""
    return blake2b(digest_size=size, key=salt, person=purpose)


def _digest(value: bytes, size: int, salt: bytes, purpose: bytes) -> bytes:
    state = _keyed(size, salt, purpose).copy()
    state.update(value)
    return state.digest()


def uniform(key: bytes, salt: bytes, purpose: bytes) -> float:
    """Returns a number in [0, 1), determined by its arguments; salt: at most 64 bytes, purpose: at most 16."""
    return (int.from_bytes(_digest(key, 8, salt, purpose), "little") >> 11) * 2.0**-53


def in_control_arm(conversation: bytes, fraction: float, salt: bytes) -> bool:
    """Returns True for a fraction `fraction` of all conversations."""
    return uniform(conversation, salt, ARM) < fraction


def outcome_number(conversation: bytes, salt: bytes) -> float:
    """Returns the number of a conversation in [0, 1): its outcomes are reported while it is below
    `Policy.outcome_fraction`."""
    return uniform(conversation, salt, OUTCOME)


def conversation_digest(key: bytes | None, salt: bytes) -> bytes:
    """Returns 16 bytes that name a conversation, by `openai.requests.Request.conversation_key`; empty without a key.

    The client is not part of it: a prompt that a second client repeats is not a second observation.
    """
    if key is None:
        return b""
    return _digest(key, CONVERSATION_BYTES, salt, CONVERSATION)


def client_digest(header: bytes, salt: bytes) -> bytes:
    """Returns 8 bytes that name a client, by the value of the header that does; empty where that is empty."""
    value = credential(header)
    return _digest(value, CLIENT_BYTES, salt, CLIENT) if value else b""
