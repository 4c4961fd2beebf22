"""The candidate's server: whether it answers, and whether it is the same as before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from hemostat.reference.identity import Identity, identity_of
from hemostat.reference.match import MAX_SAME_NATS, PROBE_TEXT
from hemostat.reference.own_answers import Answer, own_answer
from hemostat.reference.protocol import FailureReason, ReferenceFailure, ScoreRequest
from hemostat.reference.server import ModelCard, VllmServer
from hemostat.reference.vllm import top_ids
from hemostat_calibration.arrays import Ids
from hemostat_calibration.gate.distance import Listed

CHAT = [{"role": "user", "content": "Which colour has the sky?"}]


class Candidate:
    """A served model at an address, `URL[#NAME]`. Every method raises ReferenceFailure, unless it says more.

    server: a connection to the address. name: the served model; None: the first base model.
    """

    def __init__(self, server: VllmServer, name: str | None) -> None:
        self.server = server
        self._name = name
        self._card: ModelCard | None = None

    @property
    def longest(self) -> int | None:
        """The largest number of tokens of a prompt and its answer; None if it is not known."""
        return None if self._card is None else self._card.max_model_len

    async def identity(self) -> Identity:
        """Returns the identity as it is now: the server may have been started with another model."""
        card = await self.server.model(self._name)
        identity = await identity_of(self.server, card)
        self._card = card
        return identity

    async def other_tokens(self, stable: VllmServer, model: str) -> str:
        """Returns how the candidate's tokens of fixed texts differ from the ones that the model that serves has; "" if
        they do not. model: the served name there."""
        if await self._tokenize() != await stable.tokenize(model, PROBE_TEXT):
            return "a fixed text has other token ids for the candidate: it has another tokenizer"
        ours, theirs = await _rendered(stable, model), await _rendered(self.server, self._started().id)
        if ours != theirs:
            return "a fixed chat has other token ids for the candidate: it has another chat template"
        return ""

    async def scores(self, prompt: Ids, output: Ids, ids: Ids) -> Listed:
        """Returns the values of given tokens after the prompt, in lists as long as the rows of `ids`, [T, K]."""
        scores = await top_ids(self.server, self._started().id, ScoreRequest(prompt, output, ids), ids.shape[1])
        return Listed(scores.top.ids, scores.top.logprobs, scores.emitted)

    async def answer(self, prompt: Ids, max_tokens: int, parameters: Mapping[str, Any]) -> Answer:
        return await own_answer(
            self.server, self._started().id, tuple(int(token) for token in prompt), max_tokens, parameters
        )

    async def _tokenize(self) -> list[int]:
        return await self.server.tokenize(self._started().id, PROBE_TEXT)

    def _started(self) -> ModelCard:
        if self._card is None:
            raise ReferenceFailure(FailureReason.DOWN, "the candidate has not answered yet")
        return self._card

    async def close(self) -> None:
        await self.server.close()


async def _rendered(server: VllmServer, model: str) -> list[int] | None:
    """Returns the token ids of a fixed chat; None if the model has no chat template."""
    try:
        return await server.render(model, CHAT)
    except ReferenceFailure as failure:
        if failure.reason is FailureReason.NO_CHAT_TEMPLATE:
            return None
        raise


def changes(stored: str, now: Identity) -> list[str]:
    """Returns what is different about the candidate than when its evidence began, in words."""
    before = msgspec.json.decode(stored, type=Identity)
    return before.differences(now, MAX_SAME_NATS)


def likeliest(listed: Listed, k: int) -> Listed:
    """Returns the k likeliest ids of each list: lists of different lengths leave different remainders."""
    if listed.ids.shape[1] <= k:
        return listed
    order = np.argsort(-np.where(listed.ids >= 0, listed.logprobs, -np.inf), axis=1, kind="stable")[:, :k]
    return Listed(
        np.take_along_axis(listed.ids, order, axis=1),
        np.take_along_axis(listed.logprobs, order, axis=1),
        listed.emitted,
    )
