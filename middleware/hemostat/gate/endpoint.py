"""One vLLM server as the gate asks it. Nothing of Hemostat is needed there."""

from __future__ import annotations

import numpy as np

from hemostat.gate.asked import Asked, Prompt
from hemostat.gate.outcomes import Served
from hemostat.gate.served import served
from hemostat.reference.identity import Identity, identity_of
from hemostat.reference.own_answers import TOP_K, Answer, own_answer
from hemostat.reference.protocol import ScoreRequest
from hemostat.reference.server import ModelCard, VllmServer
from hemostat.reference.vllm import top_ids
from hemostat_calibration.arrays import Ids
from hemostat_calibration.gate.distance import Listed

WHOLE = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
"""The parameters with which a token is sampled from the whole distribution."""


class Endpoint:
    """Every method raises ReferenceFailure."""

    def __init__(self, server: VllmServer, card: ModelCard) -> None:
        self._server = server
        self._card = card

    @classmethod
    async def of(cls, server: VllmServer, name: str | None) -> Endpoint:
        """Returns the endpoint of a served model. name: None: the first base model."""
        return cls(server, await server.model(name))

    async def identity(self) -> Identity:
        return await identity_of(self._server, self._card)

    async def prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        """Returns the ids of the prompt under the server's tokenizer and chat template."""
        if prompt.prompt_token_ids:
            return prompt.prompt_token_ids
        if prompt.messages:
            return tuple(await self._server.render(self._card.id, prompt.chat, prompt.tools))
        return tuple(await self._server.tokenize(self._card.id, prompt.prompt, special=True))

    async def answer(self, ids: tuple[int, ...], max_tokens: int, seed: int) -> Answer:
        """Returns an answer that is sampled from the whole distribution, at temperature 1."""
        return await own_answer(self._server, self._card.id, ids, max_tokens, {**WHOLE, "seed": seed})

    async def served(self, asked: Asked, seed: int, *, timed: bool) -> Served:
        """Returns the answer that a client gets who names no sampling parameter."""
        return await served(self._server, self._card.id, asked, seed, timed=timed)

    async def scores(self, prompt: tuple[int, ...], output: Ids) -> Listed:
        """Returns the model's values of given tokens after the prompt."""
        request = ScoreRequest(np.array(prompt, np.int32), output, np.zeros((len(output), 0), np.int32))
        scores = await top_ids(self._server, self._card.id, request, TOP_K)
        return Listed(scores.top.ids, scores.top.logprobs, scores.emitted)
