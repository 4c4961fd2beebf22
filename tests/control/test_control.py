"""The control process's own wiring, in one process: matching, adapters, failures that must not spread."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import numpy as np
import pytest
from tests.support.adapters import adapter
from tests.support.admin_server import admin_client
from tests.support.captures import capture
from tests.support.control import AUTHORIZED, control, lose, profile, scored, settings, status_json
from tests.support.fake_vllm import VOCAB, FakeVllm, serving
from tests.support.temperature_bias import temperature_bias
from tests.support.waiting import HANG_SECONDS, until

from hemostat.config.schema import Settings
from hemostat.control import composition, operator_actions, ownership
from hemostat.control.composition import Control
from hemostat.engines.messages import RankReport
from hemostat.ipc.messages import Policy, Stats
from hemostat.profiles.persistence import stored_mode
from hemostat.profiles.serving import ServedModel
from hemostat.reference import monitor
from hemostat.reference.match import Match
from hemostat.scoring.record_reader import MAX_AGE_SECONDS
from hemostat.store import writer as writer_module
from hemostat.store.protocol import NotActiveError, StoreFailure


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "RETRY_SECONDS", 0.05)
    monkeypatch.setattr(monitor, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(composition, "PERIODIC_SECONDS", 0.02)
    monkeypatch.setattr(monitor, "MODELS_SECONDS", 0.1)


@pytest.fixture
def upstream() -> Iterator[tuple[FakeVllm, str]]:
    fake = FakeVllm(noise=0.5)
    with serving(fake) as url:
        yield fake, url


@pytest.fixture
def reference() -> Iterator[tuple[FakeVllm, str]]:
    fake = FakeVllm()
    with serving(fake) as url:
        yield fake, url


def pair(ours: str, theirs: str, **more: Any) -> Settings:
    return settings(ours, reference={"backend": "vllm", "url": theirs}, **more)


@asynccontextmanager
async def watched(folder: Path, made: Settings) -> AsyncIterator[tuple[Control, list[Policy]]]:
    """With every loop running, and the policies that relays are told."""
    async with control(folder, made, loops=True) as plane:
        told: list[Policy] = []
        pass_on = plane.link.set_policy

        def note(policy: Policy) -> None:
            told.append(policy)
            pass_on(policy)

        plane.link.set_policy = note  # type: ignore[method-assign]
        yield plane, told


async def test_two_models_that_fit_are_scored(
    upstream: tuple[FakeVllm, str], reference: tuple[FakeVllm, str], tmp_path: Path
) -> None:
    async with watched(tmp_path, pair(upstream[1], reference[1])) as (plane, told):
        await until(lambda: plane.monitor.state == "ready")
        assert told[-1].scoring
        assert plane.monitor.served.models == {"fake"}
        assert plane.profile_manager.serving.model == ServedModel("fake", VOCAB)


async def test_an_upstream_that_gives_fewer_logprobs_is_a_mismatch_that_says_what_to_set(
    upstream: tuple[FakeVllm, str], reference: tuple[FakeVllm, str], tmp_path: Path
) -> None:
    fake, url = upstream
    fake.max_logprobs = 3
    async with watched(tmp_path, pair(url, reference[1])) as (plane, told):
        await until(lambda: plane.monitor.state == "mismatch")
        assert "--max-logprobs 4" in plane.monitor.detail
        assert "shadow.top_k" in plane.monitor.detail
        assert not told[-1].scoring
        plane.pipeline.offer(capture())
        assert status_json(plane)["requests"]["dropped"] == {"reference_not_ready": 1}
        fake.max_logprobs = 4
        await until(lambda: plane.monitor.state == "ready")
        assert told[-1].scoring


async def test_another_vocabulary_is_a_mismatch(
    upstream: tuple[FakeVllm, str], reference: tuple[FakeVllm, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = FakeVllm.other

    def other_ids(self: FakeVllm, route: tuple[str, str], body: bytes) -> tuple[int, Any]:
        status, value = original(self, route, body)
        if route[1] == "/tokenize" and self is reference[0]:
            value["tokens"] = [token + 1 for token in value["tokens"]]
        return status, value

    monkeypatch.setattr(FakeVllm, "other", other_ids)
    async with watched(tmp_path, pair(upstream[1], reference[1])) as (plane, told):
        await until(lambda: plane.monitor.state == "mismatch")
        assert "token ids of a probe text" in plane.monitor.detail
        assert not told[-1].scoring


async def test_an_upstream_that_is_not_there_yet_is_waited_for(
    reference: tuple[FakeVllm, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(FakeVllm()) as url:
        pass
    async with watched(tmp_path, pair(url, reference[1])) as (plane, _):
        await until(lambda: "does not answer" in plane.monitor.detail)
        assert plane.monitor.state == "starting"
        while_compared = []
        compare = monitor.compare

        async def noted(*given: Any) -> Match:
            while_compared.append(plane.monitor.detail)
            return await compare(*given)

        monkeypatch.setattr(monitor, "compare", noted)
        with serving(FakeVllm(), int(url.rpartition(":")[2])):
            await until(lambda: plane.monitor.state == "ready")
        # A busy server takes a while for it.
        assert set(while_compared) == {"the upstream answers; its model is compared with the reference"}


async def test_relays_are_informed_of_adapters_as_they_come_and_go(
    upstream: tuple[FakeVllm, str], reference: tuple[FakeVllm, str], tmp_path: Path
) -> None:
    fake, url = upstream
    fake.adapters = ("lora",)
    async with watched(tmp_path, pair(url, reference[1])) as (plane, told):
        await until(lambda: plane.monitor.state == "ready")
        assert told[-1].unscorable_models == {"lora"}
        fake.adapters = ("lora", "sql")
        await until(lambda: told[-1].unscorable_models == {"lora", "sql"})
        plane.pipeline.offer(capture(model="loaded-since"))
        await until(lambda: status_json(plane)["requests"]["skipped"] == {"unknown_model": 1})
        fake.adapters = ()
        await until(lambda: told[-1].unscorable_models == frozenset())
        assert plane.monitor.state == "ready"


async def test_an_adapter_that_the_reference_serves_too_is_scored_with_it(
    upstream: tuple[FakeVllm, str], reference: tuple[FakeVllm, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (fake, url), (other, other_url) = upstream, reference
    fake.adapters, other.adapters = ("sql", "chat"), ("sql", "more")
    made = pair(url, other_url, calibration={"mode": "auto"}, shadow={"top_k": 4, "floor_fraction": 1})
    async with watched(tmp_path, made) as (plane, told):
        await until(lambda: plane.monitor.state == "ready")
        assert told[-1].unscorable_models == {"chat"}
        assert status_json(plane)["compressed"] == {"models": ["fake"], "adapters": ["sql"]}
        assert plane.noise_floor is not None
        offered: list[Any] = []
        monkeypatch.setattr(plane.noise_floor, "offer", lambda *given: offered.append(given))
        for model in ("sql", "fake", "chat"):
            plane.pipeline.offer(capture(model=model))
        await until(lambda: plane.pipeline.scorer is not None and plane.pipeline.scorer.pending == 0)
        assert status_json(plane)["requests"]["scored"] == 2
        assert status_json(plane)["requests"]["skipped"] == {"unknown_model": 1}
        assert {r["model"] for r in other.requests if "prompt_logprobs" in r} == {"sql", "fake"}
        assert len(offered) == 1, "the noise floor is of the model itself"
        own = temperature_bias("fake", VOCAB, 1.0, np.linspace(-0.5, 0.5, VOCAB), 1.0)
        version = plane.profile_manager.operator.import_profile(own)
        plane.profile_manager.operator.promote(version, "rest")
        plane.policy.publish()
        assert told[-1].serving_by_kind == {"rest": version}
        other.adapters = ()
        await until(lambda: told[-1].unscorable_models == {"sql", "chat"})
        assert plane.monitor.state == "ready"


async def test_another_model_behind_the_same_address_is_matched_anew(
    upstream: tuple[FakeVllm, str], reference: tuple[FakeVllm, str], tmp_path: Path
) -> None:
    fake, url = upstream
    async with watched(tmp_path, pair(url, reference[1])) as (plane, _):
        await until(lambda: plane.monitor.state == "ready")
        fake.model = "another"
        await until(
            lambda: (
                plane.profile_manager.serving.model is not None
                and plane.profile_manager.serving.model.name == "another"
            )
        )
        assert plane.monitor.served.models == {"another"}


async def test_a_reference_that_dies_stops_the_sampling_and_comes_back(
    upstream: tuple[FakeVllm, str], reference: tuple[FakeVllm, str], tmp_path: Path
) -> None:
    fake, url = reference
    async with watched(tmp_path, pair(upstream[1], url)) as (plane, told):
        plane.breakers.of("fake").cooldown = 0.2
        await until(lambda: plane.monitor.state == "ready")
        fake.status = 500
        for _ in range(plane.breakers.of("fake").threshold):
            plane.pipeline.offer(capture(model="fake"))
        await until(lambda: plane.monitor.state == "down")
        assert status_json(plane)["requests"]["dropped"]["reference_http_error"] == plane.breakers.of("fake").threshold
        assert not told[-1].scoring
        fake.status = None
        await until(lambda: plane.monitor.state == "ready")
        assert told[-1].scoring


async def test_a_bug_in_calibration_costs_no_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*_: object) -> None:
        raise RuntimeError("a bug")

    async with control(tmp_path) as plane:
        monkeypatch.setattr(plane.profile_manager, "update", bug)
        plane.pipeline.update(*scored(captured_at=time.monotonic()))
        assert plane.measured.measurements.tokens == 3
        assert plane.registry.get_sample_value("hemostat_internal_errors_total", {"part": "calibration"}) == 1


@pytest.mark.parametrize(("age", "judged"), [(MAX_AGE_SECONDS - 60.0, 1), (MAX_AGE_SECONDS + 1.0, 0)])
async def test_evidence_that_is_too_old_is_measured_and_judges_no_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, age: float, judged: int
) -> None:
    """Requests that are scored at once may also wait for a reference that is slow."""
    seen: list[str] = []
    async with control(tmp_path) as plane:
        monkeypatch.setattr(plane.profile_manager, "update", lambda scored: seen.append(scored.record.kind))
        plane.pipeline.update(*scored(captured_at=time.monotonic() - age))
        assert len(seen) == judged
        assert plane.measured.measurements.tokens == 3


async def test_consumers_of_records_know_only_the_kinds_that_are_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result: list[str] = []
    async with control(tmp_path, settings(evidence={"kinds": 1})) as plane:
        told: list[Policy] = []
        plane.link.set_policy = told.append  # type: ignore[method-assign]
        monkeypatch.setattr(plane.profile_manager, "update", lambda scored: result.append(scored.record.kind))
        for n, kind in enumerate(["chat text greedy", "chat json greedy", "", "chat text greedy"]):
            plane.pipeline.update(*scored(str(n), prompt=n, kind=kind, captured_at=time.monotonic()))
        assert result == ["chat text greedy", "rest", "rest", "chat text greedy"]
        assert told[-1].kinds == {"chat text greedy"}


async def test_policies_are_sent_when_something_changed_and_only_then(tmp_path: Path) -> None:
    async with control(tmp_path) as plane:
        told: list[Policy] = []
        plane.link.set_policy = told.append  # type: ignore[method-assign]
        for _ in range(5):
            plane.policy.publish()
        assert len(told) == 1
        plane.profile_manager.operator.set_mode("auto")
        plane.policy.publish()
        assert [policy.generation for policy in told] == [1, 2]
        assert msgspec.structs.replace(told[0], generation=2, mode="auto") == told[1]


async def test_a_store_that_refuses_is_counted_and_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "RETRY_SECONDS", (0.01,))
    made = settings(store={"url": f"sqlite:///{tmp_path / 'store.db'}"})
    async with control(tmp_path, made, loops=True) as plane:
        plane.profile_manager.set_model_pair("m", 30)
        plane.profile_manager.operator.import_profile(profile())
        assert await plane.writer.wait_until_written(10.0)
        with monkeypatch.context() as full_disk:
            full_disk.setattr(plane.store, "commit", full)
            plane.profile_manager.operator.import_profile(profile(1))
            plane.profile_manager.operator.set_mode("auto")
            await until(lambda: plane.store_errors.count > 2)
            assert plane.ownership.active
        assert await plane.writer.wait_until_written(30.0)
        result = plane.store.read()
        assert [event["decision"] for event in result.events] == ["mode", "import", "import"]
        assert (len(result.profiles), stored_mode(result.states, "observe")) == (2, "auto")


async def test_a_store_that_cannot_be_read_is_unknown_and_not_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is decided or written until it was read; then all goes on from it."""
    monkeypatch.setattr(ownership, "RETRY_SECONDS", (0.01,))
    path = tmp_path / "store.db"
    made = settings(store={"url": f"sqlite:///{path}"}, calibration={"mode": "auto"})
    async with control(tmp_path, made) as plane:
        plane.profile_manager.set_model_pair("m", 30)
        plane.profile_manager.operator.promote(plane.profile_manager.operator.import_profile(profile()))
    intact = path.read_bytes()
    path.write_bytes(b"no database " * 1000)
    other = Control(made, 1234)
    starting = asyncio.create_task(other.start())
    await other.ownership.settled.wait()
    await until(lambda: other.store_errors.count > 2)
    assert not starting.done()
    assert not other.link.relays
    assert status_json(other)["control"] == {
        "state": "reading",
        "detail": f"what is stored is not known: store {path}: file is not a database",
    }
    for action in (
        other.actions.set_mode("off"),
        other.actions.rollback("", None),
        other.actions.drain("a", ends=True),
    ):
        with pytest.raises(NotActiveError, match="not active: what is stored is not known"):
            await action
    assert path.read_bytes() == b"no database " * 1000
    path.write_bytes(intact)
    await asyncio.wait_for(starting, HANG_SECONDS)
    other.profile_manager.set_model_pair("m", 30)
    assert other.profile_manager.serving.version == profile().version
    await other.close()


