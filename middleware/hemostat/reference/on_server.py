"""A reference on a vLLM server, by whatever it offers: hidden states (exact), or lists of top ids (bounds)."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from pydantic import SecretStr

from hemostat.checkpoints.output_embedding import EmbeddingError
from hemostat.reference.hidden.folders import find_checkpoint
from hemostat.reference.hidden.pooling import POOLING_FLAGS, find_offer, generates
from hemostat.reference.hidden.probe import TEXT
from hemostat.reference.hidden.reference import HiddenStatesReference
from hemostat.reference.protocol import (
    FailureReason,
    Offer,
    ReferenceFailure,
    ReferenceInfo,
    ReferenceScores,
    ScoreRequest,
)
from hemostat.reference.server import ModelCard, VllmServer
from hemostat.reference.vllm import VllmReference

log = logging.getLogger("hemostat.reference")

MIN_PROBE_TOKENS = 8


class ServerReference:
    """Implements `Reference`. What the server offers is found out at every start: it may have been restarted with other
    flags.

    Hidden states are preferred to lists. If the output head in `reference.folder` does not belong to the server's
    model, lists are used if the address offers them, too; else there is no reference, and `start` fails with the reason
    HEAD.
    """

    def __init__(
        self,
        url: str,
        api_key: SecretStr | None = None,
        model: str | None = None,
        top_k: int = 20,
        *,
        folder: Path | None = None,
        device: str = "cpu",
        threads: int | None = None,
    ) -> None:
        """url, api_key, model, top_k: as `VllmReference`. folder: of the checkpoint, see `find_checkpoint`. device,
        threads: of the products with its output embedding."""
        self._server = VllmServer(url, api_key)
        self._wanted = model
        self._folder = folder
        self._by_lists = VllmReference(url, api_key, model, top_k, probes=True)
        self._by_states = HiddenStatesReference(self._server, device, threads)
        self._current: VllmReference | HiddenStatesReference | None = None
        self._name = ""
        self._why_lists = ""
        """The reason why lists are used in place of hidden states, as it was last logged."""

    async def start(self) -> ReferenceInfo:
        """Asks the server every time: it may have restarted with another model, or in another way."""
        card = await self._server.model(self._wanted)
        ids = await self._server.tokenize(card.id, TEXT)
        if len(ids) < MIN_PROBE_TOKENS:
            raise ReferenceFailure(FailureReason.BAD_ANSWER, f"{self._server.url} makes {len(ids)} tokens of a text")
        result = await find_offer(self._server, card.id, ids)
        self._current, self._name = None, card.id
        why_lists, exact_with = result.detail, f"start the reference with {POOLING_FLAGS}"
        if result.states is not None:
            try:
                info = await self._by_states.start(card, self._folder, ids, result.states)
            except ReferenceFailure as failure:
                why_lists = await self._without_head(card, failure)
                exact_with = "correct reference.folder"
            else:
                self._current = self._by_states
                return info
        await self._by_states.close()
        info = await self._by_lists.start()
        info = replace(info, offer=Offer.LISTS, figures=why_lists, exact_with=exact_with)
        if self._folder is not None:
            try:
                info = replace(info, folder=find_checkpoint(self._folder, card.root or ""))
            except EmbeddingError as error:
                info = replace(info, hidden_detail=f"{info.hidden_detail}, and {error}")
        self._current = self._by_lists
        return info

    async def _without_head(self, card: ModelCard, failure: ReferenceFailure) -> str:
        """Returns why lists are used though there are hidden states; raises `failure` if they cannot be used.

        A vLLM server that pools does not generate. A router in front of one of each kind offers both.
        """
        if failure.reason is not FailureReason.HEAD:
            raise failure
        if not await generates(self._server, card.id):
            raise ReferenceFailure(
                FailureReason.HEAD, f"{failure}; a server that only pools gives no lists of top ids to use instead"
            ) from failure
        why = f"its hidden states are not used: {failure}"
        if why != self._why_lists:
            log.warning("the reference %s: %s", card.id, why)
            self._why_lists = why
        return why

    async def score(self, request: ScoreRequest) -> ReferenceScores:
        """See `Reference.score`, and `VllmReference.score` where the server gives lists."""
        if self._current is None:
            raise ReferenceFailure(FailureReason.DOWN, "the reference has not been started")
        return await self._current.score(request)

    async def adapters(self) -> frozenset[str]:
        return await self._server.adapters()

    async def render(self, messages: list[dict[str, str]]) -> list[int]:
        return await self._server.render(self._started(), messages)

    async def tokenize(self, text: str) -> list[int]:
        return await self._server.tokenize(self._started(), text)

    async def close(self) -> None:
        await self._by_states.close()
        await self._by_lists.close()
        await self._server.close()

    def _started(self) -> str:
        if self._current is None:
            raise ReferenceFailure(FailureReason.DOWN, "the reference has not been started")
        return self._name
