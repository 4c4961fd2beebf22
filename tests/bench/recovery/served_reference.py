"""The reference's hidden states of texts, from a vLLM pooling server in place of the model in process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from tests.bench.recovery.engine import Written
from tests.bench.recovery.log import say

from hemostat.reference.hidden.pooling import POOLING_ARGUMENTS
from hemostat.reference.on_server import ServerReference
from hemostat.reference.protocol import ScoreRequest
from hemostat_lab.demo import vllm_server as vllm_process

AT_ONCE = 4


def with_states_of_server(reference: Path, texts: Sequence[Written], log: Path) -> list[Written]:
    """The texts with `hidden` as Hemostat's vLLM backend gives it."""
    arguments = ["--dtype", vllm_process.dtype(), "--enforce-eager", "--max-model-len", "2048", *POOLING_ARGUMENTS]
    server = vllm_process.VllmServer(reference, "reference", log, arguments)
    try:
        server.start()
        server.wait_ready(900, progress=say)
        return asyncio.run(_scored(server.url, reference, texts))
    finally:
        server.stop()


async def _scored(url: str, folder: Path, texts: Sequence[Written]) -> list[Written]:
    scorer = ServerReference(url, folder=folder)
    limit = asyncio.Semaphore(AT_ONCE)
    began = time.monotonic()
    try:
        await scorer.start()

        async def score_text(text: Written) -> Written:
            async with limit:
                scores = await scorer.score(ScoreRequest(text.prompt, text.output, text.output[:, None], hidden=True))
                assert scores.hidden is not None
                return replace(text, hidden=scores.hidden.astype(np.float16))

        result = await asyncio.gather(*(score_text(text) for text in texts))
    finally:
        await scorer.close()
    say(f"{len(result)} texts scored by a pooling server in {time.monotonic() - began:.0f} s")
    return list(result)
