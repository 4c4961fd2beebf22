"""Log-probabilities as vLLM's two routes write them."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import numpy as np
from tests.support.fake_vllm.model import FakeModel, Step, token_bytes


@cache
def _decoded(token: int) -> str:
    return token_bytes(token).decode(errors="replace")


def _row(step: Step, top_k: int) -> dict[int, float]:
    """The emitted token first, then the most likely ones, as the engine hands them out."""
    best = np.argsort(-step.logprobs, kind="stable")[:top_k]
    ids = [step.token, *best.tolist()]
    return dict(zip(ids, step.logprobs[ids].tolist(), strict=True))


def chat_logprobs(steps: list[Step], body: dict[str, Any]) -> dict[str, Any]:
    as_ids = body.get("return_tokens_as_token_ids")
    top_k = body.get("top_logprobs") or 0

    def entry(token: int, logprob: float) -> dict[str, Any]:
        name = f"token_id:{token}" if as_ids else token_bytes(token).decode(errors="replace")
        return {"token": name, "logprob": logprob, "bytes": list(name.encode())}

    content = []
    for step in steps:
        row = _row(step, top_k)
        own = entry(step.token, row[step.token])
        own["bytes"] = list(token_bytes(step.token).decode(errors="replace").encode())
        own["top_logprobs"] = [entry(*item) for item in itertools.islice(row.items(), top_k)]
        content.append(own)
    return {"content": content}


def completion_logprobs(steps: list[Step], body: dict[str, Any], offset: int) -> dict[str, Any]:
    def name(token: int) -> str:
        as_ids = body.get("return_tokens_as_token_ids")
        return f"token_id:{token}" if as_ids else token_bytes(token).decode(errors="replace")

    tokens = [name(step.token) for step in steps]
    rows = [_row(step, body["logprobs"]) for step in steps]
    return {
        "text_offset": [offset + sum(map(len, tokens[:i])) for i in range(len(tokens))],
        "token_logprobs": [row[step.token] for row, step in zip(rows, steps, strict=True)],
        "tokens": tokens,
        "top_logprobs": [{name(token): value for token, value in row.items()} for row in rows],
    }


def prompt_logprobs(model: FakeModel, prompt: list[int], body: dict[str, Any]) -> list[dict[str, Any] | None]:
    rows: list[dict[str, Any] | None] = [None]
    top_k = body["prompt_logprobs"]
    for position in range(1, len(prompt)):
        logprobs = model.row_logprobs(prompt[:position], body)
        order = np.argsort(-logprobs, kind="stable")
        chosen = list(dict.fromkeys([prompt[position], *order[:top_k].tolist()]))
        values = logprobs[chosen]
        ranks = np.searchsorted(-logprobs[order], -values) + 1  # of equal ones, all have the first one's rank
        rows.append(
            {
                str(token): {"logprob": value, "rank": rank, "decoded_token": _decoded(token)}
                for token, value, rank in zip(chosen, values.tolist(), ranks.tolist(), strict=True)
            }
        )
    return rows
