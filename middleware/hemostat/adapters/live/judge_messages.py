"""Messages between the control process and the judge, the process that holds copies of both models.

Each frame (`hemostat.ipc.framing`) holds one msgpack-encoded message. Arrays are little-endian bytes. The judge answers
every `Judge` and `Logprobs` with one message of the same id, in their order.
"""

from __future__ import annotations

import msgspec

from hemostat.ipc.framing import MessageCodec


class Start(msgspec.Struct, tag="start", frozen=True):
    """The first message; answered with `Ready` or `Refused`."""

    compressed: str
    """Checkpoint folder."""
    reference: str
    """Checkpoint folder; only its output embedding is read where there are hidden states."""
    vocab_size: int
    hidden_size: int
    """The size of the reference's hidden states that every `Judge` brings; 0: they bring none, and the reference is
    loaded, too."""
    device: str


class Hold(msgspec.Struct, tag="hold", frozen=True):
    """Part of a profile's file, at most `PART_BYTES` of `learner/learner_messages.py`."""

    version: str
    part: bytes
    last: bool


class Evict(msgspec.Struct, tag="evict", frozen=True):
    versions: list[str]


class Judge(msgspec.Struct, tag="judge", frozen=True):
    """Distances from the reference at the T output positions; P prompt ids."""

    id: int
    prompt: bytes
    """int32 [P]"""
    output: bytes
    """int32 [T]"""
    versions: list[str]
    """The versions that the record is judged with; `IDENTITY` is the compressed model itself."""
    hidden: bytes
    """float32 [T, d]; empty: none"""


class Logprobs(msgspec.Struct, tag="logprobs", frozen=True):
    id: int
    ids: bytes
    """int32 [n]"""
    version: str
    """`IDENTITY`: the compressed model itself."""


class Ready(msgspec.Struct, tag="ready", frozen=True):
    reference_digest: str
    bytes: int
    """Memory of the copies."""


class Refused(msgspec.Struct, tag="refused", frozen=True):
    """The judge cannot start, and ends."""

    message: str


class Distances(msgspec.Struct, frozen=True, array_like=True):
    """The arrays of `records.ExactDistances`."""

    kl: bytes
    """float64 [T]"""
    tv: bytes
    """float64 [T]"""
    top1: bytes
    """uint8 [T]"""


class Judged(msgspec.Struct, tag="judged", frozen=True):
    id: int
    distances: dict[str, Distances]
    """The distances from the reference, by version."""
    emitted: bytes
    """float32 [T], the log-probability of each output token by the reference that the distances are from."""


class Scored(msgspec.Struct, tag="scored", frozen=True):
    id: int
    logprobs: bytes
    """float32 [n - 1], of each token after the first."""


class Failed(msgspec.Struct, tag="failed", frozen=True):
    """The request cannot be answered; the judge goes on."""

    id: int
    message: str


Request = Start | Hold | Evict | Judge | Logprobs
Answer = Ready | Refused | Judged | Scored | Failed

REQUESTS: MessageCodec[Request] = MessageCodec(Request)
ANSWERS: MessageCodec[Answer] = MessageCodec(Answer)
