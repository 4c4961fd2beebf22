"""The canaries' texts as clients send them: as messages, without a temperature.

What is compared, and how, is in `hemostat_calibration.canary_texts`.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np

from hemostat.reference.protocol import FailureReason, ReferenceFailure
from hemostat.reference.server import Refused, VllmServer
from hemostat_calibration.arrays import Ids
from hemostat_calibration.canary_texts import TextBaseline, TextComparison, TextReplay, excess

FREE_TEXTS = 8
"""The number of texts that are answered freely. They are the shortest ones."""
FREE_TOKENS = 32
"""The number of tokens of a free answer."""
BASELINE_ROUNDS = 4
"""The number of answers to each of these texts in the baseline."""
TOP = 20
"""The number of most likely tokens of which log-probabilities are asked for, vLLM's default limit."""
_DATE = re.compile(
    r"\d+|\b(?:jan|feb|mar|apr|may|june?|july?|aug|sept?|oct|nov|dec|mon|tues?|wed|thu|fri|sat|sun)"
    r"(?:uary|ruary|ch|il|ust|tember|ober|ember|day|nesday|rsday|urday)?\b",
    re.IGNORECASE,
)
"""The digits and names of which dates consist."""


class _Top(msgspec.Struct, frozen=True):
    logprob: float


class _Token(msgspec.Struct, frozen=True):
    logprob: float
    top_logprobs: list[_Top] = []


class _Logprobs(msgspec.Struct, frozen=True):
    """In the form of chat, content; in the form of completions, the other two."""

    content: list[_Token] | None = None
    token_logprobs: list[float] | None = None
    top_logprobs: list[dict[str, float]] | None = None


class _Choice(msgspec.Struct, frozen=True):
    logprobs: _Logprobs | None = None
    prompt_token_ids: list[int] | None = None


class _Answer(msgspec.Struct, frozen=True):
    choices: list[_Choice]
    prompt_token_ids: list[int] | None = None


class _Text(msgspec.Struct, frozen=True):
    prompt: str


def cost(baseline: TextBaseline) -> int:
    """Returns the largest number of tokens of one replay. Texts that are only tokenized cost the engine nothing."""
    return sum(len(baseline.taken.prompts[n]) + FREE_TOKENS for n in _free(baseline.texts))


def _free(texts: Sequence[str]) -> list[int]:
    """Returns the numbers of the texts that are answered."""
    return sorted(range(len(texts)), key=lambda n: len(texts[n]))[:FREE_TEXTS]