async def test_what_was_decided_is_written_before_it_ends(tmp_path: Path) -> None:
    made = settings(store={"url": f"sqlite:///{tmp_path / 'store.db'}"})
    async with control(tmp_path, made) as plane:
        plane.profile_manager.operator.set_mode("off")
    async with control(tmp_path, made) as plane:
        assert plane.profile_manager.serving.mode == "off"
        assert [event["decision"] for event in plane.profiles.listing()["events"]] == ["mode"]


def full(*_: object) -> NoReturn:
    raise StoreFailure("database or disk is full")


async def test_an_action_that_cannot_be_kept_applies_is_not_answered_as_done_and_is_kept_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operator_actions, "MAX_WRITE_SECONDS", 0.05)
    monkeypatch.setattr(writer_module, "RETRY_SECONDS", (0.01,))
    made = settings(store={"url": f"sqlite:///{tmp_path / 'store.db'}"}, calibration={"mode": "auto"})
    async with control(tmp_path, made) as plane, admin_client(plane) as client:
        version = plane.profile_manager.operator.import_profile(profile())
        assert await plane.writer.wait_until_written(30.0)
        with monkeypatch.context() as full_disk:
            full_disk.setattr(plane.store, "commit", full)
            for action, body in (("promote", {"version": version}), ("pin", {"version": version}), ("rollback", {})):
                answer = await client.post(f"/api/v1/profiles/{action}", headers=AUTHORIZED, json=body)
                assert answer.status_code == 507, answer.text
                assert "the store does not answer: it is kept as soon as that answers" in answer.json()["detail"]
                assert (plane.profile_manager.serving.selected == version) is (action != "rollback"), action
            answer = await client.post("/api/v1/profiles", headers=AUTHORIZED, content=profile(1).to_bytes())
            assert answer.status_code == 507
            answer = await client.post("/api/v1/calibration", headers=AUTHORIZED, json={"mode": "off"})
            assert answer.status_code == 507
            assert plane.profile_manager.serving.mode == "off"
        assert await plane.writer.wait_until_written(30.0)
        result = plane.store.read()
        assert stored_mode(result.states, "auto") == "off"
        decisions = [event["decision"] for event in result.events]
        assert decisions == ["mode", "import", "roll_back", "pin", "promote", "import"]


