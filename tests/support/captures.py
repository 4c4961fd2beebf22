"""Captures as relays send them, and the reference that they are scored on."""

from __future__ import annotations

import msgspec
import numpy as np

from hemostat.ipc.messages import Capture
from hemostat.reference.protocol import ReferenceInfo

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
