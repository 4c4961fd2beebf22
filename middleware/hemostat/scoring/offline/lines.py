"""Captures from a file of JSON lines: answers as vLLM returns them, or what `records.path` has.

A line has the ids of the prompt and of the answer, and the log-probabilities of the answer's tokens in one of the forms
that vLLM writes: `logprobs` of a chat or of a completion with `return_tokens_as_token_ids`, or a list with an object of
ids for each position, as of `LLM.generate`. Texts are no substitute for ids: the ids that a tokenizer makes of a text
need not be the ids that were generated.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from hemostat.ipc.messages import Capture
from hemostat.openai.logprobs.rows import Row, ordered
from hemostat.openai.routes import CHAT, COMPLETIONS
from hemostat.reference.protocol import Reference, ScoreRequest
from hemostat.scoring.capture_arrays import UnreadableLogprobsError, decode_capture, output_ids, prompt_ids
from hemostat.scoring.engine_scores import with_scores
from hemostat.scoring.spool.keys import SpoolError
from hemostat.scoring.spool.spooled import Spooled
from hemostat_calibration.errors import InvalidRecordError
from hemostat_calibration.profiles.profile import IDENTITY

LINES = 1024
"""The number of lines that become one file of scored captures."""
MAX_ID = 2**31 - 1
NONE = msgspec.Raw()
MODEL = "compressed"
"""The served name of a line that names no model."""


class _Number(msgspec.Struct):
    logprob: float


class _Choice(msgspec.Struct):
    index: int = 0
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None
    output_token_ids: list[int] | None = None
    logprobs: msgspec.Raw = NONE
    finish_reason: str | None = None


class _Line(_Choice):
    id: str = ""
    request_id: str = ""
    at: float | None = None
    created: float | None = None
    model: str | None = None
    kind: str = ""
    label: str = ""
    client: str = ""
    conversation: str = ""
    temperature: float | None = None
    constraint: str = ""
    profile: str = IDENTITY
    adapter: str | None = None
    choices: list[_Choice] = []


class _Widths(msgspec.Struct):
    """The number of ids that each position lists: of a chat, or of a completion."""

    class Position(msgspec.Struct):
        top_logprobs: list[msgspec.Raw] = []

    content: list[Position] | None = None
    top_logprobs: list[dict[str, float]] | None = None


_line = msgspec.json.Decoder(_Line)
_widths = msgspec.json.Decoder(_Widths)
_positions = msgspec.json.Decoder(list[dict[int, float | _Number]])


class LinesPart(NamedTuple):
    """Some lines of a file. name: of the file of scored captures, which depends on what the lines say."""

    name: str
    first: int
    """The number of the first line."""
    offset: int
    """The place in the file where they begin, in bytes."""
    size: int
    """The number of their bytes."""


def parts(path: Path) -> Iterator[LinesPart]:
    """Yields the lines of a file, `LINES` at a time. Raises SpoolError and OSError."""
    with path.open("rb") as file:
        first = 1
        while lines := list(itertools.islice(file, LINES)):
            data = b"".join(lines)
            yield LinesPart(_name(path, first, lines, data), first, file.tell() - len(data), len(data))
            first += len(lines)


def _name(path: Path, first: int, lines: list[bytes], data: bytes) -> str:
    given = next((number for number, line in enumerate(lines) if line.strip()), None)
    at = float(first) if given is None else _time(_decoded(path, first + given, lines[given]), first)
    return f"captures-{max(round(at * 1000), 0):013d}-{hashlib.blake2b(data, digest_size=4).hexdigest()}"


def _time(line: _Line, number: int) -> float:
    """Returns the Unix time of a line; its number if it has none, so that lines are taken in their order."""
    return next((float(time) for time in (line.at, line.created) if time is not None), float(number))


def _decoded(path: Path, number: int, line: bytes) -> _Line:
    try:
        return _line.decode(line)
    except msgspec.DecodeError as error:
        raise SpoolError(f"{path}, line {number}: {error}; give one JSON object a line") from None


async def captures_of(path: Path, part: LinesPart, compressed: Reference | None) -> tuple[list[Spooled], int]:
    """Returns the captures of some lines, and how many lines were left out, as a profile or an adapter has answered.

    compressed: computes the log-probabilities that lines do not have. Raises SpoolError, which names the line, and
    ReferenceFailure.
    """
    with path.open("rb") as file:
        file.seek(part.offset)
        data = file.read(part.size)
    result, left_out = list[Spooled](), 0
    for number, text in enumerate(data.split(b"\n"), part.first):
        if not text.strip():
            continue
        line = _decoded(path, number, text)
        if line.profile != IDENTITY or line.adapter is not None:
            left_out += 1
            continue
        for choice in line.choices or [line]:
            try:
                capture = _capture(line, choice, number)
                if capture.ids_only:
                    capture = await _scored(capture, compressed)
                decoded = decode_capture(capture)
            except (SpoolError, UnreadableLogprobsError, InvalidRecordError, ValueError) as error:
                raise SpoolError(f"{path}, line {number}: {_in_words(error)}") from None
            result.append(Spooled(decoded, _time(line, number)))
    return result, left_out


def _in_words(error: Exception) -> str:
    if isinstance(error, UnreadableLogprobsError):
        return f"{error}; ask vLLM for return_tokens_as_token_ids, so that log-probabilities name ids"
    return " ".join(str(error).split())


async def _scored(capture: Capture, compressed: Reference | None) -> Capture:
    if compressed is None:
        raise SpoolError("it has no log-probabilities; name the model that has generated it by --compressed")
    output = output_ids(capture)
    scores = await compressed.score(ScoreRequest(prompt_ids(capture), output, output[:, None]))
    return msgspec.structs.replace(with_scores(capture, output, scores), ids_only=False)


def _capture(line: _Line, choice: _Choice, number: int) -> Capture:
    prompt = choice.prompt_token_ids if choice.prompt_token_ids is not None else line.prompt_token_ids
    output = choice.token_ids if choice.token_ids is not None else choice.output_token_ids
    if prompt is None or output is None:
        missing = "prompt_token_ids" if prompt is None else "token_ids"
        raise SpoolError(
            f"it has no {missing}. Texts cannot be scored, as the ids that a tokenizer makes of a text need not be the "
            "ids that were generated; ask vLLM for return_token_ids"
        )
    if not all(0 <= token <= MAX_ID for token in (*prompt, *output)):
        raise SpoolError("an id is negative, or larger than any id")
    ids = np.asarray(output, "<i4")
    capture = Capture(
        request_id=line.request_id or line.id or f"line-{number}",
        route=COMPLETIONS,
        model=line.model or MODEL,
        label=line.label,
        arm="none",
        requested=None,
        nonce="",
        stream=False,
        prompt_token_ids=np.asarray(prompt, "<i4").tobytes(),
        output_token_ids=ids.tobytes(),
        top_k=0,
        candidate_ids=b"",
        candidate_logprobs=b"",
        emitted_logprobs=b"",
        temperature=float("nan") if line.temperature is None else line.temperature,
        top_p=1.0,
        sampling_top_k=0,
        min_p=0.0,
        finish_reason=choice.finish_reason or "",
        captured_at=0.0,
        kind=line.kind,
        conversation=_digest(line.conversation, 16),
        client=_digest(line.client, 8),
        choice=choice.index,
        choices=max(len(line.choices), 1),
        grammar=bool(line.constraint),
    )
    raw = bytes(choice.logprobs).strip()
    if raw in {b"", b"null"}:
        return msgspec.structs.replace(capture, ids_only=True)
    if raw.startswith(b"["):
        return _from_positions(capture, output, raw)
    try:
        widths = _widths.decode(raw)
    except msgspec.DecodeError as error:
        raise SpoolError(f"logprobs: {error}") from None
    chat = widths.content is not None
    sizes = [len(p.top_logprobs) for p in widths.content or ()] or [len(p) for p in widths.top_logprobs or ()]
    # vLLM lists the K likeliest ids, and the emitted one in addition where it is none of them.
    capture = msgspec.structs.replace(capture, route=CHAT if chat else COMPLETIONS, logprobs=[raw], top_k=_width(sizes))
    return capture


def _from_positions(capture: Capture, output: list[int], raw: bytes) -> Capture:
    try:
        given = _positions.decode(raw)
    except msgspec.DecodeError as error:
        raise SpoolError(f"logprobs: {error}") from None
    if len(given) != len(output):
        raise SpoolError(f"logprobs has {len(given)} positions, and token_ids has {len(output)}")
    top_k = _width([len(position) for position in given])
    ids = np.full((len(output), top_k + 1), -1, "<i4")
    logprobs = np.full(ids.shape, -np.inf, "<f4")
    emitted = np.empty(len(output), "<f4")
    for place, (token, position) in enumerate(zip(output, given, strict=True)):
        values = {i: v.logprob if isinstance(v, _Number) else v for i, v in position.items()}
        if token not in values:
            raise SpoolError(f"logprobs: position {place} does not list the token {token}, which was generated")
        chosen = ordered(Row(token, values[token], list(values), list(values.values())), top_k)
        ids[place, : len(chosen)], logprobs[place, : len(chosen)] = list(chosen), list(chosen.values())
        emitted[place] = values[token]
    return msgspec.structs.replace(
        capture,
        top_k=top_k,
        candidate_ids=ids.tobytes(),
        candidate_logprobs=logprobs.tobytes(),
        emitted_logprobs=emitted.tobytes(),
    )


def _width(sizes: list[int]) -> int:
    """Returns the number of ids that were asked for at each position. Raises SpoolError if it is below 2."""
    if min(sizes, default=0) < 2:
        raise SpoolError("logprobs lists fewer than 2 ids at a position; ask vLLM for 20 of them")
    return min(sizes)


def _digest(text: str, size: int) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=size).digest() if text else b""