async def test_one_of_two_with_the_same_store_is_active_and_the_other_continues_from_it(tmp_path: Path) -> None:
    made = settings(store={"url": f"sqlite:///{tmp_path / 'store.db'}"}, calibration={"mode": "auto"})
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
    other = Control(made, 1234)
    async with control(folders[0], made) as plane:
        plane.profile_manager.set_model_pair("m", 30)
        plane.profile_manager.operator.promote(plane.profile_manager.operator.import_profile(profile()))
        starting = asyncio.create_task(other.start())
        await other.ownership.settled.wait()
        async with admin_client(other) as client:
            ready = await client.get("/readyz")
            assert (ready.status_code, ready.text) == (200, "standby\n")
            for path, body in (
                ("calibration", {"mode": "off"}),
                ("profiles/rollback", {}),
                ("engine/report", {}),
            ):
                answer = await client.post(f"/api/v1/{path}", headers=AUTHORIZED, json=body)
                assert answer.status_code == 503, answer.text
                assert answer.json()["detail"].startswith("not active: another process owns the store; ask the")
                assert answer.headers["retry-after"] == "2"
            shown = (await client.get("/metrics", headers=AUTHORIZED)).text
            series = {line.split()[0] for line in shown.splitlines() if line.startswith("hemostat_")}
            own = {"hemostat_config_last_reload_successful", "hemostat_store_errors_total"}
            assert series == own, "a relay that is not connected here, and a reference that is not loaded, are no alert"
            state = (await client.get("/api/v1/status", headers=AUTHORIZED)).json()
            assert state["control"] == {"state": "standby", "detail": "another process owns the store"}
            assert state["state"] == {"level": "ok", "problems": []}
            gate = (await client.get("/api/v1/gate")).json()
            why = "this control process is not active: another process owns the store"
            assert (gate["state"], gate["why"]) == ("none", why)
            assert (await client.post("/api/v1/gate/confirm-promotion")).status_code == 409
    await asyncio.wait_for(starting, HANG_SECONDS)
    other.profile_manager.set_model_pair("m", 30)
    assert other.profile_manager.serving.version == profile().version
    assert [event["decision"] for event in other.profiles.listing()["events"]] == ["promote", "import"]
    await other.close()


