"""Finds out what a vLLM server offers as a reference: hidden states (a pooling server) or lists of top ids (a
generating one).
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hemostat.checkpoints.output_embedding import floats
from hemostat.reference.protocol import FailureReason, Offer, ReferenceFailure
from hemostat.reference.server import NO_SUCH_ROUTE, Refused, VllmServer

POOLING_ARGUMENTS = (
    *("--runner", "pooling", "--convert", "embed", "--pooler-config"),
    '{"tok_pooling_type":"ALL","task":"token_embed","use_activation":false}',
)
"""The arguments with which vLLM returns the final hidden states."""
POOLING_FLAGS = shlex.join(POOLING_ARGUMENTS)
MAX_WIDTH = 65_536
"""The largest d that is looked for."""
STATE_BYTES = 2
"""The size of one bfloat16."""
UNIT_NORM = 0.02
"""The difference of a norm from 1, up to which all of them mean that the server normalizes."""

States = npt.NDArray[np.uint16]
"""The bits of bfloat16 hidden states, [n, d]."""


@dataclass(frozen=True, slots=True)
class Found:
    """The offer of a server. states: of the ids that were sent, [n, d]; None unless the offer is `STATES`. detail: why
    it offers no hidden states.
    """

    offer: Offer
    states: States | None = None
    detail: str = ""


async def find_offer(server: VllmServer, model: str, ids: Sequence[int]) -> Found:
    """Returns what the server offers. Raises ReferenceFailure if it cannot be asked now, or is a pooling server that
    does not return final hidden states.

    ids: at least two, with which the server is asked.
    """
    try:
        data = await server.post_for_bytes("/pooling", _body(model, [ids]), limit=len(ids) * MAX_WIDTH * STATE_BYTES)
    except Refused as refused:
        if refused.status in NO_SUCH_ROUTE or refused.reason is FailureReason.REFUSED:
            if await generates(server, model):
                return Found(Offer.LISTS, detail=f"{server.url} generates, so it returns no hidden states")
            raise ReferenceFailure(
                FailureReason.REFUSED,
                f"{server.url} neither generates nor returns hidden states ({refused.detail[:200]}); start it with "
                f"{POOLING_FLAGS}",
            ) from None
        raise
    states = _states(data, len(ids), None, server.url)
    lengths = np.linalg.norm(floats(states).astype(np.float64), axis=1)
    if np.abs(lengths - 1.0).max() < UNIT_NORM:
        raise ReferenceFailure(
            FailureReason.BAD_ANSWER, f"{server.url} normalizes its hidden states; start it with {POOLING_FLAGS}"
        )
    return Found(Offer.STATES, states)


async def hidden_states(
    server: VllmServer, model: str, ids: Sequence[int], width: int, *, first: int = 0, reshaped: bool = False
) -> States:
    """Returns the final hidden states after ids[first], ids[first + 1], …: [n - first, width]. Raises ReferenceFailure.

    No more than n · width · 2 bytes are read, and those from `first` on are kept. reshaped: in a batch with another,
    shorter prompt, so that the server computes in another shape.
    """
    prompts = [ids, ids[: max(1, len(ids) // 2)]] if reshaped else [ids]
    row = width * STATE_BYTES
    length = sum(len(prompt) for prompt in prompts) * row
    data = await server.post_for_bytes("/pooling", _body(model, prompts), limit=length, skip=first * row)
    if len(data) != length - first * row:
        raise ReferenceFailure(
            FailureReason.SHORT_ANSWER,
            f"{server.url} sent {len(data) + first * row} bytes of hidden states in place of {length}",
        )
    return _states(data[: (len(ids) - first) * row], len(ids) - first, width, server.url)


def _body(model: str, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
    return {
        "model": model,
        "input": prompts[0] if len(prompts) == 1 else list(prompts),
        "task": "token_embed",
        "add_special_tokens": False,
        "encoding_format": "bytes_only",
        "embed_dtype": "bfloat16",
        "endianness": "little",
    }


def _states(data: bytes, positions: int, width: int | None, url: str) -> States:
    """Returns the hidden states in an answer. width: None if it is not known yet."""
    row, rest = divmod(len(data), positions)
    if rest or row % STATE_BYTES or row < STATE_BYTES or (width is not None and row != width * STATE_BYTES):
        raise ReferenceFailure(
            FailureReason.SHORT_ANSWER,
            f"{url} sent {len(data)} bytes for {positions} positions: no hidden state of each; start it with "
            f"{POOLING_FLAGS}",
        )
    states: States = np.frombuffer(data, "<u2").astype(np.uint16).reshape(positions, row // STATE_BYTES)
    if (states & 0x7F80 == 0x7F80).any():
        raise ReferenceFailure(FailureReason.BAD_ANSWER, f"{url} sent hidden states with NaN or an infinity")
    return states


async def generates(server: VllmServer, model: str) -> bool:
    """Returns True if the model answers completions, so that it gives lists of top ids. Raises ReferenceFailure if the
    server cannot be asked now.
    """
    body = {"model": model, "prompt": [1, 2], "max_tokens": 1, "temperature": 0.0}
    try:
        await server.post("/v1/completions", body, dict[str, Any])
    except Refused as refused:
        if refused.status in NO_SUCH_ROUTE or refused.reason is FailureReason.REFUSED:
            return False
        raise
    return True
