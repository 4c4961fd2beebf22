"""Canaries at one vLLM server: takes a set of them, and replays it.

A sequence is scored in the way of the traffic if the engine has Hemostat's plugin: one request asks for the prompt's
`prompt_logprobs`, and has the engine decode the answer, whose tokens the plugin is given, step by step in its batch.
With any other vLLM, `prompt_logprobs` of the whole sequence score it: the answer's tokens are not decoded then.

For `prompt_logprobs` vLLM computes all tokens of a prompt, without its prefix cache. Each request has a salt of its own
all the same, so that what it leaves in the cache is used by nobody else.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np

from hemostat.canaries.prompts import Prompts
from hemostat.canaries.texts import TextClient
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
from hemostat_calibration.engine_keys import FORCE_KEY

ANSWER_TOKENS = 40
PROBE_TOKENS = 8
"""The number of tokens that an engine is given to decode, before a set is taken, to find out if it can."""
BESIDE = (3, 6, 12)
"""The numbers of sequences that are asked for at once in the baseline's replays, but for the first one: batches of
several shapes."""
TOKENIZER_TEXT = "Hemostat 1,024 ≤ x; größer 温度 température\n\tif (a != b) { return [0x1f]; } // 😀"
"""A text for which tokenizers differ in the token ids."""
NOT_A_NUMBER = "Out of range float values"
"""A part of vLLM's refusal to return log-probabilities that are not a number."""
LEAST_NATS = -9_999.0
"""The log-probability in the place of one that is not a number: vLLM's own for one that is minus infinity."""
PRIORITY = 1_000
"""The priority of canaries, later than clients' requests, whose default is 0. It has an effect if the engine schedules
by priority.
"""

_CACHES_PREFIXES = re.compile(r'^vllm:cache_config_info\{[^}]*\benable_prefix_caching="True"', re.MULTILINE)
_NOTHING: Mapping[str, Any] = {}

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


