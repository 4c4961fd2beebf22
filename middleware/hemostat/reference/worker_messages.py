"""Messages between the control process and the reference worker, over the worker's standard input and output.

Each frame (`hemostat.ipc.framing`) holds one msgpack-encoded message. Arrays are little-endian bytes.
"""

from __future__ import annotations

import msgspec
import numpy as np

from hemostat.ipc.framing import MessageCodec
from hemostat.reference.protocol import CompressedLogits, FailureReason
from hemostat_calibration.allowed_sets import AllowedSets, words


class Load(msgspec.Struct, tag="load", frozen=True):
    """Loads the model; it is the first request."""

    model: str
    dtype: str
    device: str
    threads: int
    only: str = ""
    """The argument of `hemostat.reference.device.choose`, for the device auto."""


class LoadHead(msgspec.Struct, tag="load_head", frozen=True):
    """The first request, for the output head alone: later requests bring the hidden states."""

    folder: str
    device: str
    threads: int
    only: str = ""
    """See `Load`."""


class Basis(msgspec.Struct, frozen=True):
    """The function clip(up[v] · code, ±clamp) of the token v."""

    up: bytes
    """The matrix, float16 [V, rank]."""
    rank: int
    clamp: float


class Allowed(msgspec.Struct, frozen=True):
    """An `AllowedSets` as a message."""

    vocab_size: int
    table: bytes
    """The sets, uint32 [sets, words]."""
    rows: bytes
    """The place of each position's set, int32 [T]."""

    @classmethod
    def of(cls, sets: AllowedSets) -> Allowed:
        return cls(sets.vocab_size, sets.table.astype("<u4").tobytes(), sets.rows.astype("<i4").tobytes())

    def sets(self) -> AllowedSets:
        """Returns the sets. Raises InvalidArgumentError or ValueError if the message does not hold such sets."""
        return AllowedSets(
            self.vocab_size,
            np.frombuffer(self.table, "<u4").astype(np.uint32).reshape(-1, words(self.vocab_size)),
            np.frombuffer(self.rows, "<i4").astype(np.int32),
        )


class Compressed(msgspec.Struct, frozen=True):
    """A `CompressedLogits` as a message."""

    anchors: bytes
    """The ids of the anchors, int32 [N]."""
    features: bytes
    """The logits at the anchors, float32 [T, N]."""
    logprobs: bytes
    """The log-probabilities of the candidates, float64 [T, width]."""

    @classmethod
    def of(cls, given: CompressedLogits) -> Compressed:
        return cls(
            given.anchors.astype("<i4").tobytes(),
            given.features.astype("<f4").tobytes(),
            given.logprobs.astype("<f8").tobytes(),
        )


class Score(msgspec.Struct, tag="score", frozen=True):
    """Asks to score T output tokens after P prompt tokens."""

    id: int
    prompt: bytes
    """The ids of the prompt, int32 [P]."""
    output: bytes
    """The ids of the output, int32 [T]."""
    ids: bytes
    """The ids whose log-probabilities are wanted, int32 [T, width], -1 pads."""
    width: int
    bases: dict[str, Basis]
    """The bases of the functions whose expectation is to be computed, by name; only the ones that the worker does not
    hold yet.
    """
    wanted: list[str]
    """Every name whose expectation is to be computed; the worker drops all others."""
    codes: dict[str, bytes]
    """The code for every basis in `wanted`: float32 [T, rank]."""
    hidden: bool
    """It is True if hidden states are to be returned."""
    reshaped: bool = False
    """It is True if only the scores are to be computed, in another shape (see `exact.score`); what the worker holds
    does not change."""
    allowed: Allowed | None = None
    """The ids that scores are conditional on."""
    compressed: Compressed | None = None
    """The compressed model's logits, whose recovered distribution is to be compared with the reference; only where the
    worker `compares`.
    """
    states: bytes = b""
    """The final hidden states that predict `output`, bfloat16 [T, d], for an output head; then `prompt` is not used."""


class Tokenize(msgspec.Struct, tag="tokenize", frozen=True):
    id: int
    text: str


class Render(msgspec.Struct, tag="render", frozen=True):
    id: int
    messages: list[dict[str, str]]


class Chosen(msgspec.Struct, tag="chosen", frozen=True):
    """The device on which the worker is about to load, and why; it is sent only if the configured one is auto."""

    device: str
    reason: str


class Loaded(msgspec.Struct, tag="loaded", frozen=True):
    digest: str
    dtype: str
    vocab_size: int
    max_positions: int
    """The largest number of positions; 0: unknown."""
    folder: str
    """The folder of the checkpoint."""
    hidden_size: int
    """The size of hidden states. It is 0 if the reference's logits are not a linear map of a hidden state;
    `hidden_detail` names the reason."""
    hidden_detail: str
    compares: bool
    """It is True if the reference compares with the compressed model's recovered distribution."""
    width: int = 0
    """The size d of an output head, also if `hidden_size` is 0."""


class Scored(msgspec.Struct, tag="scored", frozen=True):
    """All values float64, nats."""

    id: int
    at: bytes
    """The log-probabilities at `Score.ids`, [T, width]; NaN where padded."""
    top_ids: bytes
    """The most likely ids, int32 [T, width]."""
    top_logprobs: bytes
    """The log-probabilities of the most likely ids, [T, width]."""
    emitted: bytes
    """The log-probabilities of the output, [T]."""
    entropy: bytes
    """The entropy of the distribution, [T]."""
    expected: dict[str, bytes]
    """The expectation of each function, by name: [T]."""
    hidden: bytes
    """The hidden states, float32 [T, hidden_size]; empty if they were not requested, or if hidden_size is 0."""
    recovered: bytes = b""
    """The arrays of `RecoveredDivergence` in their order, float64 [7, T]; empty if they were not requested."""


class TokenIds(msgspec.Struct, tag="token_ids", frozen=True):
    id: int
    ids: list[int]


class Failed(msgspec.Struct, tag="failed", frozen=True):
    id: int
    """The id of the request; -1: loading failed."""
    reason: FailureReason
    message: str


Request = Load | LoadHead | Score | Tokenize | Render
Answer = Chosen | Loaded | Scored | TokenIds | Failed

REQUESTS: MessageCodec[Request] = MessageCodec(Request)
ANSWERS: MessageCodec[Answer] = MessageCodec(Answer)
