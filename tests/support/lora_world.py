"""A fake engine with adapters, its reports, our copy of its model, and an `AdapterHost` that looks after them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import pytest
from tests.support.engine_registry import single_engine
from tests.support.fake_lora import FakeLora
from tests.support.fake_vllm import VOCAB, FakeVllm, running
from tests.support.loops import looping

from hemostat.adapters.serving import host as host_module
from hemostat.adapters.serving import probes as probes_module
from hemostat.adapters.serving import versions as versions_module
from hemostat.adapters.serving.host import AdapterHost, HostState
from hemostat.adapters.serving.loading import SharedFolder
from hemostat.adapters.serving.probing import CopyUnavailable
from hemostat.config.schema import Settings
from hemostat.engines.messages import LoraState, RankReport
from hemostat.engines.reports import PluginReports
from hemostat_calibration.adapters.factors import LowRank
from hemostat_calibration.arrays import Ids, Singles
from hemostat_calibration.profiles.adapter import adapter_profile
from hemostat_calibration.profiles.profile import CalibrationProfile


def unusable_reason(host: AdapterHost) -> str:
    """Returns why no adapter is used; "" while some may be."""
    return host.detail if host.state is HostState.UNUSABLE else ""


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosts wait for hundredths of a second instead of seconds."""
    for module in (versions_module, probes_module):
        monkeypatch.setattr(module, "BACKOFF", (0.02,))
    monkeypatch.setattr(host_module, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(host_module, "SOON_SECONDS", 0.01)


def adapter(seed: int = 0, rank: int = 2) -> CalibrationProfile:
    """An adapter of two small layers."""
    drawn = np.random.default_rng(seed)
    factors = LowRank(
        drawn.standard_normal((rank, 6)).astype(np.float32), drawn.standard_normal((5, rank)).astype(np.float32)
    )
    layers = {f"model.layers.{n}.self_attn.q_proj": factors for n in range(2)}
    return adapter_profile(model="fake", vocab_size=VOCAB, layers=layers)


@dataclass
class FakeCopy:
    """Our copy of the fake model: it is what a correct engine is."""

    model: FakeVllm = field(default_factory=lambda: FakeVllm(lora=FakeLora()))
    asked: list[str | None] = field(default_factory=list)
    answers: bool = True

    async def logprobs(self, ids: Ids, version: str | None) -> Singles:
        self.asked.append(version)
        if not self.answers:
            raise CopyUnavailable("the copy is being loaded")
        result = [self.model.logprobs(ids[:t].tolist(), version)[ids[t]] for t in range(1, len(ids))]
        return np.array(result, np.float32)


@dataclass
class FakeProfiles:
    """What is wanted, and what the host refused."""

    known: dict[str, CalibrationProfile] = field(default_factory=dict)
    versions: list[str] = field(default_factory=list)
    rejected: dict[str, str] = field(default_factory=dict)

    def want(self, *profiles: CalibrationProfile) -> None:
        self.known |= {profile.version: profile for profile in profiles}
        self.versions = [profile.version for profile in profiles]

    def wanted(self) -> Sequence[str]:
        return [version for version in self.versions if version not in self.rejected]

    def get(self, version: str) -> CalibrationProfile | None:
        return self.known.get(version)

    def reject(self, version: str, why: str) -> None:
        self.rejected[version] = why


@dataclass
class LoraWorld:
    fake: FakeVllm
    lora: FakeLora
    profiles: FakeProfiles
    copy: FakeCopy
    registry: PluginReports
    host: AdapterHost
    boot: str | None = "boot"
    """None: no agent reports."""
    changes: int = 0
    second_after: int | None = None
    """A second engine shares the address: the request with this number is the first one that reaches it."""

    def report(self) -> None:
        """As the agent of the engine does about every second."""
        if self.boot is None:
            return
        lora = self.lora
        state = LoraState(lora.slots, lora.max_rank, lora.grouped, len(lora.loaded), lora.was_full)
        adapters = [name for name in lora.loaded if name in self.profiles.known]
        report = RankReport(
            self.boot, 0, 1, [], VOCAB, {}, "v1", "0.32.0", adapters=adapters, lora=state if lora.enabled else None
        )
        self.registry.update(report, time.monotonic())
        if self.second_after is not None:
            there = adapters if self.loads() >= self.second_after else []
            other = msgspec.structs.replace(report, boot_id="second", adapters=there)
            self.registry.update(other, time.monotonic())

    def restart(self, boot: str | None = "again") -> None:
        """The server, with nothing loaded. boot: of its agent's reports; the old agent's last report expires at
        once."""
        self.lora.restart()
        self.registry._engines.clear()
        self.boot = boot

    def loads(self) -> int:
        """Requests that could load an adapter."""
        return sum(body.get("max_tokens") == 1 and "prompt_logprobs" not in body for body in self.fake.requests)


@asynccontextmanager
async def lora_world(
    lora: FakeLora | None = None,
    *,
    reports: bool = True,
    with_copy: bool = True,
    fake: dict[str, Any] | None = None,
    **sections: Any,
) -> AsyncIterator[LoraWorld]:
    """The host runs. reports: the engine's agent reports. fake: fields of the server. sections: further settings."""
    lora = lora or FakeLora()
    async with running(FakeVllm(lora=lora, **(fake or {}))) as server:
        settings = Settings.model_validate({"upstream": {"url": server.url}} | sections)
        profiles, copy, registry = FakeProfiles(), FakeCopy(), PluginReports()

        def changed() -> None:
            world.changes += 1

        host = AdapterHost(
            single_engine(server.url, registry),
            profiles,
            None if settings.adapter.folder is None else SharedFolder(settings.adapter.folder),
            copy=copy if with_copy else None,
            base=lambda: server.model,
            clock=time.monotonic,
            on_change=changed,
        )
        world = LoraWorld(server, lora, profiles, copy, registry, host, "boot" if reports else None)

        async def reporting() -> None:
            while True:
                world.report()
                await asyncio.sleep(0.01)

        async with looping(host.run(), reporting()):
            yield world
