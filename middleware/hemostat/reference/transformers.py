"""The reference model on this machine, through transformers, in a worker process of its own.

In the control process torch would hold the interpreter lock. The worker scores one request at a time at full
vocabulary, so entropies and expected shifts are exact.
"""

from __future__ import annotations

from pathlib import Path

from hemostat.reference import worker_messages
from hemostat.reference.protocol import (
    FailureReason,
    ReferenceFailure,
    ReferenceInfo,
    ReferenceScores,
    ScoreRequest,
)
from hemostat.reference.worker_client import ReferenceWorker, threads_or_default


class TransformersReference:
    """Implements `Reference`. When a worker ends, the pending request fails (DOWN), and a new worker is started."""

    def __init__(self, model: str, dtype: str = "auto", device: str = "cpu", threads: int | None = None) -> None:
        """threads: CPU threads of torch; None: see `threads_or_default`."""
        self._model = model
        self._worker = ReferenceWorker(worker_messages.Load(model, dtype, device, threads_or_default(threads)))

    async def start(self) -> ReferenceInfo:
        """Loads the model; returns at once when it is loaded. Raises ReferenceFailure, and may be called again after
        one."""
        loaded = await self._worker.start()
        return ReferenceInfo(
            model=self._model,
            digest=loaded.digest,
            dtype=loaded.dtype,
            vocab_size=loaded.vocab_size,
            full_vocabulary=True,
            hidden_size=loaded.hidden_size,
            hidden_detail=loaded.hidden_detail,
            folder=Path(loaded.folder),
            device=self._worker.device,
        )

    async def score(self, request: ScoreRequest) -> ReferenceScores:
        """See `Reference.score`, and `ReferenceWorker.score` for E_r[Δz]."""
        loaded = self._worker.running()
        if request.adapter:
            raise ReferenceFailure(FailureReason.NO_ADAPTER, f"a reference in process has no adapter {request.adapter}")
        if not len(request.prompt) or not len(request.output):
            raise ReferenceFailure(FailureReason.EMPTY, "a prompt and an output of at least one token are needed")
        # The last output token is scored, but is no input.
        read = request.tokens - 1
        if loaded.max_positions and read > loaded.max_positions:
            raise ReferenceFailure(
                FailureReason.TOO_LONG, f"{read} tokens: the reference reads at most {loaded.max_positions}"
            )
        return await self._worker.score(request)

    async def adapters(self) -> frozenset[str]:
        return frozenset()

    async def render(self, messages: list[dict[str, str]]) -> list[int]:
        return await self._worker.token_ids(lambda number: worker_messages.Render(number, messages))

    async def tokenize(self, text: str) -> list[int]:
        return await self._worker.token_ids(lambda number: worker_messages.Tokenize(number, text))

    async def close(self) -> None:
        """Ends the worker; the request under way fails."""
        await self._worker.close()
