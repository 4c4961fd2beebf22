"""Log-probabilities of answers that named only the ids of their tokens: the engine that answered computes them again.
It does so by prefill, so that they differ from the values of decoding by the compressed model's noise floor. The cost
is the same as for measuring the noise floor: the engine prefills what it has just generated, one answer at a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Protocol

import msgspec
import numpy as np

from hemostat.ipc.messages import Capture
from hemostat.reference.protocol import ReferenceScores, ScoreRequest
from hemostat.reference.server import VllmServer
from hemostat.reference.vllm import top_ids
from hemostat.scoring.capture_arrays import output_ids, prompt_ids
from hemostat_calibration.arrays import Ids

REQUEST_SECONDS = 60.0


class Engines(Protocol):
    """The part of `hemostat.engines.registry.EngineRegistry` that is used here."""

    def current(self) -> Collection[str]: ...

    def connect(self, name: str, timeout: float) -> VllmServer: ...


class EngineScorer:
    """Owns a connection to each engine. top_k: ids at each position, at most the engine's --max-logprobs."""

    def __init__(self, engines: Engines, top_k: int) -> None:
        self._engines = engines
        self._top_k = top_k
        self._servers: dict[str, VllmServer] = {}
        self._lock = asyncio.Lock()

    async def with_candidates(self, capture: Capture) -> Capture:
        """Returns the capture with what the engine that answered says of its tokens. Raises ReferenceFailure."""
        prompt, output = prompt_ids(capture), output_ids(capture)
        request = ScoreRequest(prompt, output, output[:, None])
        scores = await self.score(capture.engine, capture.adapter or capture.model, request)
        return with_scores(capture, output, scores)

    async def score(self, engine: str, model: str, request: ScoreRequest) -> ReferenceScores:
        """Returns what a model that the engine serves says of given tokens. Raises ReferenceFailure."""
        async with self._lock:
            return await top_ids(await self.server(engine), model, request, self._top_k)

    async def server(self, name: str) -> VllmServer:
        """Returns the connection to an engine. Raises ReferenceFailure if it is not one of the upstream."""
        for gone in self._servers.keys() - {name, *self._engines.current()}:
            await self._servers.pop(gone).close()
        if name not in self._servers:
            self._servers[name] = self._engines.connect(name, REQUEST_SECONDS)
        return self._servers[name]

    async def close(self) -> None:
        for server in self._servers.values():
            await server.close()


def with_scores(capture: Capture, output: Ids, scores: ReferenceScores) -> Capture:
    """Returns the capture with these candidates, the emitted token among them. output: int32 [T]."""
    top = scores.top
    missing = (top.ids != output[:, None]).all(axis=1)
    ids = np.column_stack([top.ids, np.where(missing, output, -1)])
    logprobs = np.column_stack([top.logprobs, np.where(missing, scores.emitted, -np.inf)])
    return msgspec.structs.replace(
        capture,
        top_k=top.ids.shape[1],
        candidate_ids=ids.astype("<i4").tobytes(),
        candidate_logprobs=logprobs.astype("<f4").tobytes(),
        emitted_logprobs=scores.emitted.astype("<f4").tobytes(),
    )
