"""Adapters at several engines: loaded, probed and used at each by itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import pytest
from tests.support.engine_registry import engine_registry
from tests.support.fake_lora import FakeLora
from tests.support.fake_vllm import FakeVllm, running
from tests.support.lora_world import FakeCopy, FakeProfiles, adapter, hurry
from tests.support.waiting import until

from hemostat.adapters.serving import hosts as hosts_module
from hemostat.adapters.serving.hosts import AdapterHosts
from hemostat.config.schema import Settings
from hemostat.metrics import names

ONE = adapter(1)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)
    monkeypatch.setattr(hosts_module, "TICK_SECONDS", 0.02)


@dataclass
class Fleet:
    loras: list[FakeLora]
    hosts: AdapterHosts
    profiles: FakeProfiles
    addresses: list[str]
    """That requests are sent to, at present."""
    every: list[str]

    def ready(self) -> list[set[str]]:
        """At each engine."""
        return [set(self.hosts.ready_at(name)) for name in self.every]


@asynccontextmanager
async def fleet(*loras: FakeLora) -> AsyncIterator[Fleet]:
    """Engines without the plugin, so that none has to be found by a tap."""
    async with AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(running(FakeVllm(lora=lora))) for lora in loras]
        settings = Settings.model_validate({"upstream": {"urls": [server.url for server in servers]}})
        current = [server.url.removeprefix("http://") for server in servers]
        profiles = FakeProfiles()
        hosts = AdapterHosts(
            settings,
            engine_registry(settings.upstream, lambda: current),
            profiles,
            copy=FakeCopy(),
            base=lambda: "fake",
            clock=time.monotonic,
            on_change=lambda: None,
        )
        task = asyncio.create_task(hosts.run())
        try:
            yield Fleet(list(loras), hosts, profiles, current, list(current))
            assert not task.done()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def engine(**more: float) -> FakeLora:
    return FakeLora(resolves={ONE.version: 2}, scale=more)


async def test_an_adapter_is_loaded_probed_and_unloaded_at_every_engine() -> None:
    async with fleet(engine(), engine()) as f:
        f.profiles.want(ONE)
        await until(lambda: f.ready() == [{ONE.version}, {ONE.version}])
        assert [lora.loaded for lora in f.loras] == [[ONE.version], [ONE.version]]
        status = f.hosts.status()
        assert [status["by_engine"][name]["ready"] for name in f.every] == [[ONE.version], [ONE.version]]
        assert (status["state"], status["ready"], status["capacity"]) == ("ready", [ONE.version], 1)
        assert status["probes"]["agreement"]["passed"] == 2
        samples = {(s.name, s.labels): s.value for s in f.hosts.samples()}
        assert samples[names.ADAPTERS, ("ready",)] == 1
        assert samples[names.ADAPTER_LOADS, ("loaded",)] == 2
        assert f.hosts.hold == [ONE.version]
        f.profiles.want()
        await until(lambda: [lora.names for lora in f.loras] == [{}, {}])


async def test_a_probe_that_fails_takes_out_that_engine_only(caplog: pytest.LogCaptureFixture) -> None:
    async with fleet(engine(), engine(**{ONE.version: 2.0})) as f:
        f.profiles.want(ONE)
        await until(lambda: f.ready()[0] == {ONE.version} and bool(f.hosts.status()["failures"]))
        assert f.ready() == [{ONE.version}, set()]
        assert f.profiles.rejected == {}
        (line,) = [text for text in caplog.messages if "is not used at" in text]
        assert f.every[1] in line
        assert "\n" not in line
        (place,) = f.hosts.status()["failures"]
        assert place == f"{ONE.version} at {f.every[1]}"
        await until(lambda: f.loras[1].names == {})


async def test_a_version_that_no_engine_applies_is_given_up() -> None:
    async with fleet(engine(**{ONE.version: 2.0}), engine(**{ONE.version: 3.0})) as f:
        f.profiles.want(ONE)
        await until(lambda: ONE.version in f.profiles.rejected)
        assert f.ready() == [set(), set()]


async def test_an_engine_that_restarts_loses_its_own_adapters_only_and_gets_them_again() -> None:
    async with fleet(engine(), engine()) as f:
        f.profiles.want(ONE)
        await until(lambda: f.ready() == [{ONE.version}, {ONE.version}])
        f.loras[1].resolves.clear()
        f.loras[1].restart()
        await until(lambda: f.ready() == [{ONE.version}, set()])
        f.loras[1].resolves[ONE.version] = 2
        await until(lambda: f.ready() == [{ONE.version}, {ONE.version}])


async def test_an_engine_that_leaves_is_forgotten_and_one_that_joins_gets_the_adapters() -> None:
    async with fleet(engine(), engine(), engine()) as f:
        f.addresses[:] = f.every[:2]
        f.profiles.want(ONE)
        await until(lambda: f.ready() == [{ONE.version}, {ONE.version}, set()])
        f.addresses[:] = f.every[1:]
        await until(lambda: f.ready() == [set(), {ONE.version}, {ONE.version}])


async def test_a_version_is_given_up_when_the_last_engine_that_applies_it_leaves() -> None:
    async with fleet(engine(**{ONE.version: 2.0}), engine()) as f:
        f.profiles.want(ONE)
        await until(lambda: f.ready()[1] == {ONE.version} and bool(f.hosts.hosts[f.every[0]].rejected))
        assert f.profiles.rejected == {}
        f.addresses[:] = f.every[:1]
        await until(lambda: ONE.version in f.profiles.rejected)


async def test_an_engine_that_applies_a_version_after_its_restart_keeps_it_in_use() -> None:
    async with fleet(engine(**{ONE.version: 2.0}), engine()) as f:
        f.profiles.want(ONE)
        await until(lambda: f.ready()[1] == {ONE.version} and bool(f.hosts.hosts[f.every[0]].rejected))
        f.loras[0].scale.clear()
        f.loras[0].restart()
        await until(lambda: f.ready() == [{ONE.version}, {ONE.version}])
        f.loras[1].scale[ONE.version] = 2.0
        f.loras[1].restart()
        await until(lambda: bool(f.hosts.hosts[f.every[1]].rejected))
        assert (f.ready()[0], f.profiles.rejected) == ({ONE.version}, {})
