"""Captures as relays send them, and the reference that they are scored on."""

from __future__ import annotations

import msgspec
import numpy as np

from hemostat.engines.taps import TapResult
from hemostat.ipc.messages import Capture
from hemostat.reference.protocol import ReferenceInfo, ReferenceScores, ScoreRequest
from hemostat.scoring.capture_arrays import candidates, decode_capture, output_ids, prompt_ids
from hemostat.scoring.record_builder import build_record
from hemostat_calibration.arrays import Ids
from hemostat_calibration.reasoning import Markers
from hemostat_calibration.records import Candidates, TokenRecord

V, K = 30, 4
"""Size of the reference's vocabulary; ids that the capture lists at each position, beside the emitted one."""
INFO = ReferenceInfo("ref", "digest", "float32", V, True)


def capture(request_id: str = "r", tokens: int = 3, **more: object) -> Capture:
    """Can be scored: the ids 0, 1, 2, … are less and less likely at each of `tokens` positions, and 0 is emitted."""
    ids = np.tile(np.arange(K + 1, dtype="<i4"), (tokens, 1))
    ids[:, K] = -1
    logprobs = np.tile(np.log([0.5, 0.2, 0.1, 0.05, 1e-300]).astype("<f4"), (tokens, 1))
    logprobs[:, K] = -np.inf
    made = Capture(
        request_id=request_id,
        route="/v1/completions",
        model="m",
        label="gold",
        arm="none",
        requested=None,
        nonce="",
        stream=False,
        prompt_token_ids=np.arange(5, dtype="<i4").tobytes(),
        output_token_ids=np.zeros(tokens, "<i4").tobytes(),
        top_k=K,
        candidate_ids=ids.tobytes(),
        candidate_logprobs=logprobs.tobytes(),
        emitted_logprobs=logprobs[:, 0].tobytes(),
        temperature=1.0,
        top_p=1.0,
        sampling_top_k=0,
        min_p=0.0,
        finish_reason="stop",
        captured_at=0.0,
    )
    return msgspec.structs.replace(made, **more)


def candidates_of(made: Capture) -> Candidates:
    """The candidates of a capture, whichever way they came."""
    return candidates(decode_capture(made))


def flat_scores(ids: Ids) -> ReferenceScores:
    """Returns the scores of these ids [T, K] by a reference to which every id is equally likely."""
    tokens, flat = len(ids), -np.log(V)
    top = Candidates(np.tile(np.arange(3, dtype=np.int32), (tokens, 1)), np.full((tokens, 3), flat))
    at = np.where(ids >= 0, flat, np.nan)
    return ReferenceScores(at=at, top=top, emitted=np.full(tokens, flat), entropy=np.full(tokens, -flat))


def record_of(
    made: Capture,
    tap: TapResult | None = None,
    *,
    max_scored: int | None = None,
    scores: ReferenceScores | None = None,
    markers: Markers | None = None,
) -> TokenRecord:
    """The record of a capture, by default on a reference to which every id is equally likely."""
    made = decode_capture(made)
    given, prompt, output = candidates(made), prompt_ids(made), output_ids(made)
    first = 0 if max_scored is None else max(0, len(output) - max_scored)
    given = Candidates(given.ids[first:], given.logprobs[first:])
    request = ScoreRequest(np.concatenate([prompt, output[:first]]), output[first:], given.ids)
    return build_record(made, given, request, scores or flat_scores(given.ids), INFO, tap, markers=markers)


def sized_capture(request_id: str = "r", size: int = 4, captured_at: float = 0.0) -> Capture:
    """Cannot be scored: for whoever only stores or sends it. size: bytes of the prompt's ids."""
    return Capture(
        request_id=request_id,
        route="/v1/completions",
        model="m",
        label="",
        arm="none",
        requested=None,
        nonce="",
        stream=False,
        prompt_token_ids=b"\0" * size,
        output_token_ids=b"",
        top_k=1,
        candidate_ids=b"",
        candidate_logprobs=b"",
        emitted_logprobs=b"",
        temperature=1.0,
        top_p=1.0,
        sampling_top_k=0,
        min_p=0.0,
        finish_reason="stop",
        captured_at=captured_at,
    )