async def at_once() -> None:
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
        gate: Gate = at_once,
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
        decoded = await self._decodes(texts[0])
        canaries = []
        for number, (prompt, text) in enumerate(zip(prompts.prompts, texts, strict=True)):
            answer = await self._answer(text, sampled=number % 2 == 1, seed=number)
            canaries.append(Canary(prompt.kind, _ids(text), _ids(answer)))
            self._progress("answers written", len(canaries), len(texts))
        require_sequences(canaries)
        taken = await self.baseline(canaries, origin, decoded=decoded)
        as_sent = await self.texts().take([prompt.prompt for prompt in prompts.prompts])
        return replace(taken, cause=await self.variants().baseline(canaries, origin.max_model_len), texts=as_sent)

    def variants(self) -> VariantClient:
        return VariantClient(self._server, self.model, self._gate, self._progress, self._sign)

    def texts(self) -> TextClient:
        return TextClient(self._server, self.model, self._gate)

    async def baseline(
        self, canaries: Sequence[Canary], origin: Origin, *, decoded: bool, rounds: int = 1
    ) -> CanarySet:
        """Returns the set of these sequences, replayed alone and together with each other, so many rounds of REPLAYS
        replays. decoded: see `CanarySet`. Raises REVISION if another model is served at the end than at the beginning.
        """
        before = await self.origin()
        together = rounds * (1, *BESIDE)
        assert len(together) == rounds * REPLAYS
        self._expect(len(together) * len(canaries))
        replays = [await self._replay_beside(canaries, n, decoded=decoded) for n in together]
        if changes := before.changes(await self.origin()):
            text = f"{self._server.url} was changed while the canaries were taken, and these are dropped"
            raise ReferenceFailure(FailureReason.REVISION, f"{text}: {'; '.join(changes)}")
        conditions = tuple(Condition(origin.at, n) for n in together)
        return CanarySet(tuple(canaries), np.stack(replays), origin, conditions=conditions, decoded=decoded)

    async def replay(self, taken: CanarySet) -> Floats:
        """Returns the log-probabilities of all scored tokens of the set, float64 [N], one sequence after the other."""
        return await self._replay_beside(taken.canaries, 1, decoded=taken.decoded)

    async def compare(self, taken: CanarySet, tolerance: float) -> tuple[Comparison, bool]:
        """Returns the comparison of a replay with the set, and if the engine has changed: a second replay has to show
        the same as the first."""
        self._expect(len(taken.canaries))
        first = taken.compare(await self.replay(taken), tolerance)
        if not first.changed:
            return first, False
        self._expect(len(taken.canaries))
        second = taken.compare(await self.replay(taken), tolerance)
        return second, second.confirms(first)

    async def _replay_beside(self, canaries: Sequence[Canary], at_once: int, *, decoded: bool) -> Floats:
        """Replays the sequences, so many at a time, and returns their log-probabilities one after the other."""
        values: list[Floats] = []
        more = {"cache_salt": await self._cache_prefix(canaries[0])} if canaries[0].cached else _NOTHING
        for begin in range(0, len(canaries), at_once):
            several = canaries[begin : begin + at_once]
            group = [asyncio.create_task(self._score(canary, decoded=decoded, more=more)) for canary in several]
            try:
                values += await asyncio.gather(*group)
            finally:
                for task in group:
                    task.cancel()
                await asyncio.gather(*group, return_exceptions=True)
        return np.concatenate(values)

    async def caches_prefixes(self) -> bool:
        """Returns True if the engine says that it has a prefix cache."""
        try:
            return _CACHES_PREFIXES.search(await self._server.text("GET", "/metrics")) is not None
        except ReferenceFailure:  # a router in front of vLLM may not have the route
            return False

    async def _cache_prefix(self, canary: Canary) -> str:
        """Has the engine compute the prefix of a sequence, and returns the salt under which it is in the cache now."""
        salt = _salt()
        await self._gate()
        self.sent += canary.cached + 1
        body = {"model": self.model, "prompt": canary.prompt[: canary.cached].tolist(), "max_tokens": 1}
        await self._server.post("/v1/completions", body | {"temperature": 0.0, "cache_salt": salt}, _Completion)
        return salt

    def _expect(self, sequences: int) -> None:
        """Begins to count the sequences that are scored, for the progress."""
        self._scored, self._to_score = 0, sequences

    async def score(self, canary: Canary, *, decoded: bool) -> Floats:
        """Returns the log-probabilities of one sequence. decoded: see `CanarySet`."""
        return await self._score(canary, decoded=decoded)

    async def score_at(self, server: VllmServer, canary: Canary, more: Mapping[str, Any]) -> Floats:
        """Returns the log-probabilities of one sequence by `prompt_logprobs`, at another address of the same server.
        more: further members of the body."""
        return await self._score(canary, decoded=False, server=server, more=more)

    async def _score(
        self, canary: Canary, *, decoded: bool, server: VllmServer | None = None, more: Mapping[str, Any] = _NOTHING
    ) -> Floats:
        await self._gate()
        self.sent += canary.tokens
        try:
            values = await self._asked(server or self._server, canary, more, decoded=decoded)
        except Refused as refused:
            if NOT_A_NUMBER not in refused.detail:
                raise
            values = [LEAST_NATS] * canary.scored
        if values is None:
            raise ReferenceFailure(
                FailureReason.SHORT_ANSWER,
                f"{self._server.url} does not decode the tokens that it is given, as the engine of the set does: start "
                "it with Hemostat's plugin, or take a new set",
            )
        if self._scored < self._to_score:
            self._scored += 1
            self._progress("sequences scored", self._scored, self._to_score)
        return np.array(values)

    async def _asked(
        self, server: VllmServer, canary: Canary, more: Mapping[str, Any], *, decoded: bool
    ) -> list[float] | None:
        ask = self._decoded if decoded else self._prefilled
        try:
            return await ask(server, canary, more)
        except Refused as refused:
            if not self._priority or "priority" not in refused.detail.lower():
                raise
            self._priority = {}
            return await ask(server, canary, more)

    async def _prefilled(self, server: VllmServer, canary: Canary, more: Mapping[str, Any]) -> list[float] | None:
        more = {"cache_salt": _salt(), **self._priority, **more}
        return await server.prompt_logprobs(self.model, canary.ids, **more)

    async def _decoded(self, server: VllmServer, canary: Canary, more: Mapping[str, Any]) -> list[float] | None:
        prompt, answer = canary.prompt.tolist(), canary.answer.tolist()
        of_prompt = {} if canary.cached else {"prompt_logprobs": 0}  # which do not read the prefix cache
        more = {**of_prompt, "cache_salt": _salt(), **self._priority, **more}
        return await server.forced_logprobs(self.model, prompt, answer, self._sign({FORCE_KEY: answer}), **more)

    async def _decodes(self, text: Sequence[int]) -> bool:
        """Returns True if the server decodes tokens that it is given, and that it would hardly choose: a text from its
        end to its beginning. Raises ReferenceFailure if it does not score at all."""
        canary = Canary("", _ids(text), _ids(text[::-1][:PROBE_TOKENS]))
        try:
            await self._score(canary, decoded=True)
        except ReferenceFailure as failure:
            if not isinstance(failure, Refused) and failure.reason is not FailureReason.SHORT_ANSWER:
                raise
            await self._score(canary, decoded=False)
            return False
        return True

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
