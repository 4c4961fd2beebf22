"""The load of one control process: a real one in a process of its own, and relays that send what relays would.

The reference is replaced by stored scores, which cost nothing: what is measured is everything else that the control
process does. Relays are connections with the real messages and framing; no client and no engine is behind them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hemostat.ipc.messages import Capture
from hemostat.reference.protocol import ReferenceInfo, ReferenceScores
from hemostat_calibration.records import Candidates

MODEL, KIND = "m", "chat text sampled"
PROMPT, TOKENS = 200, 128
"""Of each capture."""
TOP_K, TOP_REFERENCE = 20, 64
VOCABULARY = 151_936
INFO = ReferenceInfo("stored", "digest", "float32", VOCABULARY, full_vocabulary=True)


@dataclass(frozen=True)
class Answers:
    """One capture, whose prompt is replaced in each that is sent, and the reference's scores of it."""

    capture: Capture
    scores: ReferenceScores


def _logprobs(rng: np.random.Generator, rows: int, ids: int) -> np.ndarray:
    """Of the most likely ids, the most likely first; their mass is below 1."""
    return np.log(0.98 * -np.sort(-rng.dirichlet(np.full(ids, 0.1), rows), axis=1) + 1e-9)


def answers(seed: int = 0) -> Answers:
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.choice(VOCABULARY, TOP_REFERENCE, replace=False) for _ in range(TOKENS)]).astype("<i4")
    reference = _logprobs(rng, TOKENS, TOP_REFERENCE)
    compressed = -np.sort(-(reference[:, :TOP_K] + rng.normal(0.0, 0.05, (TOKENS, TOP_K)) - 0.1), axis=1)
    listed = np.concatenate([ids[:, :TOP_K], np.full((TOKENS, 1), -1, "<i4")], axis=1)
    padded = np.concatenate([compressed, np.full((TOKENS, 1), -np.inf)], axis=1).astype("<f4")
    at = np.concatenate([reference[:, :TOP_K], np.full((TOKENS, 1), np.nan)], axis=1)
    entropy = -(np.exp(reference) * reference).sum(axis=1) + 0.2
    scores = ReferenceScores(at, Candidates(ids.astype(np.int32), reference), reference[:, 0], entropy)
    capture = Capture(
        request_id="r",
        route="/v1/chat/completions",
        model=MODEL,
        label="",
        arm="none",
        requested=None,
        nonce="",
        stream=True,
        prompt_token_ids=b"",
        output_token_ids=np.ascontiguousarray(ids[:, 0]).tobytes(),
        top_k=TOP_K,
        candidate_ids=listed.tobytes(),
        candidate_logprobs=padded.tobytes(),
        emitted_logprobs=np.ascontiguousarray(padded[:, 0]).tobytes(),
        temperature=1.0,
        top_p=1.0,
        sampling_top_k=0,
        min_p=0.0,
        finish_reason="stop",
        captured_at=0.0,
        kind=KIND,
    )
    return Answers(capture, scores)
