"""The bytes of a capture as arrays, and the candidates of one that has them as JSON. No IO."""

from __future__ import annotations

import msgspec
import numpy as np

from hemostat.ipc.messages import ID_BYTES, Capture
from hemostat.openai.json_splice import MALFORMED
from hemostat.openai.logprobs.rows import read_rows
from hemostat.openai.routes import FORMS
from hemostat_calibration.arrays import Floats, Ids
from hemostat_calibration.errors import InvalidRecordError
from hemostat_calibration.records import Candidates


def prompt_ids(capture: Capture) -> Ids:
    """Returns the token ids of the prompt, int32 [P]."""
    return np.frombuffer(capture.prompt_token_ids, "<i4").astype(np.int32)


def output_ids(capture: Capture) -> Ids:
    """Returns the token ids of the whole output, int32 [T]."""
    return np.frombuffer(capture.output_token_ids, "<i4").astype(np.int32)


def candidates(capture: Capture) -> Candidates:
    """Returns the candidates [T, top_k + 1] of a capture that was decoded, log-probabilities in nats."""
    ids = np.frombuffer(capture.candidate_ids, "<i4").astype(np.int32)
    logprobs = np.frombuffer(capture.candidate_logprobs, "<f4").astype(np.float64)
    width = capture.top_k + 1
    return Candidates(ids.reshape(-1, width), logprobs.reshape(-1, width))


def emitted_logprobs(capture: Capture) -> Floats:
    """Returns the log-probabilities of the output's tokens, float64 [T], nats, of a capture that was decoded."""
    return np.frombuffer(capture.emitted_logprobs, "<f4").astype(np.float64)


class UnreadableLogprobsError(Exception):
    """The JSON of the response's `logprobs` is malformed, or is not of the response's token ids."""


def decode_capture(capture: Capture) -> Capture:
    """Returns the capture with its candidates as arrays, and their JSON parsed if the response had them.

    Raises InvalidRecordError ("shape", "empty") if the lengths do not fit each other, or there is no token. Raises
    UnreadableLogprobsError.
    """
    tokens, rest = divmod(len(capture.output_token_ids), ID_BYTES)
    if rest or len(capture.prompt_token_ids) % ID_BYTES:
        raise InvalidRecordError("shape", f"capture {capture.request_id}: its token ids are cut off")
    if capture.logprobs:
        capture = _parsed(capture)
    row = ID_BYTES * tokens * max(capture.top_k + 1, 1)
    sizes = len(capture.candidate_ids), len(capture.candidate_logprobs), len(capture.emitted_logprobs)
    if sizes != (row, row, ID_BYTES * tokens):
        raise InvalidRecordError(
            "shape",
            f"capture {capture.request_id}: {sizes} bytes of ids and log-probabilities for {tokens} output tokens",
        )
    if not capture.prompt_token_ids or not tokens:
        raise InvalidRecordError("empty", f"capture {capture.request_id}: no prompt or no output")
    return capture


def _parsed(capture: Capture) -> Capture:
    try:
        rows = read_rows(FORMS[capture.route], capture.logprobs, output_ids(capture).tolist(), capture.top_k)
    except MALFORMED as error:
        raise UnreadableLogprobsError(f"logprobs of {capture.request_id}: {error}") from error
    return msgspec.structs.replace(
        capture,
        candidate_ids=rows.ids.astype("<i4").tobytes(),
        candidate_logprobs=rows.logprobs.astype("<f4").tobytes(),
        emitted_logprobs=rows.emitted.astype("<f4").tobytes(),
        logprobs=[],
    )