async def test_while_it_is_suspended_records_decide_nothing_and_off_applies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operator_actions, "MAX_WRITE_SECONDS", 0.05)
    made = settings(store={"url": f"sqlite:///{tmp_path / 'store.db'}"}, calibration={"mode": "auto"})
    async with control(tmp_path, made) as plane, admin_client(plane) as client:
        told: list[Policy] = []
        plane.link.set_policy = told.append  # type: ignore[method-assign]
        await lose(plane, "the session has ended")
        plane.pipeline.update(*scored())
        assert plane.measured.measurements.tokens == 0
        for mode, code in (("observe", 503), ("off", 507)):
            answer = await client.post("/api/v1/calibration", headers=AUTHORIZED, json={"mode": mode})
            assert answer.status_code == code
        assert told[-1].mode == "off"
        assert [alert["alert"] for alert in status_json(plane)["state"]["problems"]][-1] == "HemostatStoreErrors"
        assert await plane.ownership.try_to_regain()
        assert await plane.writer.wait_until_written(30.0)
        assert stored_mode(plane.store.read().states, "auto") == "off"
        plane.pipeline.update(*scored())
        assert plane.measured.measurements.tokens > 0


async def test_closing_writes_what_was_queued(tmp_path: Path) -> None:
    async with control(tmp_path) as plane:
        plane.writer.set_state("a", "b")
    assert plane.store.read().states["a"] == "b"


