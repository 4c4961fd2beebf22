"""The reference on a vLLM pooling server: hidden states from there, products with the output embedding here."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hemostat.checkpoints.checkpoint_digest import checkpoint_digest
from hemostat.checkpoints.output_embedding import EmbeddingError
from hemostat.reference import worker_messages
from hemostat.reference.hidden.folders import find_checkpoint, identity
from hemostat.reference.hidden.pooling import States, hidden_states
from hemostat.reference.hidden.probe import MAX_SAME_DISTANCE, distance, fit_of_head
from hemostat.reference.protocol import (
    FailureReason,
    Offer,
    ReferenceFailure,
    ReferenceInfo,
    ReferenceScores,
    ScoreRequest,
)
from hemostat.reference.server import ModelCard, Refused, VllmServer
from hemostat.reference.worker_client import ReferenceWorker, threads_or_default

log = logging.getLogger("hemostat.reference")

PROBE_SECONDS = 300.0
"""The pause between looks whether the server still runs the model that was checked."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Checked:
    """A model and a head that fit each other. files: `identity` of the folder. ids, states: the probe, and the server's
    answer."""

    card: ModelCard
    folder: Path
    files: str
    digest: str
    ids: tuple[int, ...]
    states: States
    worker: ReferenceWorker
    loaded: worker_messages.Loaded


