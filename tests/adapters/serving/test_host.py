"""The host of adapters against a fake engine: what is loaded, what may be asked for, and what goes wrong."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tests.support.fake_lora import FakeLora
from tests.support.fake_vllm import FakeVllm
from tests.support.lora_world import LoraWorld, adapter, hurry, lora_world, unusable_reason
from tests.support.waiting import until

from hemostat.adapters.serving.host import HostState
from hemostat.adapters.serving.probes import ROUNDED_INPUTS
from hemostat.metrics import names
from hemostat_calibration.profiles.profile import CalibrationProfile

ONE, TWO, LARGE = adapter(1), adapter(2), adapter(3, rank=20)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


def server(*profiles: CalibrationProfile, **more: Any) -> FakeLora:
    """One whose plugin can fetch these."""
    return FakeLora(resolves={profile.version: 2 for profile in profiles or (ONE, TWO)}, **more)


async def ready(world: LoraWorld, *profiles: CalibrationProfile) -> None:
    expected = {profile.version for profile in profiles}
    await until(lambda: world.host.ready == expected)


async def unusable(world: LoraWorld, text: str) -> None:
    await until(lambda: text in unusable_reason(world.host))
    assert "\n" not in unusable_reason(world.host)
    assert world.host.ready == frozenset()
    assert world.host.capacity == 0


async def test_a_wanted_version_is_loaded_acknowledged_and_probed_before_it_is_ready() -> None:
    async with lora_world(server()) as world:
        await asyncio.sleep(0.1)
        assert world.fake.seen == []
        assert world.host.state is HostState.IDLE
        world.profiles.want(ONE)
        await ready(world, ONE)
        assert world.lora.loaded == [ONE.version]
        assert world.copy.asked == [None] * 4 + [ONE.version] * 4
        status = world.host.status()
        assert (status["state"], status["way"], status["capacity"]) == ("ready", "resolver", 1)
        assert "0 of 8 texts" in status["probes"]["isolation"]["detail"]
        assert "correlation 1.000, factor 1.00" in status["probes"]["agreement"]["detail"]
        assert status["probe_tokens"] < 4_000
        samples = {(s.name, s.labels): s.value for s in world.host.samples()}
        assert [samples[names.ADAPTERS, (state,)] for state in ("wanted", "loaded", "ready")] == [1, 1, 1]
        assert samples[names.ADAPTER_PROBES, ("isolation", "passed")] == 1
        assert samples[names.ADAPTER_PROBES, ("agreement", "passed")] == 1
        before = len(world.fake.requests)
        await asyncio.sleep(0.2)
        assert len(world.fake.requests) == before, "nothing is generated once the probes have passed"


async def test_what_is_replaced_is_unloaded_first_and_the_last_slot_stays_free() -> None:
    async with lora_world(server()) as world:
        world.profiles.want(ONE)
        await ready(world, ONE)
        world.profiles.want(TWO, ONE)
        await ready(world, TWO)
        assert world.lora.loaded == [TWO.version]
        assert not world.lora.was_full
        assert world.host.hold == (TWO.version,)
        world.profiles.want()
        await until(lambda: world.host.state is HostState.IDLE)
        assert world.lora.names == {}


async def test_as_many_are_loaded_as_there_are_slots_beside_the_free_one_and_the_clients_own() -> None:
    async with lora_world(server(slots=3)) as world:
        world.profiles.want(ONE, TWO)
        await ready(world, ONE, TWO)
        assert world.host.capacity == 2
        world.fake.adapters = ("theirs",)
        await until(lambda: world.host.capacity == 1)
        await ready(world, ONE)
        world.fake.adapters = ("theirs", "another")
        await unusable(world, "--max-loras 3 is too low for one adapter and 2 of clients: set --max-loras 4")


async def test_a_restarted_engine_is_not_ready_until_it_is_loaded_and_probed_again() -> None:
    async with lora_world(server()) as world:
        world.profiles.want(ONE)
        await ready(world, ONE)
        world.lora.resolves.clear()
        world.restart()
        world.report()
        assert world.host.ready == frozenset(), "at once, from the report alone"
        await unusable(world, "loads no adapters")
        world.lora.resolves[ONE.version] = 2
        await ready(world, ONE)
        assert world.host.status()["probes"]["isolation"]["passed"] == 2
        assert world.host.status()["probes"]["agreement"]["passed"] == 2


async def test_a_name_that_has_vanished_is_noticed_without_reports() -> None:
    async with lora_world(server(), reports=False) as world:
        world.profiles.want(ONE)
        await ready(world, ONE)
        world.restart(None)
        await until(lambda: world.host.status()["probes"]["agreement"]["passed"] == 2)
        await ready(world, ONE)


async def test_a_restart_is_noticed_without_reports_where_a_request_has_loaded_the_version_again() -> None:
    async with lora_world(server(), reports=False) as world:
        world.profiles.want(ONE)
        await ready(world, ONE)
        names, loaded = dict(world.lora.names), list(world.lora.in_slots)
        world.restart(None)
        world.lora.names, world.lora.in_slots = names, loaded
        await until(lambda: world.host.status()["probes"]["agreement"]["passed"] == 2)
        await ready(world, ONE)


async def test_a_rank_that_lost_it_from_its_slots_ends_it_at_once() -> None:
    async with lora_world(server()) as world:
        world.profiles.want(ONE)
        await ready(world, ONE)
        world.lora.in_slots = [None, None]
        world.report()
        assert world.host.ready == frozenset()
        await ready(world, ONE)


async def test_loading_is_repeated_until_every_engine_behind_the_address_has_it() -> None:
    async with lora_world(server()) as world:
        world.second_after = 3
        world.profiles.want(ONE)
        await ready(world, ONE)
        assert world.loads() == 3
        assert "0 of 16 texts" in world.host.status()["probes"]["isolation"]["detail"], "twice as many rows"
        world.second_after = 1_000_000
        world.report()
        assert world.host.ready == frozenset()


@pytest.mark.parametrize("metrics", [True, False])
async def test_an_engine_without_lora_is_said_once_with_its_flags(
    metrics: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async with lora_world(server(enabled=False, shows_metrics=metrics)) as world:
        world.profiles.want(ONE)
        await unusable(world, "LoRA is not enabled: start vLLM with --enable-lora --max-loras 2 --max-lora-rank 8")
        looks = len(world.fake.seen)
        await until(lambda: len(world.fake.seen) > looks + 10)
        asked = [path for path, body in world.fake.seen if body.get("model") == ONE.version]
        assert bool(asked) != metrics, "where its metrics show that it has none, none is asked for"
        said = [record.getMessage() for record in caplog.records if "LoRA is not enabled" in record.getMessage()]
        assert len(said) == (1 if metrics else 2), "of the version, too, where it was asked for"
        world.lora.enabled = True
        await ready(world, ONE)


async def test_an_engine_that_is_started_again_without_lora() -> None:
    async with lora_world(server()) as world:
        world.profiles.want(ONE)
        await ready(world, ONE)
        world.restart()
        world.lora.enabled = False
        await unusable(world, "--enable-lora")


async def test_a_server_without_routes_and_plugin_is_said_with_its_environment() -> None:
    async with lora_world(FakeLora(), reports=False) as world:
        world.profiles.want(ONE)
        await unusable(world, "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True HEMOSTAT_ADAPTERS=1, or set adapter.folder")


async def test_a_rank_that_is_too_large_is_not_loaded() -> None:
    async with lora_world(server(LARGE, max_rank=16)) as world:
        world.profiles.want(LARGE)
        await unusable(world, "rank 20 is above --max-lora-rank 16: set --max-lora-rank 32")
        assert world.loads() == 0
    async with lora_world(FakeLora(resolves={LARGE.version: 20}, max_rank=16), reports=False) as world:
        world.profiles.want(LARGE)
        await unusable(world, "the engine refused it: start vLLM with --enable-lora --max-loras 2 --max-lora-rank 32")


async def test_a_server_that_was_full_is_not_used_until_it_restarts() -> None:
    async with lora_world(server()) as world:
        world.lora.was_full = True
        world.profiles.want(ONE)
        await unusable(world, "restart vLLM with --max-loras 3")
        assert world.loads() == 0
        world.restart()
        await ready(world, ONE)
        world.lora.was_full = True
        world.report()
        assert world.host.ready == frozenset()
        world.lora.grouped = True
        await ready(world, ONE)


async def test_rows_that_get_an_adapter_they_did_not_ask_for_are_found() -> None:
    """A stock server with one slot: it is full, and rows without an adapter beside it get the adapter."""
    async with lora_world(server(slots=1), reports=False, fake={"token_delay": 0.001}) as world:
        world.profiles.want(ONE)
        await unusable(world, "restart vLLM with --max-loras 2 (adapters + 1)")
        assert "8 of 8 texts" in unusable_reason(world.host)
        assert world.host.status()["probes"]["isolation"]["failed"] == 2
        before = len(world.fake.requests)
        await asyncio.sleep(0.1)
        assert len(world.fake.requests) == before, "it is not probed again"
        world.lora.slots = 2
        world.restart(None)
        await ready(world, ONE)


async def test_the_isolation_is_probed_again_whenever_something_is_loaded() -> None:
    """An adapter of a client's takes the last slot: without reports, only the probe finds it."""
    async with lora_world(server(), reports=False, fake={"token_delay": 0.001}) as world:
        world.profiles.want(ONE)
        await ready(world, ONE)
        world.lora.names["theirs"] = "/somewhere"
        world.lora.resolve("theirs")
        await unusable(world, "(adapters + 1)")


