"""First tokens of answers of any server with the OpenAI API: takes a set of them, and judges a replay.

What is compared, and how, is in `hemostat_calibration.canary_endpoint`. Each request has a seed of its own, so that a
cache that looks at the whole request does not answer.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from hemostat.reference.protocol import FailureReason, ReferenceFailure
from hemostat.reference.server import Refused, VllmServer
from hemostat_calibration.canary_endpoint import (
    PASSES,
    EndpointSet,
    EndpointVerdict,
    FirstToken,
    is_suspicious,
    judge_endpoint,
    take_endpoint,
)

LISTED = (20, 5)
"""The numbers of tokens whose log-probabilities are asked for; the next one if a server refuses."""
PAUSES = (2.0, 8.0, 30.0)
"""The pauses after answers that say that the server is busy, seconds."""
OTHER_FORM = {400, 404, 405, 422, 501}
"""The statuses by which a server refuses the form of a request."""


class _Top(msgspec.Struct, frozen=True):
    token: str
    logprob: float


class _Token(msgspec.Struct, frozen=True):
    token: str
    top_logprobs: list[_Top] = []


class _Logprobs(msgspec.Struct, frozen=True):
    """In the form of chat, content; in the form of completions, the other two."""

    content: list[_Token] | None = None
    tokens: list[str] | None = None
    top_logprobs: list[dict[str, float]] | None = None


class _Choice(msgspec.Struct, frozen=True):
    logprobs: _Logprobs | None = None


class _Answer(msgspec.Struct, frozen=True):
    choices: list[_Choice]
    id: str = ""


class EndpointClient:
    """Asks one model of a server. Raises ReferenceFailure, whose text is one line, if it cannot be asked.

    progress: called after each answer, see `hemostat.canaries.client.Progress`.
    """

    def __init__(self, server: VllmServer, model: str, progress: Callable[[str, int, int], None]) -> None:
        self._server = server
        self._model = model
        self._progress = progress
        self._length_field = "max_tokens"

    async def take(self, prompts: Sequence[str]) -> EndpointSet:
        """Raises InvalidArgumentError if an answer lists too few tokens."""
        chat, listed = await self._form(prompts[0])
        passes = await self._passes(prompts, PASSES, chat=chat, listed=listed)
        return take_endpoint(tuple(prompts), passes, self._model, listed=listed, chat=chat, at=time.time())

    async def judge(self, taken: EndpointSet, tolerance: float) -> EndpointVerdict:
        """Replays the set: twice, and PASSES times more if that shows anything."""
        passes = await self._passes(taken.prompts, 2, chat=taken.chat, listed=taken.listed)
        if is_suspicious(taken, passes, tolerance):
            passes += await self._passes(taken.prompts, PASSES, chat=taken.chat, listed=taken.listed)
        return judge_endpoint(taken, passes, tolerance)

    async def _passes(self, prompts: Sequence[str], count: int, *, chat: bool, listed: int) -> list[list[FirstToken]]:
        """Asks all prompts, one after the other, so many times."""
        passes: list[list[FirstToken]] = []
        for number in range(count):
            answers = []
            for prompt in prompts:
                answers.append(await self._ask(prompt, chat=chat, listed=listed))
                self._progress("first tokens", number * len(prompts) + len(answers), count * len(prompts))
            passes.append(answers)
        return passes

    async def _form(self, prompt: str) -> tuple[bool, int]:
        """Returns the form that the server answers: messages or a completion, and the number of listed tokens."""
        refusal: ReferenceFailure | None = None
        for chat in (True, False):
            for listed in LISTED:
                try:
                    await self._ask(prompt, chat=chat, listed=listed)
                except ReferenceFailure as failure:
                    if failure.reason is not FailureReason.SHORT_ANSWER and not _refuses_form(failure):
                        raise
                    refusal = refusal or failure
                else:
                    return chat, listed
        assert refusal is not None
        raise refusal

    async def _ask(self, prompt: str, *, chat: bool, listed: int) -> FirstToken:
        path = "/v1/chat/completions" if chat else "/v1/completions"
        body: dict[str, Any] = {
            "model": self._model,
            "temperature": 1.0,
            "top_p": 1.0,
            "seed": secrets.randbelow(1 << 31),
            **({"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}),
            **({"logprobs": True, "top_logprobs": listed} if chat else {"logprobs": listed}),
        }
        answer = await self._post(path, body)
        logprobs = answer.choices[0].logprobs if answer.choices else None
        if logprobs is not None and logprobs.content:
            first = logprobs.content[0]
            return FirstToken(first.token, _by_token(first.top_logprobs), answer.id)
        if logprobs is not None and logprobs.tokens and logprobs.top_logprobs:
            return FirstToken(logprobs.tokens[0], logprobs.top_logprobs[0], answer.id)
        raise ReferenceFailure(
            FailureReason.SHORT_ANSWER,
            f"{self._server.url} sends no log-probabilities with the answers of {self._model}",
        )

    async def _post(self, path: str, body: dict[str, Any]) -> _Answer:
        """Sends a request again after a pause if the server is busy, and with the newer name of the answer's length if
        it asks for that."""
        pauses = iter(PAUSES)
        while True:
            try:
                return await self._server.post(path, body | {self._length_field: 1}, _Answer)
            except Refused as refused:
                if self._length_field == "max_tokens" and "max_completion_tokens" in refused.detail:
                    self._length_field = "max_completion_tokens"
                    continue
                pause = next(pauses, None)
                if refused.reason is not FailureReason.BUSY or pause is None:
                    raise
                await asyncio.sleep(pause)


def _refuses_form(failure: ReferenceFailure) -> bool:
    return isinstance(failure, Refused) and failure.status in OTHER_FORM


def _by_token(top: Sequence[_Top]) -> dict[str, float]:
    """Returns the log-probabilities by token. The most likely one counts where several tokens have the same text."""
    result: dict[str, float] = {}
    for each in top:
        result[each.token] = max(each.logprob, result.get(each.token, each.logprob))
    return result