async def test_the_cost_of_a_status_and_of_a_scrape_does_not_grow_with_the_records(tmp_path: Path) -> None:
    """Counted in Python calls, which do not depend on how busy the machine is."""
    async with control(tmp_path) as plane:
        plane.profile_manager.set_model_pair("m", 30)
        for seed in range(4):
            plane.profile_manager.operator.import_profile(profile(seed))

        def calls() -> tuple[int, int]:
            return count_calls(plane.status.current), count_calls(lambda: list(plane.registry.collect()))

        for n in range(60):
            plane.pipeline.update(*scored(str(n), prompt=n))
        calls()  # fills caches
        few = calls()
        for n in range(60, 180):
            plane.pipeline.update(*scored(str(n), prompt=n))
        calls()
        many = calls()
        # Of three times the records; more figures have an interval then.
        assert many[0] <= 1.3 * few[0]
        assert many[1] <= 1.3 * few[1]
        assert many[0] < 20_000
        assert many[1] < 40_000


def count_calls(function: Callable[[], object]) -> int:
    """Calls of Python functions that `function` makes."""
    count = 0

    def profiler(_: object, event: str, __: object) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(profiler)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


async def test_refused_logprobs_make_it_look_again_and_relays_sample_under_a_new_policy(
    upstream: tuple[FakeVllm, str], reference: tuple[FakeVllm, str], tmp_path: Path
) -> None:
    async with watched(tmp_path, pair(upstream[1], reference[1])) as (plane, told):
        await until(lambda: plane.monitor.state == "ready")
        generation = told[-1].generation
        refused = {"hemostat_shadow_requests_total": {("skipped", "logprobs_refused"): 1.0}}
        totals = Stats(counters=refused, overhead_buckets=[], overhead_sum=0.0, ready=True)
        plane.link.total = lambda: totals  # type: ignore[method-assign]
        await until(lambda: not told[-1].scoring)
        await until(lambda: told[-1].scoring)
        assert told[-1].generation > generation
        # The count stands still: so does the control process.
        generation = told[-1].generation
        await asyncio.sleep(0.3)
        assert told[-1].generation == generation
        upstream[0].max_logprobs = 3
        refused["hemostat_shadow_requests_total"][("skipped", "logprobs_refused")] = 2.0
        await until(lambda: plane.monitor.state == "mismatch")
        assert "--max-logprobs" in plane.monitor.detail
        assert not told[-1].scoring


