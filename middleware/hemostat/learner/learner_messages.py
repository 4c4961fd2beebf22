"""Messages between the control process and the learner.

Each frame (`hemostat.ipc.framing`) holds one msgpack-encoded message. Arrays are little-endian bytes. Every
`Learn` is answered with `Learned`, every `Propose` with `Proposed`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec
import numpy as np
import numpy.typing as npt

from hemostat.ipc.framing import MessageCodec
from hemostat_calibration.learning.contextual.rows import MAX_HALF
from hemostat_calibration.records import Candidates, Features, TokenRecord


class Start(msgspec.Struct, tag="start", frozen=True):
    """The first message; answered with `Ready` or `Refused`."""

    model: str
    """The served name of the compressed model."""
    vocab_size: int
    folder: str
    """The folder of a checkpoint that holds the output embedding."""
    hidden_size: int
    """The size of the reference's hidden states; 0: there are none."""
    anchors: int
    rank: int
    clamp_nats: float
    kl_limit: float
    half_life_tokens: float | None
    recent_tokens: int
    min_tokens: int
    reference: str = ""
    """The digest of the reference's weights; "" if unknown."""
    stored_bytes: int = 0
    """The largest size of an export; 0: nothing is exported."""
    restores: bool = False
    """It is True if `Restore` messages follow."""


class Restore(msgspec.Struct, tag="restore", frozen=True):
    """A part of what an earlier learner exported, at most `PART_BYTES`."""

    part: bytes
    last: bool


class Export(msgspec.Struct, tag="export", frozen=True):
    """Asks for what was learned; it is answered with `Exported`. At the end of its input the learner exports what was
    learned since the last one.
    """


class Row(msgspec.Struct, frozen=True, array_like=True):
    """The parts of a record to learn from: T tokens, K candidates, J of the reference's, N anchors, d hidden."""

    unit: bytes
    """The value of `TokenRecord.unit`."""
    output: bytes
    """The emitted ids, int32 [T]."""
    candidates: bytes
    """The ids of the candidates, int32 [T, K]."""
    candidate_logprobs: bytes
    """The log-probabilities of the candidates, float32 [T, K]. All that follows is float32, except for the features and
    hidden states.
    """
    reference_at: bytes
    reference: bytes
    """The ids that the reference gave, int32 [T, J]."""
    reference_logprobs: bytes
    emitted: bytes
    reference_emitted: bytes
    anchors: str
    """The digest of the anchors; "" without features."""
    features: bytes
    """The engine's features, float16 [T, N]."""
    hidden: bytes
    """The reference's hidden states, float16 [T, d]; empty: none."""


class Learn(msgspec.Struct, tag="learn", frozen=True):
    rows: list[Row]


class Propose(msgspec.Struct, tag="propose", frozen=True):
    """Asks for a proposal."""


class Refused(msgspec.Struct, tag="refused", frozen=True):
    """The learner cannot start, and ends."""

    message: str


class Learned(msgspec.Struct, tag="learned", frozen=True):
    """The totals since the process started. failed: records that could not be learned from, by what was raised."""

    tokens: int
    """The number of tokens that were learned from."""
    sources: dict[str, int]
    """The number of tokens by `learning.contextual.rows.TokenSource`."""
    failed: dict[str, int]


class Ready(msgspec.Struct, tag="ready", frozen=True):
    anchors: bytes
    """The ids of the anchors, int32 [N]."""
    learned: Learned = Learned(0, {}, {})
    """The totals of what was restored."""
    detail: str = ""
    """The reason why nothing was restored."""


class Exported(msgspec.Struct, tag="exported", frozen=True):
    """A part of what was learned, at most `PART_BYTES`; a single empty one where it does not fit
    `Start.stored_bytes`."""

    part: bytes
    last: bool


class Training(msgspec.Struct, tag="training", frozen=True):
    """The progress of a proposal; done: from 0 to 1."""

    stage: str
    done: float


