"""The answers of a vLLM server's model with the model's own list of likely ids at each token, as a gate asks for
them."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from hemostat.openai.json_splice import MALFORMED
from hemostat.openai.logprobs.rows import Rows, read_rows
from hemostat.openai.routes import Form
from hemostat.reference.protocol import FailureReason, ReferenceFailure, ReferenceScores
from hemostat.reference.server import VllmServer
from hemostat.reference.vllm import MAX_ENTRY_BYTES, MAX_LOGPROB
from hemostat_calibration.arrays import Ids
from hemostat_calibration.gate.distance import Listed

TOP_K = 20
"""The number of ids of each list, which every vLLM server allows."""


class _Choice(msgspec.Struct, frozen=True):
    token_ids: list[int] | None = None
    logprobs: msgspec.Raw = msgspec.Raw(b"null")
    finish_reason: str | None = None


class _Completion(msgspec.Struct, frozen=True):
    choices: list[_Choice]


@dataclass(frozen=True, slots=True)
class Answer:
    """A model's own answer. listed: its values of these tokens while it generated them. cut: True if the answer ends
    at `max_tokens`."""

    ids: Ids
    listed: Listed
    cut: bool = False


async def own_answer(
    server: VllmServer, model: str, ids: tuple[int, ...], max_tokens: int, parameters: Mapping[str, Any]
) -> Answer:
    """Returns an answer to a prompt. max_tokens: the largest number of its tokens. parameters: further members of the
    request. Raises ReferenceFailure."""
    body = {
        **parameters,
        "model": model,
        "prompt": list(ids),
        "max_tokens": max_tokens,
        "logprobs": TOP_K,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "cache_salt": f"hemostat-gate-{secrets.token_hex(8)}",
    }
    limit = (max_tokens + 1) * (TOP_K + 2) * MAX_ENTRY_BYTES + 1024 * 1024
    completion = await server.post("/v1/completions", body, _Completion, limit=limit)
    choice = completion.choices[0] if completion.choices else _Choice()
    output = choice.token_ids
    if output is None:  # no answer of a model: taken for one without tokens, equal answers would pass unseen
        text = f"{server.url} sent no token_ids; ask vLLM itself, or a router that passes return_token_ids on"
        raise ReferenceFailure(FailureReason.BAD_ANSWER, text)
    cut = choice.finish_reason == "length"
    if not output:
        return Answer(np.zeros(0, np.int32), _nothing(), cut)
    try:
        rows = read_rows(Form.COMPLETIONS, [bytes(choice.logprobs)], output, TOP_K)
    except MALFORMED as error:
        text = f"{server.url} sent logprobs that do not fit the answer: {error}"
        raise ReferenceFailure(FailureReason.BAD_ANSWER, text) from error
    if not _are_logprobs(rows):
        text = f"{server.url} returns no log-probabilities; start it with --logprobs-mode raw_logprobs"
        raise ReferenceFailure(FailureReason.LOGPROBS_MODE, text)
    # The last column is the emitted id where it is none of the likeliest.
    listed = Listed(rows.ids[:, :TOP_K], rows.logprobs[:, :TOP_K].astype(float), rows.emitted.astype(float))
    return Answer(np.array(output, np.int32), listed, cut)


def listed_by(scores: ReferenceScores, ids: Ids) -> Listed:
    """Returns a reference's values as a list that does not depend on which token was emitted. ids: int32 [T, K], where
    the values were asked; a reference that knows only its own likeliest ids has the emitted one among them in any case.
    """
    if scores.entropy is None:
        return Listed(scores.top.ids, scores.top.logprobs, scores.emitted)
    known = ~np.isnan(scores.at)
    return Listed(np.where(known, ids, -1), np.where(known, scores.at, -np.inf), scores.emitted)


def _are_logprobs(rows: Rows) -> bool:
    """Returns True if all values can be log-probabilities. A token that was sampled has a finite one."""
    return bool(np.isfinite(rows.emitted).all() and (rows.logprobs <= MAX_LOGPROB).all())


def _nothing() -> Listed:
    return Listed(np.zeros((0, TOP_K), np.int32), np.zeros((0, TOP_K)), np.zeros(0))
