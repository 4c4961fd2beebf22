"""The same tokens on an engine in variants, for the cause of a change: `hemostat_calibration.canary_cause`.

Tokens are given to a decoding engine by its plugin (`vllm_xargs.hemostat_force`). Without it, variants that decode are
not measured, and less can be said.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import numpy as np

from hemostat.reference.protocol import ReferenceFailure
from hemostat.reference.server import Refused, VllmServer
from hemostat_calibration.arrays import Floats, Ids
from hemostat_calibration.canaries import Canary
from hemostat_calibration.canary_cause import (
    DECODED,
    REPLAYS,
    WINDOW,
    CauseBaseline,
    Measured,
    Variant,
    prompts,
    text_of,
    windows,
)
from hemostat_calibration.engine_keys import FORCE_KEY, PRECISION_KEY

Sign = Callable[[dict[str, Any]], dict[str, Any]]
"""A function that returns `vllm_xargs` with the MAC that the engine's plugin wants."""
COMPANIONS = 3
"""The number of requests that are decoded together with the measured one."""
COMPANION_PROMPT, COMPANION_TOKENS = 8, 96
"""The number of tokens of a companion's prompt and of its answer. Companions are ended together with the measured
request."""
STEPS_PER_BIT = 10
"""The same number as in `hemostat_engine.kv_precision`."""
_CACHE_DTYPE = re.compile(r'^vllm:cache_config_info\{[^}]*\bcache_dtype="([^"]*)"', re.MULTILINE)


class _Choice(msgspec.Struct, frozen=True):
    token_ids: list[int] | None = None


class _Completion(msgspec.Struct, frozen=True):
    choices: list[_Choice]


def cost(text: Ids) -> int:
    """Returns the largest number of tokens of one measurement, with those that are generated.

    >>> cost(np.zeros(1000, np.int32))
    4735
    """
    decoded = sum(length + DECODED for length in prompts())
    beside = 2 * COMPANIONS * (COMPANION_PROMPT + COMPANION_TOKENS) + 2
    short = (WINDOW + 1) * len(windows(len(text)))
    return 2 * (len(text) + 1) + short + 3 * decoded + beside + 4


class VariantClient:
    """Measures variants with one model that a server serves. Raises ReferenceFailure if it cannot be asked.

    gate: awaited before each request: returns when it may be sent. progress: called after each measurement of a
    baseline, see `hemostat.canaries.client.Progress`. sign: makes the plugin act on the keys of a request
    (`hemostat_calibration.engine_keys`); without it, variants that decode are not measured.
    """

    def __init__(
        self,
        server: VllmServer,
        model: str,
        gate: Callable[[], Awaitable[None]],
        progress: Callable[[str, int, int], None] = lambda *_: None,
        sign: Sign = dict,
    ) -> None:
        self._server = server
        self._model = model
        self._gate = gate
        self._progress = progress
        self._sign = sign

    async def baseline(self, canaries: Sequence[Canary], max_model_len: int) -> CauseBaseline | None:
        """Returns the baseline; None if the model's context is too short."""
        text = text_of([canary.ids for canary in canaries], max_model_len)
        if not len(text):
            return None
        measured = []
        for _ in range(REPLAYS):
            measured.append(await self.measure(text))
            self._progress("variants measured", len(measured), REPLAYS)
        return CauseBaseline(text, tuple(measured))

    async def measure(self, text: Ids) -> Measured:
        """Measures all variants, once, and returns what was measured. What is to be alone comes first: the engine ends
        companions a while after they are."""
        ids, salts = text.tolist(), [_salt() for _ in prompts()]
        found: dict[str, Floats | None] = {Variant.LONG: await self._score(ids)}
        found[Variant.SHORT] = np.concatenate([await self._score(ids[piece]) for piece in windows(len(ids))])
        found[Variant.DECODED] = decoded = await self._decode(ids, salts)
        with_plugin = decoded is not None
        if with_plugin:
            found[Variant.CACHED] = await self._decode(ids, salts)
        async with self._companions(ids) as undisturbed:
            beside = await self._score(ids)
            found[Variant.LONG_BESIDE] = beside if undisturbed() else None
        if with_plugin:
            async with self._companions(ids) as undisturbed:
                among = await self._decode(ids, [_salt() for _ in salts])
                found[Variant.BESIDE] = among if undisturbed() else None
        scores = {variant: values for variant, values in found.items() if values is not None}
        return Measured(scores, await self._precision(ids) if with_plugin else 0.0, await self._cache_dtype())

    async def _score(self, ids: Sequence[int]) -> Floats:
        await self._gate()
        return np.array(await self._server.prompt_logprobs(self._model, ids, cache_salt=_salt()))

    async def _decode(self, ids: list[int], salts: Sequence[str]) -> Floats | None:
        """Returns the log-probabilities of given tokens after the beginnings of the text; None if they were not
        decoded."""
        values: list[float] = []
        for length, salt in zip(prompts(), salts, strict=True):
            wanted = ids[length : length + DECODED]
            await self._gate()
            xargs = self._sign({FORCE_KEY: wanted})
            decoded = await self._server.forced_logprobs(self._model, ids[:length], wanted, xargs, cache_salt=salt)
            if decoded is None:
                return None
            values += decoded
        return np.array(values)

    async def _precision(self, ids: list[int]) -> float:
        """See `Measured`."""
        choice = await self._complete(ids[:1], 1, {PRECISION_KEY: 1}, _salt())
        return choice.token_ids[0] / STEPS_PER_BIT if choice.token_ids else 0.0

    async def _cache_dtype(self) -> str:
        try:
            found = _CACHE_DTYPE.search(await self._server.text("GET", "/metrics"))
        except ReferenceFailure:  # a router in front of vLLM may not have the route
            return ""
        return found[1] if found else ""

    async def _complete(self, prompt: list[int], tokens: int, xargs: dict[str, Any] | None, salt: str) -> _Choice:
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "logprobs": 0,
            "return_token_ids": True,
            "cache_salt": salt,
            **({} if xargs is None else {"vllm_xargs": self._sign(xargs)}),
        }
        await self._gate()
        try:
            answer = await self._server.post("/v1/completions", body, _Completion)
        except Refused as refused:
            if "vllm_xargs" not in refused.detail and "hemostat" not in refused.detail:
                raise
            return _Choice()  # no engine of vLLM's
        return answer.choices[0] if answer.choices else _Choice()

    @asynccontextmanager
    async def _companions(self, ids: list[int]) -> AsyncIterator[Callable[[], bool]]:
        """Keeps requests decoding meanwhile. Yields a function that returns whether all of them still are."""
        tasks = [
            asyncio.create_task(self._complete(ids[n : n + COMPANION_PROMPT], COMPANION_TOKENS, None, _salt()))
            for n in range(COMPANIONS)
        ]
        try:
            # Engines begin requests in the order in which they come: after this one is answered, those are decoded.
            await self._complete(ids[:1], 1, None, _salt())
            yield lambda: not any(task.done() for task in tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _salt() -> str:
    return f"hemostat-canary-{secrets.token_hex(8)}"