class Proposed(msgspec.Struct, tag="proposed", frozen=True):
    tokens: int
    """The number of tokens that it was learned from."""
    profile: bytes
    """The profile's file. It is empty if there is nothing to propose yet, or if learning failed, and `report` says
    why."""
    report: dict[str, str | int | float]


PART_BYTES = 1 << 20

Request = Start | Restore | Learn | Propose | Export
Answer = Ready | Refused | Learned | Training | Proposed | Exported

REQUESTS: MessageCodec[Request] = MessageCodec(Request)
ANSWERS: MessageCodec[Answer] = MessageCodec(Answer)


def parts(data: bytes) -> Iterator[tuple[bytes, bool]]:
    """Yields pieces of at most `PART_BYTES`, each with whether it is the last one; one empty piece if there is nothing.

    >>> list(parts(b""))
    [(b'', True)]
    """
    for first in range(0, max(len(data), 1), PART_BYTES):
        yield data[first : first + PART_BYTES], first + PART_BYTES >= len(data)


def learn_body(records: Iterable[TokenRecord]) -> bytes:
    """Returns the message that hands records over. It takes milliseconds for a long record of a large model."""
    return REQUESTS.encode(Learn([to_row(record) for record in records]))


def to_row(record: TokenRecord) -> Row:
    """Returns the record as a row. Features and hidden states are rounded to float16, which loses less than the models'
    own bfloat16."""
    features, hidden = record.features, record.reference_hidden
    return Row(
        unit=record.unit,
        output=_bytes(record.output_ids, "<i4"),
        candidates=_bytes(record.compressed.ids, "<i4"),
        candidate_logprobs=_bytes(record.compressed.logprobs, "<f4"),
        reference_at=_bytes(record.reference_at, "<f4"),
        reference=_bytes(record.reference.ids, "<i4"),
        reference_logprobs=_bytes(record.reference.logprobs, "<f4"),
        emitted=_bytes(record.compressed_emitted, "<f4"),
        reference_emitted=_bytes(record.reference_emitted, "<f4"),
        anchors=features.anchors if features else "",
        features=_halves(features.values) if features else b"",
        hidden=b"" if hidden is None else _halves(hidden),
    )


def from_row(row: Row, vocab_size: int) -> TokenRecord:
    """Returns the record that a row was made of; the parts that a row lacks are at their defaults. Features and hidden
    states stay float16, and are views of the row's bytes.
    """
    output = np.frombuffer(row.output, "<i4").astype(np.int32)
    tokens = len(output)

    def ids(data: bytes) -> npt.NDArray[np.int32]:
        return np.frombuffer(data, "<i4").astype(np.int32).reshape(tokens, -1)

    def floats(data: bytes) -> npt.NDArray[np.float64]:
        return np.frombuffer(data, "<f4").astype(np.float64)

    def halves(data: bytes) -> npt.NDArray[np.float16]:
        return np.frombuffer(data, "<f2").astype(np.float16, copy=False).reshape(tokens, -1)

    return TokenRecord(
        vocab_size=vocab_size,
        prompt_key=row.unit,
        output_ids=output,
        compressed=Candidates(ids(row.candidates), floats(row.candidate_logprobs).reshape(tokens, -1)),
        reference_at=floats(row.reference_at).reshape(tokens, -1),
        reference=Candidates(ids(row.reference), floats(row.reference_logprobs).reshape(tokens, -1)),
        compressed_emitted=floats(row.emitted),
        reference_emitted=floats(row.reference_emitted),
        features=Features(row.anchors, halves(row.features)) if row.anchors else None,
        reference_hidden=halves(row.hidden) if row.hidden else None,
    )


def _bytes(values: npt.NDArray[np.generic], dtype: str) -> bytes:
    return values.astype(dtype).tobytes()


def _halves(values: npt.NDArray[np.floating]) -> bytes:
    result = np.empty(values.shape, "<f2")
    # Into the result at once: fresh memory for what is between costs as much as the conversion.
    np.clip(values, -MAX_HALF, MAX_HALF, out=result, casting="unsafe")
    return result.tobytes()
