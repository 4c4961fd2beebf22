"""Reads the candidates of each position from the JSON of `logprobs`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from hemostat.openai.routes import Form

_PREFIX = "token_id:"
_ID_PREFIX = len(_PREFIX)
_NAMES = re.compile(rf"{_PREFIX}[0-9]{{1,9}}(?:,{_PREFIX}[0-9]{{1,9}})*+")
"""The names of several tokens, joined by commas. With nine digits an id is an int32."""


class Rows(NamedTuple):
    """The candidates of T output positions.

    ids: int32 [T, top_k + 1], most likely first, the emitted id among them; -1 pads. logprobs: float32 [T, top_k + 1],
    nats; -inf pads. emitted: float32 [T], the log-probabilities of the emitted ids.
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


class ChatLogprobs(msgspec.Struct, gc=False):
    """The names and numbers of a chat's `logprobs`."""

    content: list[_Entry]


class _CompletionLogprobs(msgspec.Struct, gc=False):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]


_chat: msgspec.json.Decoder[ChatLogprobs] = msgspec.json.Decoder(ChatLogprobs)
_completion: msgspec.json.Decoder[_CompletionLogprobs] = msgspec.json.Decoder(_CompletionLogprobs)


def read_rows(form: Form, pieces: Sequence[bytes], output: Sequence[int], top_k: int) -> Rows:
    """Returns the candidates of the emitted ids `output`. Raises one of json_splice.MALFORMED if the pieces do not fit
    them.

    pieces: the JSON of each `logprobs` of one choice, in order: of its whole response, or of a stream's events.
    """
    usual = usual_rows(pieces, output, top_k) if form is Form.CHAT else None
    return parse_rows(form, pieces, output, top_k) if usual is None else usual


def usual_rows(pieces: Sequence[bytes], output: Sequence[int], top_k: int) -> Rows | None:
    """Returns a chat's candidates where each position has `top_k` different ones, the emitted one first, then the
    others by their rank, as vLLM lists them where the client asks for no more. Returns None if that is not so."""
    positions = [entry for piece in pieces for entry in _chat.decode(piece).content]
    if [entry.token for entry in positions] != [f"{_PREFIX}{token}" for token in output]:
        return None
    if any(len(entry.top_logprobs) != top_k for entry in positions):
        return None
    tops = [top for entry in positions for top in entry.top_logprobs]
    names = ",".join([top.token for top in tops])
    if not _NAMES.fullmatch(names):
        return None
    ids = np.fromstring(names[_ID_PREFIX:], np.int32, sep=f",{_PREFIX}")
    if ids.size != len(tops):
        return None  # there is a comma in a name
    ids = ids.reshape(-1, top_k)
    values = np.array([top.logprob for top in tops]).reshape(-1, top_k)
    others = values[:, 1:]
    by_id = np.sort(ids, axis=1)
    if (
        (ids[:, 0] != np.asarray(output)).any()
        or (by_id[:, 1:] == by_id[:, :-1]).any()
        or (others[:, 1:] > others[:, :-1]).any()
    ):
        return None
    # The emitted one moves to its rank, and those before it to the front.
    before = others > values[:, :1]
    place = np.arange(len(output)), np.count_nonzero(before, axis=1)
    ordered_ids = np.full((len(output), top_k + 1), -1, np.int32)
    ordered_values = np.full(ordered_ids.shape, -np.inf, np.float32)
    for given, into in ((ids, ordered_ids), (values, ordered_values)):
        into[:, :-1] = given
        np.copyto(into[:, : top_k - 1], given[:, 1:], casting="same_kind", where=before)
        into[place] = given[:, 0]
    return Rows(ordered_ids, ordered_values, np.array([entry.logprob for entry in positions], np.float32))


def parse_rows(form: Form, pieces: Sequence[bytes], output: Sequence[int], top_k: int) -> Rows:
    """Returns the candidates of each position, whatever is listed and in whichever order, one position after the other:
    slower."""
    read = _chat_rows if form is Form.CHAT else _completion_rows
    rows = [row for piece in pieces for row in read(piece)]
    ids = np.full((len(output), top_k + 1), -1, np.int32)
    logprobs = np.full(ids.shape, -np.inf, np.float32)
    emitted = np.empty(len(output), np.float32)
    for position, (token, (name, row)) in enumerate(zip(output, rows, strict=True)):
        if name != f"{_PREFIX}{token}":
            raise ValueError(f"the logprobs name the token {token} as {name!r}")
        chosen = ordered(row._replace(emitted=token), top_k)
        ids[position, : len(chosen)] = list(chosen)
        logprobs[position, : len(chosen)] = list(chosen.values())
        emitted[position] = row.logprob
    return Rows(ids, logprobs, emitted)


def ordered(row: Row, top_k: int) -> dict[int, float]:
    """Returns at most top_k + 1 candidates, most likely first, with the emitted one. Raises ValueError if one is there
    twice."""
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
    """Returns the rows of a chat, each with the name of the emitted token."""
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
