"""Adapters through the control process: what is tested is loaded and probed, and relays are told."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from tests.support.control import control, settings, status_json, told
from tests.support.fake_lora import FakeLora
from tests.support.fake_vllm import VOCAB, FakeVllm, running
from tests.support.loops import looping
from tests.support.lora_world import FakeCopy, adapter, hurry
from tests.support.waiting import until

from hemostat.control.composition import Control
from hemostat.engines.messages import LoraState, RankReport
from hemostat.ipc.messages import REST_KIND
from hemostat.profiles.decisions import Decision, Reason
from hemostat.profiles.persistence import StoredServing, stored_serving
from hemostat_calibration.errors import HemostatError

ADAPTER, OTHER = adapter(1), adapter(2)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


@asynccontextmanager
async def hosting(folder: Path, lora: FakeLora, mode: str = "auto") -> AsyncIterator[Control]:
    """An imported adapter is tested; the copies answer as a correct engine does."""
    async with running(FakeVllm(lora=lora)) as fake:
        given = settings(fake.url, calibration={"mode": mode}, adapter={"enabled": True})
        async with control(folder, given) as plane:
            plane.profile_manager.set_model_pair("fake", VOCAB)
            plane.profile_manager.operator.import_profile(ADAPTER)
            plane.adapters.judge.logprobs = FakeCopy().logprobs  # type: ignore[method-assign]
            task = asyncio.create_task(plane.adapters.hosts.run())
            try:
                yield plane
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)


async def test_relays_may_ask_for_an_adapter_once_it_is_loaded_and_probed(tmp_path: Path) -> None:
    lora = FakeLora(resolves={ADAPTER.version: 2})
    async with hosting(tmp_path, lora) as plane:
        assert plane.profile_manager.serving.max_adapters is None
        await until(lambda: plane.adapters.hosts.ready)
        policy = told(plane)
        assert policy.adapters == {ADAPTER.version}
        assert ADAPTER.version in policy.acknowledged
        assert plane.profile_manager.serving.max_adapters == 1
        engine = status_json(plane)["adapter"]["engine"]
        assert (engine["state"], engine["ready"]) == ("ready", [ADAPTER.version])
        report = RankReport("another", 0, 1, [], VOCAB, {}, "v1", "0.32.0")
        assert ADAPTER.version in plane.engines.reports.update(report, time.monotonic()), "engines keep it"


async def test_a_version_that_the_engine_applies_wrongly_is_not_tested_any_more(tmp_path: Path) -> None:
    lora = FakeLora(resolves={ADAPTER.version: 2}, scale={ADAPTER.version: 2.0})
    async with hosting(tmp_path, lora) as plane:
        await until(lambda: not plane.profile_manager.trials.queue)
        event = plane.profile_manager.events.newest_first()[0]
        assert (event["decision"], event["reason"]) == (Decision.DROP, Reason.PROBE)
        await until(lambda: lora.names == {})
        assert plane.adapters.hosts.ready == frozenset()


async def test_nothing_is_loaded_while_profiles_are_only_observed(tmp_path: Path) -> None:
    lora = FakeLora(resolves={ADAPTER.version: 2})
    async with hosting(tmp_path, lora, "observe") as plane:
        await asyncio.sleep(0.2)
        assert (lora.names, plane.adapters.hosts.ready) == ({}, frozenset())
        plane.profile_manager.operator.set_mode("auto")
        await until(lambda: plane.adapters.hosts.ready)


# --- over restarts of the control process ----------------------------------------------------------------------------


@asynccontextmanager
async def successor(
    folder: Path, lora: FakeLora, *, boot: str = "boot", enabled: bool = True
) -> AsyncIterator[Control]:
    """A control process with the folder's store, beside an engine that reports. The last one was killed."""
    async with running(FakeVllm(lora=lora)) as fake:
        store = {"url": f"sqlite:///{folder / 'store.db'}"}
        given = settings(fake.url, calibration={"mode": "auto"}, adapter={"enabled": enabled}, store=store)
        async with control(folder, given) as plane:
            plane.profile_manager.set_model_pair("fake", VOCAB)
            plane.adapters.judge.logprobs = FakeCopy().logprobs  # type: ignore[method-assign]

            async def reports() -> None:
                while True:
                    state = LoraState(lora.slots, lora.max_rank, lora.grouped, len(lora.loaded), lora.was_full)
                    report = RankReport(boot, 0, 1, [], VOCAB, {}, "v1", "0.32.0", adapters=lora.loaded, lora=state)
                    plane.engines.reports.update(report, time.monotonic())
                    await asyncio.sleep(0.01)

            async with looping(plane.adapters.hosts.run(), plane.writer.run(), reports()):
                yield plane


KINDS = ("chat text greedy", "chat text sampled")


