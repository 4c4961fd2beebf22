"""From the JSON of `logprobs` to the candidates of each position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from hemostat.openai.form import Form
from hemostat.openai.logprobs.scanning import scan_chat

_ID_PREFIX = len("token_id:")


class Rows(NamedTuple):
    """Of T output positions.

    ids: int32 [T, top_k + 1], most likely first, the emitted id among them; -1 pads.
    logprobs: float32 [T, top_k + 1], nats; -inf pads. emitted: float32 [T], of the emitted ids.
    """

    ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    emitted: npt.NDArray[np.float32]


class Row(NamedTuple):
    """One output position: the candidates, in the engine's order and without duplicates, and the emitted token."""

    emitted: int
    logprob: float
    ids: list[int]
    logprobs: list[float]


class _Top(msgspec.Struct, gc=False):
    token: str
    logprob: float


class _Entry(msgspec.Struct, gc=False):
    token: str
    logprob: float
    top_logprobs: list[_Top]


class _ChatLogprobs(msgspec.Struct, gc=False):
    content: list[_Entry]


class _CompletionLogprobs(msgspec.Struct, gc=False):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]


_chat: msgspec.json.Decoder[_ChatLogprobs] = msgspec.json.Decoder(_ChatLogprobs)
_completion: msgspec.json.Decoder[_CompletionLogprobs] = msgspec.json.Decoder(_CompletionLogprobs)


def read_rows(form: Form, pieces: Sequence[bytes], output: Sequence[int], top_k: int) -> Rows:
    """The candidates of the emitted ids `output`. One of json_splice.MALFORMED where the pieces do not fit them.

    pieces: the JSON of each `logprobs` of one choice, in order: of its whole response, or of a stream's events.
    """
    if form is Form.CHAT and (found := scan_chat(pieces, output, top_k)) is not None:
        return Rows(*found)
    return parse_rows(form, pieces, output, top_k)


def parse_rows(form: Form, pieces: Sequence[bytes], output: Sequence[int], top_k: int) -> Rows:
    """The same for JSON of any style, several times slower."""
    read = _chat_rows if form is Form.CHAT else _completion_rows
    rows = [row for piece in pieces for row in read(piece)]
    ids = np.full((len(output), top_k + 1), -1, np.int32)
    logprobs = np.full(ids.shape, -np.inf, np.float32)
    emitted = np.empty(len(output), np.float32)
    for position, (token, (name, row)) in enumerate(zip(output, rows, strict=True)):
        if name != f"token_id:{token}":
            raise ValueError(f"the logprobs name the token {token} as {name!r}")
        chosen = ordered(row._replace(emitted=token), top_k)
        ids[position, : len(chosen)] = list(chosen)
        logprobs[position, : len(chosen)] = list(chosen.values())
        emitted[position] = row.logprob
    return Rows(ids, logprobs, emitted)


def ordered(row: Row, top_k: int) -> dict[int, float]:
    """At most top_k + 1 candidates, most likely first, with the emitted one. ValueError where one is there twice."""
    ids, values = row.ids, row.logprobs
    if row.emitted not in ids:
        ids = [*ids, row.emitted]
        values = [*values, row.logprob]
    # vLLM lists the emitted token first, whatever its rank.
    order = sorted(range(len(ids)), key=values.__getitem__, reverse=True)
    if len(set(ids)) < len(ids):
        raise ValueError(f"duplicates among the candidates: {ids}")
    if len(order) > top_k + 1:
        # The client asked for more. The emitted token stays, whatever its rank.
        rank = next(rank for rank, place in enumerate(order) if ids[place] == row.emitted)
        order = [*order[:top_k], order[max(rank, top_k)]]
    return {ids[place]: values[place] for place in order}


def _chat_rows(piece: bytes) -> list[tuple[str, Row]]:
    """Each with the name of the emitted token."""
    return [
        (
            entry.token,
            Row(
                -1,
                entry.logprob,
                [int(top.token[_ID_PREFIX:]) for top in entry.top_logprobs],
                [top.logprob for top in entry.top_logprobs],
            ),
        )
        for entry in _chat.decode(piece).content
    ]


def _completion_rows(piece: bytes) -> list[tuple[str, Row]]:
    given = _completion.decode(piece)
    return [
        (name, Row(-1, logprob, [int(key[_ID_PREFIX:]) for key in row], list(row.values())))
        for name, logprob, row in zip(given.tokens, given.token_logprobs, given.top_logprobs, strict=True)
    ]