@pytest.mark.parametrize("wrong", ["twice", "not at all", "another", "backwards"])
async def test_an_adapter_that_is_applied_wrongly_is_rejected(wrong: str) -> None:
    async with lora_world(server()) as world:
        if wrong == "another":
            world.lora.swapped[ONE.version] = TWO.version
        else:
            world.lora.scale[ONE.version] = {"twice": 2.0, "not at all": 0.0, "backwards": -1.0}[wrong]
        world.profiles.want(ONE)
        await until(lambda: ONE.version in world.profiles.rejected)
        assert "does not apply it as our copy does" in world.profiles.rejected[ONE.version]
        assert world.profiles.rejected[ONE.version].endswith(f"({ROUNDED_INPUTS})")
        assert world.host.ready == frozenset()
        world.profiles.want(TWO)
        await ready(world, TWO)


async def test_small_effects_are_judged_by_their_size() -> None:
    """Half of the effect's size is noise of the engine: twice the effect is still found."""
    for scale, rejected in ((1.0, False), (2.0, True)):
        async with lora_world(server(strength=0.3), fake={"noise": 0.15}) as world:
            assert world.copy.model.lora is not None
            world.copy.model.lora.strength = 0.3
            world.lora.scale[ONE.version] = scale
            world.profiles.want(ONE)
            await until(lambda: bool(world.host.ready or world.profiles.rejected))
            assert bool(world.profiles.rejected) == rejected, world.host.status()