async def two_serve(folder: Path, lora: FakeLora) -> None:
    """An operator has promoted ADAPTER and pinned OTHER, each for a kind; then the control process is killed: it writes
    nothing more."""
    async with successor(folder, lora) as plane:
        for name in KINDS:
            plane.profile_manager.kinds.update(name)
        for profile in (ADAPTER, OTHER):
            await plane.actions.import_profile(profile.to_bytes())
        await until(lambda: plane.adapters.hosts.capacity == 2)
        await plane.actions.promote(ADAPTER.version, KINDS[0])
        await plane.actions.pin(OTHER.version, KINDS[1])
        await until(lambda: plane.adapters.hosts.ready == {ADAPTER.version, OTHER.version})
        shutil.copy(folder / "store.db", folder / "killed.db")
    (folder / "killed.db").rename(folder / "store.db")


def resolving(slots: int) -> FakeLora:
    return FakeLora(resolves={ADAPTER.version: 2, OTHER.version: 2}, slots=slots)


async def test_what_served_serves_again_once_it_is_probed_and_no_place_is_given_away_before(tmp_path: Path) -> None:
    lora = resolving(3)
    await two_serve(tmp_path, lora)
    async with successor(tmp_path, lora) as plane:
        serving = plane.profile_manager.serving
        assert serving.version_by_kind == {KINDS[0]: ADAPTER.version, KINDS[1]: OTHER.version}
        third = plane.profile_manager.operator.import_profile(adapter(3))
        with pytest.raises(
            HemostatError, match=r"it is not known yet how many adapters the engines have slots for: adapter.engine"
        ):
            plane.profile_manager.operator.promote(third, REST_KIND)
        await until(lambda: plane.adapters.hosts.ready == {ADAPTER.version, OTHER.version})
        policy = told(plane)
        assert policy.serving_by_kind == serving.version_by_kind
        assert set(policy.serving_by_kind.values()) <= set(policy.acknowledged)
        with pytest.raises(HemostatError, match="2 other adapters serve, as many as engines have slots for: roll one"):
            plane.profile_manager.operator.promote(third, REST_KIND)
        # Slots that clients take for a while withdraw nothing.
        lora.names |= {"theirs": "/theirs", "more": "/more"}
        await until(lambda: plane.adapters.hosts.capacity == 0)
        del lora.names["theirs"], lora.names["more"]
        await until(lambda: len(plane.adapters.hosts.ready) == 2)
        assert [e["decision"] for e in plane.profile_manager.events.newest_first()][:2] == ["import", "pin"]


@pytest.mark.parametrize(("slots", "stays"), [(2, {KINDS[1]: OTHER.version}), (1, {})])
async def test_what_an_engine_that_was_started_with_fewer_slots_cannot_hold_is_withdrawn_with_the_reason(
    tmp_path: Path, slots: int, stays: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    """Of two the pinned one stays."""
    await two_serve(tmp_path, resolving(3))
    caplog.set_level("INFO", "hemostat.calibration")
    async with successor(tmp_path, resolving(slots), boot="again") as plane:
        serving = plane.profile_manager.serving
        assert len(serving.version_by_kind) == 2, "not before the slots are known"
        await until(lambda: serving.version_by_kind == stays)
        events = [e for e in plane.profile_manager.events.newest_first() if e["decision"] == Decision.ROLL_BACK]
        assert {(e["version"], e["kind"], e["reason"]) for e in events} == {
            (version, kind, Reason.SLOT)
            for kind, version in zip(KINDS, (ADAPTER.version, OTHER.version), strict=True)
            if kind not in stays
        }
        assert events[0]["why"].endswith(f"fewer adapters than serve: {slots - 1} (--max-loras)")
        lines = [record.getMessage() for record in caplog.records if "roll_back" in record.getMessage()]
        assert len(lines) == len(events)


async def test_where_adapters_are_switched_off_they_are_withdrawn_with_the_reason(tmp_path: Path) -> None:
    await two_serve(tmp_path, resolving(3))
    async with successor(tmp_path, resolving(3), enabled=False) as plane:
        plane.adapters.update()
        assert plane.profile_manager.serving.version_by_kind == {}
        events = plane.profile_manager.events.newest_first()[:2]
        assert {(e["decision"], e["reason"], e["why"]) for e in events} == {
            (Decision.ROLL_BACK, Reason.SETTINGS, "adapter.enabled is false")
        }
        with pytest.raises(HemostatError, match="no engine can load an adapter now"):
            plane.profile_manager.operator.promote(ADAPTER.version)


async def test_an_operators_action_is_in_the_store_when_it_is_answered(tmp_path: Path) -> None:
    async with successor(tmp_path, resolving(3)) as plane:

        def stored() -> StoredServing:
            return stored_serving(plane.store.read().states, pytest.fail)

        await plane.actions.import_profile(ADAPTER.to_bytes())
        assert stored().versions() == {ADAPTER.version}
        await until(lambda: plane.adapters.hosts.capacity == 2)
        await plane.actions.promote(ADAPTER.version, None)
        assert stored().kinds[REST_KIND].version == ADAPTER.version
        await plane.actions.pin(ADAPTER.version, None)
        assert stored().kinds[REST_KIND].pinned
        await plane.actions.rollback("a test", None)
        assert stored().kinds[REST_KIND].version is None