class TextClient:
    """Sends texts to one model that a server serves. Raises ReferenceFailure if it cannot be asked.

    gate: awaited before each request of answers: returns when it may be sent.
    """

    def __init__(self, server: VllmServer, model: str, gate: Callable[[], Awaitable[None]]) -> None:
        self._server = server
        self._model = model
        self._gate = gate

    async def take(self, texts: Sequence[str]) -> TextBaseline:
        prompts = tuple([await self._ids(text) for text in texts])
        rounds = [await self._free_answers(texts) for _ in range(BASELINE_ROUNDS)]
        values = np.array([value for _, each in rounds for value in each])
        return TextBaseline(tuple(texts), TextReplay(prompts, values))

    async def replay(self, baseline: TextBaseline) -> TextReplay:
        """Returns what the server makes of the texts now. Ids that differ by a date alone, which a chat template may
        write into each prompt, are returned as they were."""
        prompts = [await self._ids(text) for text in baseline.texts]
        answered, values = await self._free_answers(baseline.texts)
        for n, ids in answered.items():
            prompts[n] = ids
        for n, then in enumerate(baseline.taken.prompts):
            if not np.array_equal(prompts[n], then) and await self._differ_by_a_date(then, prompts[n]):
                prompts[n] = then
        return TextReplay(tuple(prompts), np.array(values))

    async def compare(self, baseline: TextBaseline) -> tuple[TextComparison, bool]:
        """Returns the comparison of a replay with the baseline, and if the server has changed: a second replay has to
        show the same as the first."""
        first = baseline.compare(await self.replay(baseline))
        if not first.changed:
            return first, False
        second = baseline.compare(await self.replay(baseline))
        return second, second.confirms(first)

    async def _ids(self, text: str) -> Ids:
        """Returns the token ids of a text as a message; as it is, if the model has no chat template."""
        try:
            ids = await self._server.render(self._model, [{"role": "user", "content": text}])
        except ReferenceFailure as failure:
            if failure.reason is not FailureReason.NO_CHAT_TEMPLATE:
                raise
            ids = await self._server.tokenize(self._model, text, special=True)
        return np.array(ids, np.int32)

    async def _free_answers(self, texts: Sequence[str]) -> tuple[dict[int, Ids], list[float]]:
        """Returns the prompts' ids by the texts' numbers, and the excess of the answers' tokens. Both are empty if the
        server returns no log-probabilities."""
        prompts, values = {}, []
        for n in _free(texts):
            try:
                answer = await self._answer(texts[n])
            except Refused as refused:
                if "logprobs" not in refused.detail:
                    raise
                break
            choice = answer.choices[0] if answer.choices else _Choice()
            ids = answer.prompt_token_ids or choice.prompt_token_ids
            if ids:
                prompts[n] = np.array(ids, np.int32)
            values += _excess(choice.logprobs)
        return prompts, values

    async def _answer(self, text: str) -> _Answer:
        body = {
            "model": self._model,
            "max_tokens": FREE_TOKENS,
            "ignore_eos": True,
            "return_token_ids": True,
            "cache_salt": f"hemostat-canary-{secrets.token_hex(8)}",
        }
        await self._gate()
        chat = body | {"messages": [{"role": "user", "content": text}], "logprobs": True, "top_logprobs": TOP}
        try:
            return await self._server.post("/v1/chat/completions", chat, _Answer)
        except Refused as refused:
            if "chat template" not in refused.detail.lower():
                raise
        plain = body | {"prompt": text, "logprobs": TOP, "return_tokens_as_token_ids": True}
        return await self._server.post("/v1/completions", plain, _Answer)

    async def _differ_by_a_date(self, then: Ids, now: Ids) -> bool:
        texts = [await self._text(ids) for ids in (then, now)]
        return texts[0] != texts[1] and _DATE.sub("#", texts[0]) == _DATE.sub("#", texts[1])

    async def _text(self, ids: Ids) -> str:
        body = {"model": self._model, "tokens": ids.tolist()}
        return (await self._server.post("/detokenize", body, _Text)).prompt


def _excess(logprobs: _Logprobs | None) -> list[float]:
    if logprobs is None:
        return []
    if logprobs.content is not None:
        rows = [(token.logprob, [top.logprob for top in token.top_logprobs]) for token in logprobs.content]
    else:
        top = [list(row.values()) for row in logprobs.top_logprobs or []]
        rows = list(zip(logprobs.token_logprobs or [], top, strict=False))
    return [excess(emitted, np.array(sorted(top)[-TOP:])) for emitted, top in rows if top]


@dataclass(slots=True)
class TextReading:
    """The judgement of the replays of an engine's texts."""

    due: float = 0.0
    """The time of the next replay, monotonic seconds."""
    found: TextComparison | None = None
    """The comparison of the last replay."""
    first: TextComparison | None = None
    """The first comparison of those in a row that differ in the same way."""
    since: float | None = None
    """The statement: since when, Unix time."""

    def judge(self, comparison: TextComparison, now: float) -> None:
        """Judges one comparison: two in a row that differ in the same way are a statement. now: Unix time."""
        self.found = comparison
        if not comparison.changed:
            self.first, self.since = None, None
        elif self.first is None or not comparison.confirms(self.first):
            self.first = comparison
        elif self.since is None:
            self.since = now

    @property
    def suspected(self) -> bool:
        """True if a replay differs and nothing is stated yet."""
        return self.first is not None and self.since is None

    def to_store(self) -> TextReading:
        return replace(self, due=0.0)
