"""Canaries at one vLLM server: takes a set of them, and replays it. With any vLLM; nothing of Hemostat is needed there.

A replay asks for `prompt_logprobs`, for which vLLM computes all tokens of a prompt, without its prefix cache.
Each request has a salt of its own all the same, so that what it leaves in the cache is used by nobody else.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace

import msgspec
import numpy as np

from hemostat.canaries.prompts import Prompts
from hemostat.canaries.variants import Sign, VariantClient
from hemostat.reference.protocol import FailureReason, ReferenceFailure
from hemostat.reference.server import Refused, VllmServer
from hemostat_calibration.arrays import Floats, Ids
from hemostat_calibration.canaries import (
    MAX_TOKENS,
    REPLAYS,
    Canary,
    CanarySet,
    Comparison,
    Condition,
    Origin,
    require_sequences,
)

ANSWER_TOKENS = 40
BESIDE = (3, 6, 12)
"""The numbers of sequences that are asked for at once in the baseline's replays, but for the first one: batches of
several shapes."""
TOKENIZER_TEXT = "Hemostat 1,024 ≤ x; größer 温度 température\n\tif (a != b) { return [0x1f]; } // 😀"
"""A text for which tokenizers differ in the token ids."""
PRIORITY = 1_000
"""The priority of canaries, later than clients' requests, whose default is 0. It has an effect if the engine schedules
by priority.
"""

Gate = Callable[[], Awaitable[None]]
"""A function that is awaited before each request, and returns when the request may be sent."""


class _Choice(msgspec.Struct, frozen=True):
    token_ids: list[int] | None = None


class _Completion(msgspec.Struct, frozen=True):
    choices: list[_Choice]


Progress = Callable[[str, int, int], None]
"""A function that is called after each part of the work with what the parts are, how many are done, and how many there
are.
"""


async def _at_once() -> None:
    """Returns at once: a gate that is open."""


def _silent(stage: str, done: int, total: int) -> None:
    """Reports no progress."""


class CanaryClient:
    """Takes and replays canaries with one model that a server serves. Every method raises ReferenceFailure, whose text
    is one line.

    weights: the fingerprint that the engine's plugin reports now. sign: see `VariantClient`.
    """

    def __init__(
        self,
        server: VllmServer,
        model: str,
        gate: Gate = _at_once,
        weights: Callable[[], str] = lambda: "",
        progress: Progress = _silent,
        sign: Sign = dict,
    ) -> None:
        self._sign = sign
        self._server = server
        self.model = model
        self._gate = gate
        self._weights = weights
        self._progress = progress
        self._scored, self._to_score = 0, 0
        self._priority: dict[str, int] = {"priority": PRIORITY}
        self.sent = 0
        """The number of tokens of all sequences that the server was asked to score."""

    @classmethod
    async def of(cls, server: VllmServer, model: str | None = None, progress: Progress = _silent) -> CanaryClient:
        """Returns a client for a model of the server. model: a served name; None: the first base model."""
        return cls(server, (await server.model(model)).id, progress=progress)

    async def origin(self, *, prompts: str = "", engine: str = "") -> Origin:
        card = await self._server.model(self.model)
        version, tokenizer = "", ""
        with suppress(ReferenceFailure):  # a router in front of vLLM may not have these routes
            version = await self._server.version()
            ids = await self._server.tokenize(self.model, TOKENIZER_TEXT)
            tokenizer = hashlib.sha256(_ids(ids).tobytes()).hexdigest()[:16]
        return Origin(
            model=self.model,
            root=card.root or "",
            version=version,
            max_model_len=card.max_model_len or 0,
            weights=self._weights(),
            tokenizer=tokenizer,
            engine=engine,
            prompts=prompts,
            at=time.time(),
        )

    async def take(self, prompts: Prompts, *, engine: str = "") -> CanarySet:
        """Makes the model write the answers and score them, and returns the set: about 35,000 tokens with the prompts
        of this package. Raises InvalidArgumentError if the prompts make no set.
        """
        origin = await self.origin(prompts=prompts.digest, engine=engine)
        texts = [await self._server.tokenize(self.model, prompt.prompt, special=True) for prompt in prompts.prompts]
        texts = cut_to_fit(texts, MAX_TOKENS - len(texts) * (ANSWER_TOKENS + 1), origin.max_model_len)
        # Whether the server scores at all, before it generates 50 answers.
        await self._score(Canary("", _ids(texts[0]), _ids(texts[0][-1:])))
        canaries = []
        for number, (prompt, text) in enumerate(zip(prompts.prompts, texts, strict=True)):
            answer = await self._answer(text, sampled=number % 2 == 1, seed=number)
            canaries.append(Canary(prompt.kind, _ids(text), _ids(answer)))
            self._progress("answers written", len(canaries), len(texts))
        require_sequences(canaries)
        taken = await self.baseline(canaries, origin)
        return replace(taken, cause=await self.variants().baseline(canaries, origin.max_model_len))

    def variants(self) -> VariantClient:
        return VariantClient(self._server, self.model, self._gate, self._progress, self._sign)

    async def baseline(self, canaries: Sequence[Canary], origin: Origin) -> CanarySet:
        """Returns the set of these sequences, replayed alone and together with each other. Raises REVISION if another
        model is served at the end than at the beginning.
        """
        before = await self.origin()
        self._expect(REPLAYS * len(canaries))
        replays = [await self.replay(canaries), *[await self._replay_beside(canaries, n) for n in BESIDE]]
        assert len(replays) == REPLAYS
        if changes := before.changes(await self.origin()):
            text = f"{self._server.url} was changed while the canaries were taken, and these are dropped"
            raise ReferenceFailure(FailureReason.REVISION, f"{text}: {'; '.join(changes)}")
        conditions = tuple(Condition(origin.at, together) for together in (1, *BESIDE))
        return CanarySet(tuple(canaries), np.stack(replays), origin, conditions=conditions)

    async def replay(self, canaries: Sequence[Canary]) -> Floats:
        """Returns the log-probabilities of all scored tokens, float64 [N], one sequence after the other."""
        return np.concatenate([await self._score(canary) for canary in canaries])

    async def compare(self, taken: CanarySet, tolerance: float) -> tuple[Comparison, bool]:
        """Returns the comparison of a replay with the set, and if the engine has changed: a second replay has to show
        the same as the first."""
        self._expect(len(taken.canaries))
        first = taken.compare(await self.replay(taken.canaries), tolerance)
        if not first.changed:
            return first, False
        self._expect(len(taken.canaries))
        second = taken.compare(await self.replay(taken.canaries), tolerance)
        return second, second.confirms(first)

    async def _replay_beside(self, canaries: Sequence[Canary], at_once: int) -> Floats:
        """Replays the sequences, so many at a time, and returns their log-probabilities one after the other."""
        values: list[Floats] = []
        for begin in range(0, len(canaries), at_once):
            group = [asyncio.create_task(self._score(canary)) for canary in canaries[begin : begin + at_once]]
            try:
                values += await asyncio.gather(*group)
            finally:
                for task in group:
                    task.cancel()
                await asyncio.gather(*group, return_exceptions=True)
        return np.concatenate(values)

    def _expect(self, sequences: int) -> None:
        """Begins to count the sequences that are scored, for the progress."""
        self._scored, self._to_score = 0, sequences

    async def _score(self, canary: Canary) -> Floats:
        await self._gate()
        self.sent += canary.tokens

        async def ask() -> list[float]:
            return await self._server.prompt_logprobs(self.model, canary.ids, cache_salt=_salt(), **self._priority)

        try:
            values = await ask()
        except Refused as refused:
            if not self._priority or "priority" not in refused.detail.lower():
                raise
            self._priority = {}
            values = await ask()
        if self._scored < self._to_score:
            self._scored += 1
            self._progress("sequences scored", self._scored, self._to_score)
        return np.array(values)

    async def _answer(self, ids: Sequence[int], *, sampled: bool, seed: int) -> list[int]:
        body = {
            "model": self.model,
            "prompt": list(ids),
            "max_tokens": ANSWER_TOKENS,
            "temperature": float(sampled),
            "seed": seed,
            "ignore_eos": True,
            "return_token_ids": True,
            "cache_salt": _salt(),
        }
        await self._gate()
        answer = await self._server.post("/v1/completions", body, _Completion)
        token_ids = answer.choices[0].token_ids if answer.choices else None
        if not token_ids:
            raise ReferenceFailure(
                FailureReason.SHORT_ANSWER, f"{self._server.url} sent no token_ids; a newer vLLM does"
            )
        return token_ids


def cut_to_fit(prompts: Sequence[Sequence[int]], tokens: int, max_model_len: int = 0) -> list[list[int]]:
    """Returns the prompts, of which the longest are cut to one length, so that all together have at most `tokens`, and
    each one leaves room for its answer. max_model_len: 0 where it is not known.

    >>> [len(prompt) for prompt in cut_to_fit([[1] * 3, [2] * 50, [3] * 90], 63)]
    [3, 30, 30]
    """
    limit = min(max(map(len, prompts), default=0), max(tokens, 1))
    if max_model_len:
        limit = min(limit, max_model_len - ANSWER_TOKENS - 1)
    while limit > 1 and sum(min(len(prompt), limit) for prompt in prompts) > tokens:
        limit -= 1
    return [list(prompt)[: max(limit, 1)] for prompt in prompts]


def _ids(tokens: Sequence[int]) -> Ids:
    return np.array(tokens, np.int32)


def _salt() -> str:
    return f"hemostat-canary-{secrets.token_hex(8)}"