class HiddenStatesReference:
    """Scores by the hidden states of a server. Owns the worker with the output head, and what the model was when it was
    checked.

    The server's length limit and its adapters hold as with lists; an adapter that changes the output embedding is not
    seen. Every method raises ReferenceFailure and nothing else.
    """

    def __init__(self, server: VllmServer, device: str = "cpu", threads: int | None = None) -> None:
        """device, threads: of the products; see `threads_or_default`."""
        self._server = server
        self._device = device
        self._threads = threads_or_default(threads)
        self._checked: _Checked | None = None
        self._probed_at = 0.0
        self._probing = asyncio.Lock()

    async def start(self, card: ModelCard, folder: Path | None, ids: Sequence[int], states: States) -> ReferenceInfo:
        """Checks that the head in `folder` belongs to the server's model. While the folder and the ids of the probe
        stay the same, the model also has to be the model of the last check.

        folder: see `find_checkpoint`. ids, states: the text of the probe, and the hidden states that the server has
        just given for it. It raises HEAD, REVISION, and what the worker raises, and may be called again after a
        failure.
        """
        place, files = await asyncio.to_thread(_find, folder, card.root or "")
        before = self._checked
        if before is not None and (before.folder, before.files, before.ids) == (place, files, tuple(ids)):
            self._require_same(before, states)
            loaded = await before.worker.start()
            self._checked = dataclasses.replace(before, card=card, loaded=loaded)
        else:
            self._checked = None
            if before is not None:
                await before.worker.close()
            self._checked = await self._check(card, place, files, tuple(ids), states)
        self._probed_at = time.monotonic()
        return self._info(self._checked)

    async def _check(self, card: ModelCard, folder: Path, files: str, ids: tuple[int, ...], states: States) -> _Checked:
        digest = await asyncio.to_thread(checkpoint_digest, str(folder), None)
        worker = ReferenceWorker(worker_messages.LoadHead(str(folder), self._device, self._threads))
        try:
            loaded = await worker.start()
            if loaded.width != states.shape[1]:
                raise ReferenceFailure(
                    FailureReason.HEAD,
                    f"the server's hidden states have {states.shape[1]} entries, the output embedding in {folder} has "
                    f"{loaded.width} columns: reference.folder must be the checkpoint that {card.id} was loaded from",
                )
            tokens = np.array(ids, np.int32)
            if tokens.max() >= loaded.vocab_size:
                raise ReferenceFailure(
                    FailureReason.HEAD,
                    f"the server's tokenizer gives id {tokens.max()}, the output embedding in {folder} has "
                    f"{loaded.vocab_size} rows: reference.folder must be the checkpoint that {card.id} was loaded from",
                )
            nothing = np.full((len(ids) - 1, 1), -1, np.int32)
            scores = await worker.score(ScoreRequest(tokens[:1], tokens[1:], nothing), states[:-1])
            assert scores.entropy is not None
            if problem := fit_of_head(scores.emitted, scores.entropy, loaded.vocab_size):
                raise ReferenceFailure(
                    FailureReason.HEAD,
                    f"the output embedding in {folder} does not fit the server's hidden states ({problem}); "
                    f"reference.folder must be the checkpoint that {card.id} was loaded from",
                )
        except BaseException:
            await worker.close()
            raise
        log.info(
            "output head of %s: %s ids of %s, products by %s", folder, loaded.vocab_size, loaded.width, loaded.dtype
        )
        return _Checked(card, folder, files, digest, ids, states, worker, loaded)

    async def score(self, request: ScoreRequest) -> ReferenceScores:
        """See `Reference.score`, and `ReferenceWorker.score` for E_r[Δz]."""
        checked = self._checked
        if checked is None:
            raise ReferenceFailure(FailureReason.DOWN, "the reference has not been started")
        prompt, output, adapter = request.prompt, request.output, request.adapter
        if not len(prompt) or not len(output):
            raise ReferenceFailure(FailureReason.EMPTY, "a prompt and an output of at least one token are needed")
        # The last output token is scored, but is no input.
        read = request.tokens - 1
        limit = checked.card.max_model_len
        if limit is not None and read > limit:
            raise ReferenceFailure(FailureReason.TOO_LONG, f"{read} tokens: the reference reads at most {limit}")
        await self._probe_now_and_then(checked)
        tokens = [*prompt.tolist(), *output[:-1].tolist()]
        width = checked.loaded.width
        try:
            states = await hidden_states(
                self._server,
                adapter or checked.card.id,
                tokens,
                width,
                first=len(prompt) - 1,
                reshaped=request.reshaped,
            )
        except Refused as refused:
            if adapter and refused.status == 404:
                raise ReferenceFailure(FailureReason.NO_ADAPTER, str(refused)) from None
            raise
        return await checked.worker.score(request, states)

    async def close(self) -> None:
        checked, self._checked = self._checked, None
        if checked is not None:
            await checked.worker.close()

    async def _probe_now_and_then(self, checked: _Checked) -> None:
        """Raises REVISION if the server runs another model than the one that was checked."""
        if time.monotonic() - self._probed_at < PROBE_SECONDS:
            return
        async with self._probing:
            if time.monotonic() - self._probed_at < PROBE_SECONDS:
                return
            states = await hidden_states(self._server, checked.card.id, checked.ids, checked.loaded.width)
            self._require_same(checked, states)
            self._probed_at = time.monotonic()

    def _require_same(self, checked: _Checked, states: States) -> None:
        far = distance(states, checked.states)
        if not far <= MAX_SAME_DISTANCE:
            raise ReferenceFailure(
                FailureReason.REVISION,
                f"{self._server.url} answers {checked.card.id} with other hidden states than when it was checked "
                f"(distance {far:.2f}): another model or revision; load the one of {checked.folder}, or put its "
                "checkpoint there and restart Hemostat",
            )

    def _info(self, checked: _Checked) -> ReferenceInfo:
        loaded = checked.loaded
        return ReferenceInfo(
            model=checked.card.id,
            digest=checked.digest,
            dtype="server",
            vocab_size=loaded.vocab_size,
            full_vocabulary=True,
            hidden_size=loaded.hidden_size,
            hidden_detail=loaded.hidden_detail,
            folder=checked.folder,
            offer=Offer.STATES,
        )


def _find(folder: Path | None, root: str) -> tuple[Path, str]:
    """Returns the checkpoint's folder, and the identity of its files."""
    try:
        place = find_checkpoint(folder, root)
        return place, identity(place)
    except EmbeddingError as error:
        raise ReferenceFailure(
            FailureReason.HEAD, f"a pooling server's hidden states cannot be used: {error}"
        ) from None
    except OSError as error:
        raise ReferenceFailure(FailureReason.HEAD, f"{error.filename}: cannot be read ({error.strerror})") from None
