"""From captures to treated requests: the real control process's parts and the real processes of adapters, between a
reference and an engine that compute tiny checkpoints."""

from __future__ import annotations

import asyncio
import importlib.util
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
import numpy as np
import pytest
from tests.support import tiny_checkpoints
from tests.support.captures import capture
from tests.support.children import children
from tests.support.control import control, settings, status_json
from tests.support.fake_lora import FakeLora
from tests.support.fake_vllm import FakeVllm, running
from tests.support.learner_world import kl, logprobs
from tests.support.loops import looping
from tests.support.state_reference import Singles, StateReference, in_process
from tests.support.waiting import until

from hemostat.adapters.live import client
from hemostat.adapters.live.folders import CheckpointFolders
from hemostat.adapters.serving import host
from hemostat.checkpoints.checkpoint_digest import checkpoint_digest
from hemostat.config.schema import Adapter
from hemostat.control import composition
from hemostat.control.composition import Control
from hemostat.engines.messages import LoraState, RankReport
from hemostat.ipc.messages import REST_KIND, Capture, Policy
from hemostat.reference.references import References
from hemostat_calibration.adapters.factors import LowRank
from hemostat_calibration.arrays import Floats, Ids
from hemostat_calibration.profiles.adapter import adapter_layers, max_rank
from hemostat_calibration.statistics.split import held_out
from hemostat_lab.models.copies import Copy

pytestmark = pytest.mark.timeout(900)

V, D = tiny_checkpoints.VOCAB, tiny_checkpoints.HIDDEN
PROMPT, TOKENS, K = 4, 16, 8
HELD_OUT = 0.5
PROCESSES = "hemostat_lab.adapters"
"""The part that the command lines of the processes of copies and builds have in common."""
LONG = 300.0
"""Seconds that only a hang takes: the processes of copies and builds have a low priority."""


class CopyReference(StateReference):
    """The uncompressed checkpoint, as a reference in process."""

    def __init__(self, folder: Path) -> None:
        super().__init__(in_process(str(folder), checkpoint_digest(str(folder), None), V, D, folder))
        self.copy = Copy.load(folder)

    def states(self, prompt: Ids, output: Ids) -> Singles:
        return self.copy.hidden(np.concatenate([prompt, output[:-1]]))[-len(output) :]

    def logits(self, states: Singles) -> Singles:
        return self.copy.head_logits(states)


@dataclass
class CopyVllm(FakeVllm):
    """An engine that serves the compressed checkpoint."""

    copy: Copy | None = None
    layers: dict[str, dict[str, LowRank]] = field(default_factory=dict)
    """Of the adapters that its resolver finds."""

    def logprobs(self, context: list[int], adapter: str | None = None) -> Floats:
        assert self.copy is not None
        return logprobs(self.copy.logits(context, None if adapter is None else self.layers[adapter])[-1:])[0]