async def test_a_copy_of_another_model_takes_the_family_out() -> None:
    async with lora_world(server()) as world:
        world.copy.model = FakeVllm(seed=5, lora=FakeLora())
        world.profiles.want(ONE)
        await unusable(world, "is not the model of adapter.compressed")
        assert world.profiles.rejected == {}


async def test_without_a_copy_only_isolation_is_probed_and_a_copy_that_starts_is_waited_for() -> None:
    async with lora_world(server(), with_copy=False) as world:
        world.profiles.want(ONE)
        await ready(world, ONE)
        assert "no copy" in world.host.status()["probes"]["agreement"]["detail"]
    async with lora_world(server()) as world:
        world.copy.answers = False
        world.profiles.want(ONE)
        await until(lambda: world.host.status()["probes"]["agreement"]["waiting"] > 1)
        assert world.host.ready == frozenset()
        assert unusable_reason(world.host) == ""
        world.copy.answers = True
        await ready(world, ONE)


async def test_a_version_that_makes_the_engine_fail_is_rejected() -> None:
    async with lora_world(server()) as world:
        world.lora.broken.add(ONE.version)
        world.profiles.want(ONE, TWO)
        await until(lambda: bool(world.host.status()["failures"]))
        assert world.host.ready == frozenset()


async def test_from_a_shared_folder(tmp_path: Path) -> None:
    async with lora_world(FakeLora(), reports=False, adapter={"folder": str(tmp_path / "shared")}) as world:
        world.profiles.want(ONE)
        await ready(world, ONE)
        assert world.host.status()["way"] == "folder"
        assert world.lora.names == {ONE.version: str(tmp_path / "shared" / ONE.version)}
        assert [path.name for path in (tmp_path / "shared").iterdir()] == [ONE.version]
        world.profiles.want(TWO)
        await ready(world, TWO)
        assert list(world.lora.names) == [TWO.version]