async def test_relays_know_whether_the_server_has_openais_sampling_defaults(tmp_path: Path) -> None:
    for given in (False, True):
        made = settings(upstream={"url": "http://127.0.0.1:9", "openai_sampling_defaults": given})
        async with watched(tmp_path, made) as (_, told):
            await until(lambda told=told: bool(told))  # type: ignore[misc]
            assert told[-1].openai_sampling_defaults is given


async def test_relays_ask_for_adapters_only_once_every_engine_can_serve_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with control(tmp_path, settings(calibration={"mode": "auto"}, adapter={"enabled": True})) as plane:
        told: list[Policy] = []
        plane.link.set_policy = told.append  # type: ignore[method-assign]
        plane.profile_manager.set_model_pair("m", 30)
        plane.profile_manager.serving.max_adapters = 1  # the engine has a slot
        version = plane.profile_manager.operator.import_profile(adapter(vocabulary=30))
        plane.profile_manager.operator.promote(version)
        report = RankReport("boot", 0, 1, [version], 30, {}, "v1", "0")
        plane.engines.reports.update(report, time.monotonic())
        plane.policy.publish()
        # The logits processor holds it, which says nothing of its weights.
        assert told[-1].acknowledged == frozenset()
        assert told[-1].adapters == frozenset()
        assert set(told[-1].serving_by_kind.values()) == {version}
        monkeypatch.setattr(type(plane.adapters.hosts.hosts[""]), "ready", frozenset({version}))
        plane.policy.publish()
        assert told[-1].adapters == {version}
        assert told[-1].acknowledged == {version}
        assert set(told[-1].serving_by_kind.values()) == {version}
        plane.engines.reports.update(RankReport("anew", 0, 1, [], 30, {}, "v1", "0"), time.monotonic())
        plane.policy.publish()
        assert told[-1].adapters == {version}