class World:
    def __init__(self, plane: Control, engine: CopyVllm, reference: CopyReference) -> None:
        self.one = plane
        self.engine = engine
        self.reference = reference
        self.told: list[Policy] = []
        self.boot = "boot"
        self._seed = 0
        plane.link.set_policy = self.told.append  # type: ignore[method-assign]

    async def reports(self) -> None:
        """As the engine's agent does; its resolver finds every adapter that is known."""
        assert self.engine.lora is not None
        lora, known = self.engine.lora, self.one.profile_manager
        held: list[str] = []
        while True:
            for version in known.lifecycle.adapter_versions():
                if version not in self.engine.layers:
                    profile = known.catalogue[version]
                    self.engine.layers[version] = adapter_layers(profile)
                    lora.resolves[version] = max_rank(profile)
            state = LoraState(lora.slots, lora.max_rank, lora.grouped, len(lora.loaded), lora.was_full)
            report = RankReport(self.boot, 0, 1, held, V, {}, "v1", "0.32.0", adapters=lora.loaded, lora=state)
            held = self.one.engines.reports.update(report, time.monotonic())
            await asyncio.sleep(0.02)

    def serve(self) -> Capture:
        """One request, answered by what the last policy says for its arm. Its tokens are random ones."""
        self._seed += 1
        drawn = np.random.default_rng(self._seed)
        ids = drawn.integers(0, V, PROMPT + TOKENS).astype(np.int32)
        policy = self.told[-1]
        wanted = policy.serving_by_kind.get(REST_KIND)
        available = wanted is not None and wanted in policy.acknowledged
        treated = available and drawn.random() >= policy.control_fraction
        adapter = wanted if treated and wanted in policy.adapters else None
        assert self.engine.copy is not None
        layers = None if adapter is None else self.engine.layers[adapter]
        z = self.engine.copy.logits(ids[:-1], layers)[-TOKENS:]
        log_c = logprobs(z)
        output, rows = ids[PROMPT:], np.arange(TOKENS)
        best = np.full((TOKENS, K + 1), -1, "<i4")
        best[:, :K] = np.argsort(-log_c, 1)[:, :K]
        values = np.take_along_axis(log_c, np.maximum(best, 0).astype(int), 1)
        absent = ~(best == output[:, None]).any(1)
        best[absent, K], values[absent, K] = output[absent], log_c[rows, output][absent]
        values[best < 0] = -np.inf
        return msgspec.structs.replace(
            capture(f"r{self._seed}"),
            model="fake",
            requested=adapter,
            adapter=adapter,
            arm="treated" if treated else "control" if available else "none",
            nonce=f"n{self._seed}",
            prompt_token_ids=ids[:PROMPT].astype("<i4").tobytes(),
            output_token_ids=output.astype("<i4").tobytes(),
            top_k=K,
            candidate_ids=best.tobytes(),
            candidate_logprobs=values.astype("<f4").tobytes(),
            emitted_logprobs=log_c[rows, output].astype("<f4").tobytes(),
            captured_at=time.monotonic(),
        )

    async def requests(self, count: int) -> None:
        """That many more, all of them to their end."""
        pipeline = self.one.pipeline
        for _ in range(count):
            self.one.pipeline.offer(self.serve())
        await until(lambda: pipeline.pending == 0 and not pipeline.users.distances.waiting, LONG)
        self.one.policy.publish()

    async def until(self, condition: Any, requests: int) -> None:
        """Requests until it is so, at most that many."""
        for _ in range(0, requests, 10):
            if condition():
                return
            await self.requests(10)
        assert condition(), status_json(self.one)["adapter"]


@asynccontextmanager
async def world(
    folder: Path, monkeypatch: pytest.MonkeyPatch, calibration: Mapping[str, Any] = MappingProxyType({}), **adapter: Any
) -> AsyncIterator[World]:
    monkeypatch.setattr(composition, "PERIODIC_SECONDS", 0.05)
    monkeypatch.setattr(host, "POLL_SECONDS", 0.1)
    monkeypatch.setattr(host, "SOON_SECONDS", 0.05)
    monkeypatch.setattr(client, "BACKOFF", (0.05,))
    folders: CheckpointFolders = tiny_checkpoints.make_pair(folder)
    reference = CopyReference(folders.reference)
    monkeypatch.setattr(composition, "make_references", lambda _: References(reference))
    fake = CopyVllm(lora=FakeLora(), root=str(folders.compressed), copy=Copy.load(folders.compressed))
    async with running(fake) as server:
        made = settings(
            server.url,
            reference={"backend": "transformers", "model": str(folders.reference)},
            calibration={
                "mode": "auto",
                "min_tokens": 10**6,
                "held_out_fraction": HELD_OUT,
                "control_fraction": 0.5,
                **calibration,
            },
            adapter={"enabled": True, "rank": 4, "max_tokens": 600, **adapter},
        )
        async with control(folder, made, loops=True) as plane:
            made_world = World(plane, fake, reference)
            async with looping(*plane.adapters.loops(), plane.learner.run(), made_world.reports()):
                await until(lambda: plane.monitor.state == "ready", LONG)
                plane.policy.publish()
                yield made_world