async def test_a_folder_that_the_engine_does_not_see(tmp_path: Path) -> None:
    async with lora_world(FakeLora(sees_folders=False), reports=False, adapter={"folder": str(tmp_path)}) as world:
        world.profiles.want(ONE)
        await unusable(world, "mount it there at the same path")
    (tmp_path / "file").write_text("")
    async with lora_world(FakeLora(), reports=False, adapter={"folder": str(tmp_path / "file")}) as world:
        world.profiles.want(ONE)
        await unusable(world, "adapter.folder: ")


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ({"api_key": "secret"}, "set upstream.api_key"),
        ({"replace_body": '{"data": [{"id": 3}]}'}, ""),
        ({"replace_body": ""}, ""),
        ({"replace_body": "[]"}, ""),
    ],
)
async def test_an_upstream_that_refuses_or_sends_half_answers(fault: dict[str, Any], text: str) -> None:
    async with lora_world(server(), fake=fault) as world:
        world.profiles.want(ONE)
        if text:
            await unusable(world, text)
        await until(lambda: world.host.state in {HostState.WAITING, HostState.UNUSABLE})
        assert world.host.ready == frozenset()
        world.fake.api_key = world.fake.replace_body = None
        await ready(world, ONE)


async def test_half_of_the_probabilities_pass_no_probe() -> None:
    async with lora_world(server(), fake={"short_prompt_logprobs": True}) as world:
        world.profiles.want(ONE)
        await until(lambda: ONE.version in world.profiles.rejected)
        assert "sent prompt_logprobs of" in world.profiles.rejected[ONE.version]


async def test_an_upstream_that_is_gone_is_not_ready_and_comes_back() -> None:
    async with lora_world(server()) as world:
        world.profiles.want(ONE)
        await ready(world, ONE)
        world.fake.replace_body = "gone"
        await until(lambda: world.host.ready == frozenset())
        world.fake.replace_body = None
        await ready(world, ONE)
        assert world.host.status()["probes"]["isolation"]["passed"] == 1, "it was not restarted"


async def test_adapters_of_another_hemostat_stay_while_there_is_room() -> None:
    strange = "f" * 32
    async with lora_world(server(slots=3)) as world:
        world.lora.resolves[strange] = 2
        world.lora.resolve(strange)
        world.profiles.want(ONE)
        await ready(world, ONE)
        assert strange in world.lora.names
        world.profiles.want(ONE, TWO)
        await ready(world, ONE, TWO)
        assert strange not in world.lora.names
