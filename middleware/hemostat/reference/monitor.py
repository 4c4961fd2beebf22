"""Starts the references, compares each served base model with its own, and again whenever either has changed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from hemostat.config.schema import Settings
from hemostat.metrics import names
from hemostat.metrics.samples import Sample
from hemostat.openai.routes import Form
from hemostat.reference import device
from hemostat.reference.listing import served_pairs, with_adapters, without_own
from hemostat.reference.match import compare
from hemostat.reference.pair import ModelPair, ReferenceState, ServedModels
from hemostat.reference.probes import SPECULATES, State, keeps_responses, probe_shadowing, speculates
from hemostat.reference.protocol import ReferenceFailure
from hemostat.reference.references import References
from hemostat.reference.server import ModelCard, VllmServer
from hemostat.reference.thinking_markers import find_markers
from hemostat.reference.vllm import VllmReference

log = logging.getLogger("hemostat.control")

RETRY_SECONDS = 3.0
"""The pause between attempts to start a reference and to compare it with the upstream."""
MODELS_SECONDS = 30.0
"""The pause between looks at what the servers serve: LoRA adapters may be loaded at run time. Also between attempts for
a model that differs from its reference, while another one is scored."""
POLL_SECONDS = 0.5
NAME_REFERENCE = "name one in reference.models"
SCORES_FAILED = "the last scores failed; trying again"


class ReferenceMonitor:
    """Owns what is known of all models (`served`), and whether any requests can be scored (`state`, `detail`).

    references: None with `reference.backend: none`; then `run` returns at once.
    compressed_scorer: the upstream as a scorer of its own tokens, for the noise floor; it is started with the rest, at
        the engine that was compared.
    scores_fail: True while the circuit breaker of this served base model is open.
    refused: how many sampled requests the upstream has refused so far, for what Hemostat asked on top. More of them
        mean that it may have been restarted with a lower --max-logprobs.
    """

    def __init__(
        self,
        references: References | None,
        settings: Settings,
        *,
        compressed_scorer: VllmReference | None,
        scores_fail: Callable[[str], bool],
        refused: Callable[[], float],
    ) -> None:
        self._references = references
        self._upstream = settings.upstream
        self._top_k = settings.shadow.top_k
        self._reasoning = settings.reasoning
        self._calibrated = settings.calibration.model
        self._adapter_names = settings.adapter.enabled
        self._compressed_scorer = compressed_scorer
        self._waits = _waits_for_upstream(settings)
        self._scores_fail = scores_fail
        self._refused = refused
        self.on_change: Callable[[], None] = lambda: None
        """A function that is called after every change of `served`, `state` or `detail`; whoever follows these sets
        it."""
        self.served = ServedModels()
        self.scored_again: frozenset[str] = frozenset()
        """See `Policy.scored_again`."""
        self.state = ReferenceState.NONE if references is None else ReferenceState.STARTING
        self.detail = "reference.backend is none: nothing is scored" if references is None else ""

    @property
    def ready(self) -> bool:
        """It is True if at least one served model is matched, and its reference answers."""
        return self.state is ReferenceState.READY

    def samples(self) -> Iterator[Sample]:
        if self._references is not None:
            yield Sample(names.REFERENCE_UP, (), float(self.ready))
        # Without a name yet there is one series all the same: dashboards join every figure with this metric.
        result: dict[str, str] = {}
        for pair in self.served.pairs:
            reference = Path(pair.reference.model).name if pair.reference is not None else ""
            result |= dict.fromkeys(pair.names, reference)
        for model, reference in sorted((result or {"": ""}).items()):
            yield Sample(names.MODEL_INFO, (model, reference), 1.0)

    async def run(self) -> None:
        """Starts and compares the references until it is cancelled."""
        if self._references is None:
            return
        upstream = self._upstream
        servers = [VllmServer(url, upstream.api_key, ca=upstream.ca) for url in upstream.servers]
        try:
            while True:
                server = await _first_that_answers(servers)
                await self._match(self._references, server)
                if self.ready:
                    await self._wait_for_change(server)
                else:
                    await asyncio.sleep(RETRY_SECONDS)
        finally:
            for server in servers:
                await server.close()

    async def _cards(self, server: VllmServer) -> list[ModelCard]:
        """Returns the models that clients see."""
        cards = await server.models()
        return without_own(cards) if self._adapter_names else cards

    async def _match(self, references: References, server: VllmServer) -> None:
        """Compares every served base model that is not ready with its reference."""
        if references.first is not None:
            # It loads while the server may still be starting, unless that may need the device.
            if self._waits:
                try:
                    await self._cards(server)
                except ReferenceFailure as failure:
                    self._set_state(ReferenceState.STARTING, f"the upstream does not answer: {failure}")
                    return
            try:
                await references.first.start()
            except ReferenceFailure as failure:
                self._set_state(ReferenceState.DOWN, str(failure))
                return
        try:
            self._set_served(await served_pairs(references, server, await self._cards(server), self.served.pairs))
            if self.state is ReferenceState.STARTING:
                self._set_state(self.state, "the upstream answers; its model is compared with the reference")
            for pair in self.served.pairs:
                if pair.state is not ReferenceState.READY:
                    self._update(await self._compared(pair, server))
            if self._compressed_scorer is not None:
                self._compressed_scorer.set_server(server)
                info = await self._compressed_scorer.start()
                forms = {Form.CHAT, Form.COMPLETIONS}
                if not await keeps_responses(server, info.model):
                    forms.add(Form.RESPONSES)
                self.scored_again = frozenset(forms)
        except ReferenceFailure as failure:
            self._set_state(ReferenceState.STARTING, f"the upstream does not answer: {failure}")
            return
        self._summarize()

    async def _compared(self, pair: ModelPair, server: VllmServer) -> ModelPair:
        """Returns the pair after one attempt to compare the two."""
        scorer = pair.scorer
        if scorer is None:
            return replace(pair, state=ReferenceState.NONE, detail=f"no reference of its own; {NAME_REFERENCE}")
        if self._scores_fail(pair.name):
            return replace(pair, state=ReferenceState.DOWN, detail=SCORES_FAILED)
        try:
            info = await scorer.start()
            pair = replace(pair, reference_adapters=await scorer.adapters())
        except ReferenceFailure as failure:
            return replace(pair, state=ReferenceState.DOWN, detail=str(failure))
        try:
            findings = await probe_shadowing(server, pair.name, self._top_k)
        except ReferenceFailure as failure:
            detail = f"the upstream does not answer: {failure}"
            return replace(pair, state=ReferenceState.STARTING, detail=detail)
        for finding in findings:
            if finding.state is State.NO:
                detail = f"the upstream's {finding.what}: {finding.detail}; {finding.fix}"
                # A failed completion is no property of the server's settings: it may succeed the next time.
                return _unmatched(pair, detail, for_now=finding.transient)
        try:
            match = await compare(self._upstream.at(server.url), scorer, pair.name)
        except ReferenceFailure as failure:
            return replace(pair, state=ReferenceState.DOWN, detail=str(failure))
        if not match.ok:
            return _unmatched(pair, match.detail, for_now=not match.compared)
        result = await find_markers(server, pair.name, self._reasoning)
        log.info("model %s: reasoning: %s", pair.name, result.detail)
        if await speculates(server):
            log.info("model %s: %s", pair.name, SPECULATES)
        detail = f"{info.model} ({info.dtype}), {info.figures_follow}"
        return replace(pair, reference=info, state=ReferenceState.READY, detail=detail, markers=result.markers)

    async def _wait_for_change(self, server: VllmServer) -> None:
        """Returns when models have to be compared (again): one is not ready, its scores failed, the upstream serves
        another one, or it refuses sampled requests. The last is looked at only every MODELS_SECONDS: relays count every
        such request."""
        began = looked_at = time.monotonic()
        refused = self._refused()
        while True:
            now = time.monotonic()
            if self._look_at_scores():
                return
            if now - began >= self._retry_seconds():
                return
            if now - began >= MODELS_SECONDS and self._refused() > refused:
                # The next policy is a new one, with which relays sample again.
                detail = "the upstream refused a sampled request; comparing again"
                self._compare_again(self.served.pairs, ReferenceState.STARTING, detail)
                return
            if now - looked_at >= MODELS_SECONDS:
                looked_at = now
                if await self._look_at_servers(server):
                    return
            await asyncio.sleep(POLL_SECONDS)

    def _look_at_scores(self) -> bool:
        """Notes whose scores have begun to fail; returns True once some may be tried again, or no model is ready any
        more."""
        failing = {pair.name for pair in self.served.pairs if self._scores_fail(pair.name)}
        down = [pair for pair in self.served.pairs if pair.detail == SCORES_FAILED]
        fails = [p for p in self.served.pairs if p.name in failing and p.state is ReferenceState.READY]
        if fails:
            self._compare_again(fails, ReferenceState.DOWN, SCORES_FAILED)
        return not self.ready or any(pair.name not in failing for pair in down)

    def _retry_seconds(self) -> float:
        """Returns how long models that are not ready wait for the next attempt."""
        states = {pair.state for pair in self.served.pairs if pair.detail != SCORES_FAILED}
        if states & {ReferenceState.DOWN, ReferenceState.STARTING}:
            return RETRY_SECONDS
        return MODELS_SECONDS if ReferenceState.MISMATCH in states else float("inf")

    async def _look_at_servers(self, server: VllmServer) -> bool:
        """Notes which adapters were loaded; returns True if the upstream serves other base models."""
        pairs = []
        for pair in self.served.pairs:
            # A server that does not answer has not lost a model.
            with contextlib.suppress(ReferenceFailure):
                if pair.scorer is not None and pair.reference is not None:
                    pair = replace(pair, reference_adapters=await pair.scorer.adapters())  # noqa: PLW2901
            pairs.append(pair)
        try:
            cards = await self._cards(server)
        except ReferenceFailure:
            cards = []
        self._set_served(with_adapters(pairs, cards) if cards else pairs)
        return bool(cards) and {card.id for card in cards if card.parent is None} != self.served.models

    def _compare_again(self, pairs: Iterable[ModelPair], state: ReferenceState, detail: str) -> None:
        for pair in pairs:
            self._update(replace(pair, state=state, detail=detail))
        self._summarize()

    def _update(self, pair: ModelPair) -> None:
        """Puts a pair in the place of the one with its name."""
        old = next(known for known in self.served.pairs if known.name == pair.name)
        if (old.state, old.detail) != (pair.state, pair.detail):
            failed = pair.state in {ReferenceState.MISMATCH, ReferenceState.DOWN}
            text = "model %s: reference %s: %s"
            log.log(logging.ERROR if failed else logging.INFO, text, pair.name, pair.state, pair.detail)
        self._set_served([pair if known.name == pair.name else known for known in self.served.pairs])

    def _set_served(self, pairs: list[ModelPair]) -> None:
        self.served = ServedModels(tuple(pairs), self._calibrated_of(pairs))
        self.on_change()

    def _calibrated_of(self, pairs: list[ModelPair]) -> str:
        """Returns the name of the model that profiles are for: `calibration.model`, else the first one that is matched.

        Once chosen it stays, while it is matched. One whose reference is still awaited is waited for: else what was
        learned for it would be lost whenever the reference of another one starts sooner.
        """
        if self._calibrated is not None:
            return next((p.name for p in pairs if self._calibrated in p.names and p.reference is not None), "")
        if any(p.name == self.served.calibrated_name and p.reference is not None for p in pairs):
            return self.served.calibrated_name
        undecided = next((p for p in pairs if p.reference is not None or not p.compared), None)
        return undecided.name if undecided is not None and undecided.reference is not None else ""

    def _summarize(self) -> None:
        """Sets `state` and `detail` from the states and details of the pairs."""
        pairs = self.served.pairs
        if not pairs:
            self._set_state(ReferenceState.STARTING, "the upstream serves no model yet")
            return
        if not any(pair.scorer is not None for pair in pairs):
            result = ", ".join(sorted(self.served.models))
            self._set_state(ReferenceState.MISMATCH, f"reference.models names none of the served models: {result}")
            return
        concerned = [pair for pair in pairs if pair.scorer is not None]
        ready = [pair for pair in concerned if pair.state is ReferenceState.READY]
        if len(concerned) == 1:
            detail = concerned[0].detail
        else:
            detail = "; ".join(f"{pair.name}: {pair.detail}" for pair in concerned)
        if ready and self._calibrated is not None and not self.served.calibrated_name:
            detail += f"; calibration.model: {self._calibrated} is not matched, so nothing is calibrated"
        self._set_state((ready or concerned)[0].state, detail)

    def _set_state(self, state: ReferenceState, detail: str) -> None:
        if (state, detail) != (self.state, self.detail):
            failed = state in {ReferenceState.MISMATCH, ReferenceState.DOWN}
            log.log(logging.ERROR if failed else logging.INFO, "reference %s: %s", state, detail)
        self.state, self.detail = state, detail
        self.on_change()


def _waits_for_upstream(settings: Settings) -> bool:
    """Returns True if the reference must not choose its device before the upstream answers: a device that is free until
    then may be the one on which the upstream is being started."""
    reference = settings.reference
    devices = {reference.device, *(model.device or reference.device for model in reference.models.values())}
    return device.AUTO in devices and device.has_gpu()


async def _first_that_answers(servers: Sequence[VllmServer]) -> VllmServer:
    """Returns, of several engines that serve the same models, one that can be asked; the first if none answers."""
    for server in servers[: len(servers) if len(servers) > 1 else 0]:
        with contextlib.suppress(ReferenceFailure):
            await server.models()
            return server
    return servers[0]


def _unmatched(pair: ModelPair, detail: str, *, for_now: bool) -> ModelPair:
    """Returns the pair without a match. for_now: no mismatch, and worth another attempt: a match that was found before
    is kept."""
    if for_now:
        return replace(pair, state=ReferenceState.STARTING, detail=detail)
    return replace(pair, state=ReferenceState.MISMATCH, detail=detail, reference=None)