async def test_an_adapter_is_collected_for_built_tested_promoted_and_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Adapter, "min_tokens", 600)
    async with world(tmp_path, monkeypatch) as w:
        plane, adapters, profiles = w.one, w.one.adapters, w.one.profile_manager
        assert status_json(plane)["adapter"]["state"] == "collecting"
        await w.until(lambda: adapters.learner.tokens >= 600, 200)
        await until(lambda: bool(profiles.lifecycle.adapter_versions()), LONG)
        (version,) = profiles.lifecycle.adapter_versions()
        await until(lambda: adapters.judge.state == "ready" and version in adapters.hosts.ready, LONG)
        built = status_json(plane)["adapter"]["last_build"]
        assert built["outcome"] == "proposed"
        assert built["version"] == version
        assert built["held_out"]["share"] > 0.3
        await w.until(lambda: profiles.serving.version_by_kind.get(REST_KIND) == version, 400)
        (promoted,) = [e for e in profiles.report.listing()["events"] if e["decision"] == "promote"]
        assert promoted["version"] == version
        assert promoted["evidence"]["figure"] == "total_variation"
        assert w.told[-1].adapters == {version}
        assert version in w.told[-1].acknowledged
        # Clients of the treated arm get what is closer to the reference.
        await w.requests(40)
        arms = status_json(plane)["arms"]
        assert arms["treated"]["requests"] >= 10
        assert arms["treated"]["total_variation"] < 0.8 * arms["control"]["total_variation"]
        # Only held-out units were judged: the other hidden states are for what is learned.
        judged = [ids for ids in w.reference.hidden_for if held_out(plane.templates.assign(ids, b""), HELD_OUT)]
        # On a busy machine some went on without distances, so that no queue grows.
        assert 0 < adapters.judge.judged <= len(judged)
        # The engine starts again: nothing is asked for before it is loaded and probed again.
        assert w.engine.lora is not None
        w.boot = "again"
        w.engine.lora.restart()
        await until(lambda: version not in adapters.hosts.ready, LONG)
        plane.policy.publish()
        assert version not in w.told[-1].acknowledged
        await until(lambda: version in adapters.hosts.ready, LONG)
        # Turned off, both processes end, and nothing is asked for.
        assert children(PROCESSES)
        await plane.actions.set_mode("off")
        await until(lambda: adapters.judge.loaded is None and not children(PROCESSES), LONG)
        assert status_json(plane)["adapter"]["state"] == "off"
        assert status_json(plane)["adapter"]["judge"]["state"] == "off"
        assert REST_KIND not in w.told[-1].serving_by_kind


async def test_without_the_laboratory_no_process_starts_and_the_status_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *more: None if name == "hemostat_lab" else find(name, *more)
    )
    monkeypatch.setattr(Adapter, "min_tokens", 20)
    async with world(tmp_path, monkeypatch) as w:
        await w.requests(10)
        plane, status = w.one, status_json(w.one)["adapter"]
        for part in (status, status["judge"]):
            assert part["state"] == "unavailable"
            assert "not installed: hemostat-lab; pip install" in part["detail"]
        assert status["builds"] == {"refused": 1}
        assert plane.adapters.judge.loaded is None
        assert status_json(plane)["requests"]["scored"] == 10
    said = [entry.getMessage() for entry in caplog.records if "hemostat-lab" in entry.getMessage()]
    assert len(said) == 2, "one line for the process that makes adapters, one for the copies"


def test_the_pair_is_worth_correcting(tmp_path: Path) -> None:
    folders = tiny_checkpoints.make_pair(tmp_path)
    ids = np.random.default_rng(0).integers(0, V, 50)
    log_r, log_c = (logprobs(Copy.load(f).logits(ids)) for f in (folders.reference, folders.compressed))
    assert kl(log_r, log_c) > 0.3
