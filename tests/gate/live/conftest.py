"""A gate on live traffic against fake vLLM servers: records as the scorer hands them on, without relays."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
from tests.support.captures import capture
from tests.support.control import settings
from tests.support.fake_vllm import VOCAB, FakeVllm, serving
from tests.support.gate_writes import Writes

from hemostat.gate.live.keeper import ShadowGate
from hemostat.gate.live.stable import StableSide
from hemostat.ipc.messages import Capture
from hemostat.reference.pair import ModelPair
from hemostat.reference.protocol import ReferenceInfo, ScoreRequest
from hemostat.reference.server import VllmServer
from hemostat.reference.vllm import VllmReference
from hemostat.scored_record import ScoredRecord, Use
from hemostat.scoring.capture_arrays import candidates, decode_capture
from hemostat.scoring.engine_scores import EngineScorer
from hemostat.scoring.limits import TokenBudget
from hemostat.scoring.record_builder import build_record
from hemostat_calibration.divergence.per_token import divergence
from hemostat_calibration.gate import live

TOP_K = 20
HOUR = 3600.0
INFO = ReferenceInfo("ref", "digest", "server", VOCAB, False)


@dataclass
class Engines:
    """The registry of the one engine."""

    url: str

    def current(self) -> dict[str, Any]:
        return {"": None}

    def connect(self, name: str, timeout: float) -> VllmServer:
        return VllmServer(self.url, timeout=timeout)


@dataclass
class WorldsOwner:
    """The ownership of the store of one control process."""

    world: World
    writer: Writes

    @property
    def active(self) -> bool:
        return self.world.active


@dataclass
class World:
    """The servers, and the gate of one control process after another."""

    stable: str
    reference: str
    candidate: str
    fakes: dict[str, FakeVllm]
    writes: Writes = field(default_factory=Writes)
    now: float = 1.7e9
    ticks: float = 0.0
    events: list[str] = field(default_factory=list)
    active: bool = True
    settings: dict[str, Any] = field(default_factory=dict)
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(5))
    references: list[VllmReference] = field(default_factory=list)
    _gates: list[ShadowGate] = field(default_factory=list)

    def process(self, writes: Writes | None = None, **more: Any) -> ShadowGate:
        """Returns the gate of a new control process, which has read the store. writes: its own."""
        given = {"reference": {"backend": "vllm", "url": self.reference}, "gate": {"own_answers": 1.0}} | self.settings
        made = settings(self.stable, **(given | more))
        gate = ShadowGate(
            made,
            StableSide(EngineScorer(Engines(self.stable), TOP_K), TokenBudget(0.0, 1.0), lambda: self.ticks),  # type: ignore[arg-type]
            WorldsOwner(self, writes or self.writes),  # type: ignore[arg-type]
            noted=lambda kind, units: 1.0,
            record_event=self.events.append,
            draw=lambda: 0.5,
            clock=lambda: self.ticks,
            wall=lambda: self.now,
        )
        gate.restore(self.writes.blobs)
        self._gates.append(gate)
        return gate

    async def capture(self, prompt: list[int], **more: Any) -> Capture:
        """Returns the capture of an answer of the model that serves."""
        body = {"model": "fake", "prompt": prompt, "max_tokens": 6, "temperature": 1.0} | more
        asked = {"logprobs": TOP_K, "return_token_ids": True, "return_tokens_as_token_ids": True}
        async with httpx.AsyncClient() as client:
            response = await client.post(f"{self.stable}/v1/completions", json=body | asked)
        choice = response.json()["choices"][0]
        return capture(
            top_k=TOP_K,
            model="fake",
            prompt_token_ids=np.array(prompt, "<i4").tobytes(),
            output_token_ids=np.array(choice["token_ids"], "<i4").tobytes(),
            candidate_ids=b"",
            candidate_logprobs=b"",
            emitted_logprobs=b"",
            logprobs=[msgspec.json.encode(choice["logprobs"])],
            finish_reason=choice["finish_reason"],
            decoding=msgspec.json.encode({k: v for k, v in body.items() if k not in ("model", "prompt")}),
        )

    async def scored(self, **more: Any) -> ScoredRecord:
        """Returns the scored record of a prompt that is no variant of another."""
        prompt = self.random.integers(0, 200, 12).tolist()
        made = decode_capture(await self.capture(prompt))
        if not self.references:
            self.references.append(VllmReference(self.reference, top_k=TOP_K))
            await self.references[0].start()
        reference = self.references[0]
        given = candidates(made)
        request = ScoreRequest(
            np.array(prompt, np.int32), np.frombuffer(made.output_token_ids, "<i4").astype(np.int32), given.ids
        )
        record = build_record(made, given, request, await reference.score(request), INFO, None)
        record = replace(record, **more)
        pair = ModelPair("fake", frozenset({"fake"}), scorer=reference)
        return ScoredRecord(record, made, pair, Use.FIGURES, True, True, None, None, divergence(record, None))

    async def close(self) -> None:
        for gate in self._gates:
            await gate.close()
        for reference in self.references:
            await reference.close()

    async def feed(self, gate: ShadowGate, records: int, *, seconds: float = 60.0, so_far: str | None = None) -> None:
        """Hands so many records to the gate, and has each measured, as long as the gate is running and does not say
        `so_far`."""
        for _ in range(records):
            report = gate.report()
            if report["state"] != "running" or (so_far is not None and report["so_far"] == so_far):
                break
            self.now += seconds
            self.ticks += seconds
            gate.update(await self.scored())
            while gate.waiting:
                await gate.step()


@pytest.fixture(autouse=True)
def _few_requests_pass(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass takes a tenth of the requests where servers are asked."""
    if "world" in request.fixturenames:
        monkeypatch.setattr(live, "RUN", 1)


@pytest.fixture
def world() -> Callable[..., Any]:
    """Returns a context with the world of a model that serves, the reference and a candidate."""

    @asynccontextmanager
    async def made(
        stable: FakeVllm, candidate: FakeVllm, reference: FakeVllm | None = None, **more: Any
    ) -> AsyncIterator[World]:
        fakes = {"stable": stable, "candidate": candidate, "reference": reference or FakeVllm()}
        with serving(stable) as ours, serving(candidate) as theirs, serving(fakes["reference"]) as judge:
            here = World(ours, judge, theirs, fakes, **more)
            try:
                yield here
            finally:
                await here.close()

    return made
