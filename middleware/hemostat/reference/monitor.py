"""Starts the reference, compares it with the upstream, and compares again whenever either has changed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from enum import StrEnum
from pathlib import Path

from hemostat.config.schema import Upstream
from hemostat.metrics import names
from hemostat.metrics.samples import Sample
from hemostat.reference.match import compare
from hemostat.reference.pair import ModelPair
from hemostat.reference.probes import State, probe_shadowing
from hemostat.reference.protocol import Reference, ReferenceFailure
from hemostat.reference.server import ModelCard, VllmServer

log = logging.getLogger("hemostat.control")

RETRY_SECONDS = 3.0
"""Pause between attempts to start the reference and to compare it with the upstream."""
MODELS_SECONDS = 30.0
"""Pause between looks at what both servers serve: LoRA adapters may be loaded at run time."""
POLL_SECONDS = 0.5


class ReferenceState(StrEnum):
    NONE = "none"
    """`reference.backend` is none: nothing is scored."""
    STARTING = "starting"
    """One of the two models does not answer yet, or they are being compared again."""
    READY = "ready"
    """Both models use the same token ids; requests are scored."""
    MISMATCH = "mismatch"
    """The two differ, or the upstream does not support what scoring needs; `detail` names the fix."""
    DOWN = "down"
    """The reference does not start, or its last scores failed."""


class ReferenceMonitor:
    """Owns what is known of both models (`pair`), and whether requests can be scored (`state`, `detail`).

    reference: None with `reference.backend: none`; then `run` returns at once.
    compressed_scorer: the upstream as a scorer of its own tokens, for the noise floor; it is started with the rest.
    scores_fail: True while the circuit breaker is open.
    refused: how many sampled requests the upstream has refused so far, for what Hemostat asked on top. More of them
        mean that it may have been restarted with a lower --max-logprobs.
    on_change: called after every change of `pair`, `state` or `detail`.
    """

    def __init__(
        self,
        reference: Reference | None,
        upstream: Upstream,
        top_k: int,
        *,
        compressed_scorer: Reference | None,
        scores_fail: Callable[[], bool],
        refused: Callable[[], float],
        on_change: Callable[[], None],
    ) -> None:
        self._reference = reference
        self._upstream = upstream
        self._top_k = top_k
        self._compressed_scorer = compressed_scorer
        self._scores_fail = scores_fail
        self._refused = refused
        self._on_change = on_change
        self.pair = ModelPair()
        self.state = ReferenceState.NONE if reference is None else ReferenceState.STARTING
        self.detail = "reference.backend is none: nothing is scored" if reference is None else ""

    @property
    def ready(self) -> bool:
        return self.state is ReferenceState.READY

    def samples(self) -> Iterator[Sample]:
        if self._reference is not None:
            yield Sample(names.REFERENCE_UP, (), float(self.ready))
        # Without a name yet there is one series all the same: dashboards join every figure with this metric.
        reference = Path(self.pair.reference.model).name if self.pair.reference is not None else ""
        for model in sorted(self.pair.models) or [""]:
            yield Sample(names.MODEL_INFO, (model, reference), 1.0)

    async def run(self) -> None:
        """Until cancelled."""
        if self._reference is None:
            return
        server = VllmServer(self._upstream.url, self._upstream.api_key, ca=self._upstream.ca)
        try:
            while True:
                self._set_state(*await self._match(self._reference, server))
                if self.ready:
                    await self._wait_for_change(self._reference, server)
                else:
                    await asyncio.sleep(RETRY_SECONDS)
        finally:
            await server.close()

    async def _match(self, reference: Reference, server: VllmServer) -> tuple[ReferenceState, str]:
        """Whether the two models can be compared, and why not."""
        try:
            info = await reference.start()
            self.pair = replace(self.pair, reference_adapters=await reference.adapters())
        except ReferenceFailure as failure:
            return ReferenceState.DOWN, str(failure)
        try:
            self._set_served(await server.models())
            card = await server.model(None)
            findings = await probe_shadowing(server, card.id, self._top_k)
        except ReferenceFailure as failure:
            return ReferenceState.STARTING, f"the upstream does not answer: {failure}"
        for finding in findings:
            if finding.state is State.NO:
                detail = f"the upstream's {finding.what}: {finding.detail}; {finding.fix}"
                # A failed completion is no property of the server's settings: it may succeed the next time.
                return (ReferenceState.STARTING if finding.transient else ReferenceState.MISMATCH), detail
        try:
            match = await compare(self._upstream, reference)
        except ReferenceFailure as failure:
            return ReferenceState.DOWN, str(failure)
        if not match.ok:
            return (ReferenceState.MISMATCH if match.compared else ReferenceState.STARTING), match.detail
        if self._compressed_scorer is not None:
            try:
                await self._compressed_scorer.start()
            except ReferenceFailure as failure:
                return ReferenceState.STARTING, f"the upstream does not answer: {failure}"
        self.pair = replace(self.pair, model=card.id, reference=info)
        return ReferenceState.READY, f"{info.model} ({info.dtype})"

    async def _wait_for_change(self, reference: Reference, server: VllmServer) -> None:
        """Returns when the two have to be compared again: scores failed, the upstream serves another model, or it
        refuses sampled requests. The last is looked at only every MODELS_SECONDS: relays count every such request."""
        began = looked_at = time.monotonic()
        refused = self._refused()
        while True:
            now = time.monotonic()
            if self._scores_fail():
                self._set_state(ReferenceState.DOWN, "the last scores failed; trying again")
                while self._scores_fail():  # noqa: ASYNC110  the breaker's state changes with time alone
                    await asyncio.sleep(POLL_SECONDS)
                return
            if now - began >= MODELS_SECONDS and self._refused() > refused:
                # The next policy is a new one, with which relays sample again.
                self._set_state(ReferenceState.STARTING, "the upstream refused a sampled request; comparing again")
                return
            if now - looked_at >= MODELS_SECONDS:
                looked_at, before = now, self.pair.models
                # A server that does not answer has not lost a model.
                with contextlib.suppress(ReferenceFailure):
                    self.pair = replace(self.pair, reference_adapters=await reference.adapters())
                with contextlib.suppress(ReferenceFailure):
                    self._set_served(await server.models())
                if self.pair.models != before:
                    return
            await asyncio.sleep(POLL_SECONDS)

    def _set_served(self, cards: list[ModelCard]) -> None:
        self.pair = replace(
            self.pair,
            models=frozenset(card.id for card in cards if card.parent is None),
            adapters=frozenset(card.id for card in cards if card.parent is not None),
        )
        self._on_change()

    def _set_state(self, state: ReferenceState, detail: str) -> None:
        if (state, detail) != (self.state, self.detail):
            failed = state in {ReferenceState.MISMATCH, ReferenceState.DOWN}
            log.log(logging.ERROR if failed else logging.INFO, "reference %s: %s", state, detail)
        self.state, self.detail = state, detail
        self._on_change()
