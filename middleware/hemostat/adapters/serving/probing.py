"""The requests of the two probes. What their numbers say is decided in `verdicts`.

One isolation probe generates about 1,000 tokens of about 30 prompts of some 30 tokens each; one agreement probe
computes 8 prompts of `SEQUENCE` tokens. Both use prompts of their own, with a salt, so that nothing which they leave
in a prefix cache is used by anybody else.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from hemostat.adapters.serving import verdicts
from hemostat.adapters.serving.server import Completed, complete
from hemostat.adapters.serving.verdicts import Verdict, moves
from hemostat.reference.protocol import FailureReason, ReferenceFailure
from hemostat.reference.server import VllmServer
from hemostat_calibration.arrays import Floats, Ids, Singles

PROMPTS = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a "
    "wife. However little known the feelings or views of such a man may be",
    "Call me Ishmael. Some years ago, never mind how long precisely, I thought I would sail about a little and see the "
    "watery part of the world. It is a way I have",
    "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once or "
    "twice she had peeped into the book",
    "When in the Course of human events, it becomes necessary for one people to dissolve the political bands which "
    "have connected them with another,",
)


SEQUENCE = 64
"""Tokens of each text that engine and copy are compared on: a prompt and how the model goes on."""
MAX_PROMPT_TOKENS = 48
ROW_TOKENS = 16
"""Tokens of a row whose isolation is tested."""
ADAPTER_TOKENS = 32
"""The number of tokens of a row with an adapter: it is in the batch for longer than the rows that are tested."""
REPEATS = 2
MAX_REPEATS = 8


class CopyUnavailable(Exception):
    """Our copy of the model does not answer now; the text says why, in one line."""


class ModelCopy(Protocol):
    """Our own copy of the compressed model; implemented by whoever holds it."""

    async def logprobs(self, ids: Ids, version: str | None) -> Singles:
        """Returns the log-probability in nats of each id after the first, given the ids before it, [n - 1]. version:
        the adapter it is computed with; None: none. Raises CopyUnavailable while the copy cannot answer."""
        ...


class Prober:
    """server: the upstream. Every method raises ReferenceFailure where the server does not answer as it should."""

    def __init__(self, server: VllmServer) -> None:
        self._server = server
        self._texts: dict[str, list[Completed]] = {}
        """The continuation of each prompt in the last isolation probe, by base model."""
        self._prompts: dict[str, list[list[int]]] = {}
        self._secret = secrets.token_hex(8)
        self._count = 0
        self.tokens = 0
        """Computed for probes, prompts included."""

    async def prompts(self, base: str) -> list[list[int]]:
        """Token ids of the prompts."""
        if base not in self._prompts:
            ids = [(await self._server.tokenize(base, text))[:MAX_PROMPT_TOKENS] for text in PROMPTS]
            if not all(ids):
                raise ReferenceFailure(FailureReason.BAD_ANSWER, f"{self._server.url} gave no token ids of a text")
            self._prompts = {base: ids}
        return self._prompts[base]

    async def isolation(self, base: str, versions: Sequence[str], engines: int = 1) -> Verdict:
        """Compares rows without an adapter alone, in a batch with others of the same kind, and in a batch with rows
        with adapters.

        engines: the number of engines behind the address. It is not known which of them answers a request, so there
        are as many times more rows.
        """
        repeats = min(REPEATS * max(1, engines), MAX_REPEATS)
        prompts = await self.prompts(base)
        alone = [await self._row(base, ids, SEQUENCE - len(ids)) for ids in prompts]
        self._texts = {base: alone}
        noise, beside = [], []
        for _ in range(repeats):
            noise += await self._rows(base, prompts, [base])
        for _ in range(repeats):
            beside += await self._rows(base, prompts, versions)
        return verdicts.isolation(moves(alone * repeats, noise), moves(alone * repeats, beside))

    async def agreement(self, base: str, version: str, copy: ModelCopy) -> Verdict:
        """Compares the engine's log-probabilities, without and with an adapter, with the log-probabilities of our
        copy.

        Raises CopyUnavailable if the copy cannot answer.
        """
        if base not in self._texts:
            prompts = await self.prompts(base)
            self._texts = {base: [await self._row(base, ids, SEQUENCE - len(ids)) for ids in prompts]}
        texts = self._texts[base]
        ids = [[*prompt, *text.tokens] for prompt, text in zip(await self.prompts(base), texts, strict=True)]
        ours = []
        for name in (None, version):
            result = [await copy.logprobs(np.array(each, np.int32), name) for each in ids]
            if any(len(logprobs) != len(each) - 1 for logprobs, each in zip(result, ids, strict=True)):
                raise CopyUnavailable("the copy of the model sent log-probabilities of too few tokens")
            ours.append(np.concatenate(result).astype(np.float64))
        engine = [await self._scored(name, ids) for name in (base, version)]
        again = np.concatenate(
            [logprobs[-len(text.logprobs) :] for logprobs, text in zip(engine[0], texts, strict=True)]
        )
        noise = np.abs(again - np.concatenate([text.logprobs for text in texts])).mean()
        theirs = [np.concatenate(rows) for rows in engine]
        return verdicts.agreement((theirs[0], theirs[1]), (ours[0], ours[1]), float(noise))

    async def _scored(self, name: str, texts: Sequence[Sequence[int]]) -> list[Floats]:
        self.tokens += sum(len(ids) + 1 for ids in texts)
        return [np.array(await self._server.prompt_logprobs(name, ids, cache_salt=self._salt())) for ids in texts]

    async def _rows(self, base: str, prompts: Sequence[Sequence[int]], beside: Sequence[str]) -> list[Completed]:
        """Returns one row for each prompt, all from one batch with as many other rows, for which the other models are
        asked in turn."""
        others = [
            asyncio.create_task(self._row(beside[n % len(beside)], ids, ADAPTER_TOKENS))
            for n, ids in enumerate(prompts)
        ]
        rows = [asyncio.create_task(self._row(base, ids, ROW_TOKENS)) for ids in prompts]
        try:
            done = await asyncio.gather(*rows, *others)
        finally:
            for task in (*rows, *others):
                task.cancel()
            await asyncio.gather(*rows, *others, return_exceptions=True)
        return done[: len(rows)]

    async def _row(self, name: str, ids: Sequence[int], tokens: int) -> Completed:
        self.tokens += len(ids) + tokens
        return await complete(self._server, name, ids, tokens, self._salt())

    def _salt(self) -> str:
        self._count += 1
        return f"hemostat-{self._secret}-{self._count}"
