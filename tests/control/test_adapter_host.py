"""Adapters through the control process: what is tested is loaded and probed, and relays are told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from tests.support.control import control, settings, status_json
from tests.support.fake_lora import FakeLora
from tests.support.fake_vllm import VOCAB, FakeVllm, running
from tests.support.lora_world import FakeCopy, adapter, hurry
from tests.support.waiting import until

from hemostat.control.composition import Control
from hemostat.profiles.decisions import Decision, Reason

ADAPTER = adapter(1)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


@asynccontextmanager
async def hosting(folder: Path, lora: FakeLora, mode: str = "auto") -> AsyncIterator[Control]:
    """An imported adapter is tested; the copies answer as a correct engine does."""
    async with running(FakeVllm(lora=lora)) as fake:
        given = settings(fake.url, calibration={"mode": mode}, adapter={"enabled": True})
        async with control(folder, given) as one:
            one.profile_manager.set_model_pair("fake", VOCAB)
            one.profile_manager.operator.import_profile(ADAPTER)
            one.adapters.judge.logprobs = FakeCopy().logprobs  # type: ignore[method-assign]
            task = asyncio.create_task(one.adapters.hosts.run())
            try:
                yield one
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)


async def test_relays_may_ask_for_an_adapter_once_it_is_loaded_and_probed(tmp_path: Path) -> None:
    lora = FakeLora(resolves={ADAPTER.version: 2})
    async with hosting(tmp_path, lora) as one:
        assert one.profile_manager.serving.max_adapters == 0
        await until(lambda: one.adapters.hosts.ready)
        one.policy.publish()
        policy = one.policy._last
        assert policy is not None
        assert policy.adapters == {ADAPTER.version: False}
        assert ADAPTER.version in policy.acknowledged
        assert one.profile_manager.serving.max_adapters == 1
        assert ADAPTER.version in one.engines._wanted, "engines keep it"
        engine = status_json(one)["adapter"]["engine"]
        assert (engine["state"], engine["ready"]) == ("ready", [ADAPTER.version])


async def test_a_version_that_the_engine_applies_wrongly_is_not_tested_any_more(tmp_path: Path) -> None:
    lora = FakeLora(resolves={ADAPTER.version: 2}, scale={ADAPTER.version: 2.0})
    async with hosting(tmp_path, lora) as one:
        await until(lambda: not one.profile_manager.trials.queue)
        event = one.profile_manager.events.newest_first()[0]
        assert (event["decision"], event["reason"]) == (Decision.DROP, Reason.PROBE)
        await until(lambda: lora.names == {})
        assert one.adapters.hosts.ready == {}


async def test_nothing_is_loaded_while_profiles_are_only_observed(tmp_path: Path) -> None:
    lora = FakeLora(resolves={ADAPTER.version: 2})
    async with hosting(tmp_path, lora, "observe") as one:
        await asyncio.sleep(0.2)
        assert (lora.names, one.adapters.hosts.ready) == ({}, {})
        one.profile_manager.operator.set_mode("auto")
        await until(lambda: one.adapters.hosts.ready)
