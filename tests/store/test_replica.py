"""Several control processes with one Valkey: one decides, the others follow, any may die, the store too."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from tests.support import valkey
from tests.support.control import TOKEN, control, profile, scored, settings, status_json
from tests.support.fake_vllm import VOCAB, FakeVllm, serving
from tests.support.samples import values
from tests.support.served import AUTHORIZED, Served, hemostat
from tests.support.valkey import Valkey

from hemostat.config.schema import Settings
from hemostat.control import composition
from hemostat.control.composition import Control
from hemostat.control.stored_state import STATE_KEYS
from hemostat.ipc.messages import REST_KIND, EngineHealth, Policy
from hemostat.store import replica as replica_module
from hemostat.store import writer as writer_module
from hemostat.store.protocol import LeaseAnswer, NotKeptError, StoreAccessDenied, StoredProfile, StoreFailure
from hemostat.store.valkey import ValkeyStore
from hemostat_calibration.errors import HemostatError
from hemostat_calibration.profiles.profile import CalibrationProfile

pytest.importorskip("torch")

from hemostat_engine.agent import Agent, Identity
from hemostat_engine.library import Counters, Library
from hemostat_engine.settings import Settings as Engine
from hemostat_engine.taps import Taps

MODEL, V = "m", 30


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composition, "PERIODIC_SECONDS", 0.05)
    monkeypatch.setattr(writer_module, "RETRY_SECONDS", (0.05,))
    monkeypatch.setattr(replica_module, "RETRY_SECONDS", (0.05,))
    monkeypatch.setattr(replica_module, "HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr(replica_module, "LEASE_SECONDS", 1.0)
    monkeypatch.setattr(replica_module, "COMMAND_SECONDS", 3.0)
    monkeypatch.setattr(replica_module, "REPLY_POLL_SECONDS", 0.02)


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    with valkey.running(tmp_path_factory.mktemp("valkey")) as one:
        yield one


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Valkey]:
    """One that the test may kill."""
    with valkey.running(tmp_path / "valkey") as one:
        yield one


def made(server: Valkey, folder: Path, mode: str = "auto") -> Settings:
    url = f"{server.url}?prefix={quote(f'{folder}:')}"
    return settings(store={"url": url}, calibration={"mode": mode}, admin={"port": 0, "token": TOKEN})


@asynccontextmanager
async def replicas(server: Valkey, folder: Path, number: int = 2) -> AsyncIterator[list[Control]]:
    """Of one deployment; the first one leads."""
    async with AsyncExitStack() as stack:
        ones = []
        for n in range(number):
            (folder / f"replica-{n}").mkdir()
            one = await stack.enter_async_context(control(folder / f"replica-{n}", made(server, folder), loops=True))
            one.profile_manager.set_model_pair(MODEL, V)
            ones.append(one)
        await until(lambda: ones[0].lease.leads)
        yield ones


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.02)


def agree(ones: list[Control], version: str | None) -> bool:
    return all(one.profile_manager.serving.version == version for one in ones)


async def gone(one: Control) -> None:
    """Its process was killed: it says nothing any more."""
    assert one.replica is not None

    async def nothing() -> None:
        return

    one.replica.heartbeat = nothing  # type: ignore[method-assign]


async def test_what_one_promotes_all_serve(shared_server: Valkey, tmp_path: Path) -> None:
    async with replicas(shared_server, tmp_path, 3) as ones:
        assert [one.lease.leads for one in ones] == [True, False, False]
        told: list[Policy] = []
        ones[2].link.set_policy = told.append  # type: ignore[method-assign]
        mine = profile()
        await ones[0].actions.promote(await ones[0].actions.import_profile(mine.to_bytes(), ""), None)
        await until(lambda: agree(ones, mine.version))
        await until(lambda: told[-1].serving_by_kind.get(REST_KIND) == mine.version)
        assert [one.profiles.profile_bytes(mine.version) for one in ones] == [mine.to_bytes()] * 3
        assert [one.engines._wanted for one in ones] == [(mine.version,)] * 3
        await until(lambda: [e["decision"] for e in ones[1].profiles.listing()["events"]] == ["promote", "import"])
        assert [status_json(one)["replica"]["leads"] for one in ones] == [True, False, False]
        leading = [values(one.lease.samples())["hemostat_replica_leads",] for one in ones]
        assert leading == [1.0, 0.0, 0.0]
        await ones[0].actions.rollback("asked for", None)
        await until(lambda: agree(ones, None))
        assert ones[1].profile_manager.lifecycle.promotions == ones[1].profile_manager.lifecycle.rollbacks == 0, (
            "counted where it was decided"
        )


async def test_profiles_of_others_are_read_off_the_event_loop(
    shared_server: Valkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: set[int] = set()
    read = CalibrationProfile.from_bytes.__func__  # type: ignore[attr-defined]

    def note(cls: type[CalibrationProfile], data: bytes, version: str | None = None) -> CalibrationProfile:
        threads.add(threading.get_ident())
        return read(cls, data, version)  # type: ignore[no-any-return]

    async with replicas(shared_server, tmp_path) as ones:
        monkeypatch.setattr(CalibrationProfile, "from_bytes", classmethod(note))
        await ones[0].actions.promote(ones[0].profile_manager.operator.import_profile(profile()), None)
        await until(lambda: agree(ones, profile().version))
    assert threads
    assert threading.get_ident() not in threads


async def test_operators_may_talk_to_any_replica(shared_server: Valkey, tmp_path: Path) -> None:
    async with replicas(shared_server, tmp_path) as ones:
        leader, follower = ones
        mine = profile()
        version = await follower.actions.import_profile(mine.to_bytes(), "")
        assert version == mine.version
        assert leader.profile_manager.trials.tested_versions == [version]
        await follower.actions.promote(version, None)
        await until(lambda: agree(ones, version))
        with pytest.raises(HemostatError, match="serves there already"):
            await follower.actions.promote(version, None)
        with pytest.raises(HemostatError, match="no profile"):
            await follower.actions.promote("0" * 32, None)
        await follower.actions.pin(version, None)
        await until(lambda: follower.profile_manager.serving.pinned)
        assert leader.profile_manager.serving.pinned
        await follower.actions.pin(None, None)
        assert not leader.profile_manager.serving.pinned
        await follower.actions.set_mode("off")
        assert (leader.profile_manager.serving.mode, follower.profile_manager.serving.mode) == ("off", "off")
        assert follower.store.get_state("mode") == "auto off"
        await leader.actions.set_mode("auto")
        await until(lambda: follower.profile_manager.serving.mode == "auto")
        await follower.actions.rollback("asked for", None)
        await until(lambda: agree(ones, None))
        with pytest.raises(HemostatError, match="vocabulary of 31"):
            await follower.actions.import_profile(profile(vocabulary=31).to_bytes(), "")


async def test_a_follower_tells_whether_the_leader_kept_the_mode(
    shared_server: Valkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with replicas(shared_server, tmp_path) as ones:
        leader, follower = ones
        assert await follower.actions.set_mode("observe")

        def full(*_: object) -> None:
            raise StoreFailure("OOM command not allowed when used memory > 'maxmemory'")

        monkeypatch.setattr(leader.store.as_leader, "set_state", full)
        assert not await follower.actions.set_mode("off")
        assert [one.profile_manager.serving.mode for one in ones] == ["off", "off"], "it applies nevertheless"
        monkeypatch.undo()
        assert await follower.actions.set_mode("off"), "sent again, it is kept"


async def test_a_leader_that_dies_is_followed_by_another_that_knows_what_was_spent(
    shared_server: Valkey, tmp_path: Path
) -> None:
    async with replicas(shared_server, tmp_path) as ones:
        leader, follower = ones
        held_out = next(n for n in range(99) if leader.profile_manager.is_held_out(scored(str(n), prompt=n)[0]))
        leader.pipeline.use_record(*scored("r", prompt=held_out))
        for n in range(2):
            await leader.actions.import_profile(profile(n).to_bytes(), "")
        await leader.actions.promote(profile(0).version, None)
        await until(lambda: agree(ones, profile(0).version))
        begun = leader.profile_manager.report.status()["tests_begun"]
        assert begun["candidate"] >= 3, "two, and the other one anew after the promotion"
        await until(lambda: follower.store.get_state("tests.candidate") == str(begun["candidate"]))
        await gone(leader)
        assert not follower.lease.leads, "not before the lease has run out"
        await until(lambda: follower.lease.leads)
        assert not leader.lease.leads, "it has stopped before"
        assert follower.profile_manager.serving.version == profile(0).version
        # It may have begun another one by now; one that had forgotten them would count from 0.
        assert follower.profile_manager.report.status()["tests_begun"]["candidate"] >= begun["candidate"]
        other = profile(2)
        await follower.actions.import_profile(other.to_bytes(), "")
        assert follower.profile_manager.report.status()["tests_begun"]["candidate"] == begun["candidate"] + 1
        await follower.actions.promote(other.version, None)
        await until(lambda: other.version in (follower.store.get_state("kinds") or ""))
        # What the one that was thought dead still writes is refused, and it follows when it is back.
        leader.writer.as_leader.set_state("kinds", "{}")
        await until(lambda: "another replica leads" in leader.store_errors.last_message)
        assert other.version in (follower.store.get_state("kinds") or "")
        del leader.replica.heartbeat  # type: ignore[union-attr]
        await leader.replica.heartbeat()  # type: ignore[union-attr]
        assert leader.profile_manager.serving.version == other.version
        assert other.version not in leader.profile_manager.trials.tested_versions


async def test_an_orderly_end_hands_over_at_once(
    shared_server: Valkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica_module, "LEASE_SECONDS", 600.0)
    async with AsyncExitStack() as stack:
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
        first = AsyncExitStack()
        leader = await first.enter_async_context(control(tmp_path / "a", made(shared_server, tmp_path), loops=True))
        follower = await stack.enter_async_context(control(tmp_path / "b", made(shared_server, tmp_path), loops=True))
        leader.profile_manager.set_model_pair(MODEL, V)
        follower.profile_manager.set_model_pair(MODEL, V)
        await until(lambda: leader.lease.leads)
        await leader.actions.promote(await leader.actions.import_profile(profile().to_bytes(), ""), None)
        await first.aclose()
        await until(lambda: follower.lease.leads)
        assert follower.profile_manager.serving.version == profile().version, "written before it ended"


async def test_a_store_that_crashes_changes_nothing_and_comes_back(
    server: Valkey, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with replicas(server, tmp_path) as ones:
        leader, follower = ones
        mine = profile()
        await leader.actions.promote(await leader.actions.import_profile(mine.to_bytes(), ""), None)
        await until(lambda: agree(ones, mine.version))
        server.kill()
        # Decided while it still leads by its own clock, written when the store is back.
        other = leader.profile_manager.operator.import_profile(profile(1))
        with pytest.raises(NotKeptError):
            await leader.actions.promote(other, None)
        await until(lambda: not leader.lease.leads)
        assert leader.lease.is_last_leader
        assert follower.profile_manager.serving.version == mine.version
        with pytest.raises(HemostatError, match="cannot be reached"):
            await leader.actions.promote(mine.version, None)
        with pytest.raises(HemostatError, match="cannot be reached"):
            await follower.actions.import_profile(profile(2).to_bytes(), "")
        assert all(one.store_errors.count > 0 for one in ones)
        said = [record for record in caplog.records if record.levelno >= logging.ERROR]
        assert len(said) < 20, "the same failure is one line, however often it comes"
        await until(lambda: not any(status_json(one)["replica"]["store_reachable"] for one in ones))
        server.start()
        await until(lambda: any(one.lease.leads for one in ones))
        await until(lambda: len({one.profile_manager.serving.version for one in ones}) == 1)
        assert (leader if leader.lease.leads else follower).profile_manager.serving.version in {other, mine.version}
        assert any(status_json(one)["replica"]["leads"] for one in ones)


async def test_a_store_that_lost_its_data_gets_it_again(tmp_path: Path) -> None:
    with valkey.running(tmp_path / "valkey", keeps=False) as server:
        async with replicas(server, tmp_path) as ones:
            mine = profile()
            await ones[0].actions.promote(await ones[0].actions.import_profile(mine.to_bytes(), ""), None)
            ones[0].upstreams._reported = lambda: [[EngineHealth("a:1", "up", False, 0, 0, 0, 0)]]
            ones[0].upstreams.drain("a:1")
            await until(lambda: agree(ones, mine.version) and ones[1].upstreams.drained == {"a:1"})
            begun = ones[0].profile_manager.report.status()["tests_begun"]["serving"]
            server.kill()
            server.start()
            await until(lambda: any(one.lease.leads for one in ones))
            store = ones[0].store
            await until(lambda: store.get_profile(mine.version) is not None)
            await until(lambda: mine.version in (store.get_state("kinds") or ""))
            await until(lambda: json.loads(store.get_state("tests") or "{}").get("windows") == {"rest": begun})
            await until(lambda: store.get_state("drained_engines") == '["a:1"]')
            assert agree(ones, mine.version)
            assert [one.upstreams.drained for one in ones] == [{"a:1"}] * 2


@pytest.mark.parametrize("which", [0, 1])
async def test_off_holds_at_once_without_the_store_and_everywhere_with_it(
    which: int, server: Valkey, tmp_path: Path
) -> None:
    async with replicas(server, tmp_path) as ones:
        await ones[0].actions.promote(await ones[0].actions.import_profile(profile().to_bytes(), ""), None)
        await until(lambda: agree(ones, profile().version))
        server.kill()
        await until(lambda: not ones[0].lease.leads)
        await until(lambda: not any(status_json(one)["replica"]["store_reachable"] for one in ones))
        await ones[which].actions.set_mode("off")
        assert ones[which].profile_manager.serving.version is None
        await ones[which].actions.rollback("asked for", None)
        server.start()
        await until(lambda: [one.profile_manager.serving.mode for one in ones] == ["off", "off"])
        await until(lambda: [one.profile_manager.serving.selected for one in ones] == [None, None])


async def test_a_store_that_is_not_there_at_the_start_is_waited_for(server: Valkey, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    server.kill()
    async with control(tmp_path / "a", made(server, tmp_path), loops=True) as one:
        assert one.store_errors.count >= 1
        assert not one.lease.leads
        one.profile_manager.set_model_pair(MODEL, V)
        one.policy.publish()
        server.start()
        await until(lambda: one.lease.leads)
        await one.actions.promote(await one.actions.import_profile(profile().to_bytes(), ""), None)
        await until(lambda: profile().version in (one.store.get_state("kinds") or ""))


async def test_a_store_that_hangs_does_not_hold_up_the_event_loop(
    server: Valkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many publishes complete before the first request to the frozen store fails."""
    monkeypatch.setattr("hemostat.store.valkey.RESPONSE_SECONDS", 2.0)
    async with replicas(server, tmp_path, 1) as ones:
        server.freeze()
        published, errors = 0, ones[0].store_errors.count
        while ones[0].store_errors.count == errors:
            ones[0].policy.publish()
            ones[0].profile_manager.operator.set_mode(
                "observe" if ones[0].profile_manager.serving.mode == "auto" else "auto"
            )
            published += 1
            await asyncio.sleep(0.01)
        assert published > 10
        ones[0].profile_manager.operator.set_mode("auto")
        server.thaw()
        await until(lambda: ones[0].lease.leads)
        await until(lambda: ones[0].store.get_state("mode") == "auto auto")


async def test_a_wrong_password_is_said_before_anything_starts(tmp_path: Path) -> None:
    with valkey.running(tmp_path / "valkey", "secret") as server:
        wrong = settings(store={"url": server.url.replace("secret", "wrong")})
        with pytest.raises(StoreAccessDenied, match=r"store\.url") as raised:
            async with control(tmp_path, wrong):
                pass
        assert "\n" not in str(raised.value)


async def test_a_follower_of_another_model_does_not_serve_what_does_not_fit(
    shared_server: Valkey, tmp_path: Path
) -> None:
    async with replicas(shared_server, tmp_path) as ones:
        leader, follower = ones
        follower.profile_manager.set_model_pair("another", V + 1)
        await leader.actions.promote(await leader.actions.import_profile(profile().to_bytes(), ""), None)
        await until(lambda: bool(follower.profiles.listing()["events"]))
        assert follower.profile_manager.serving.version is None
        assert leader.profile_manager.serving.version == profile().version


async def test_damage_in_the_store_ends_no_loop(shared_server: Valkey, tmp_path: Path) -> None:
    async with replicas(shared_server, tmp_path) as ones:
        leader = ones[0]
        await leader.actions.promote(await leader.actions.import_profile(profile().to_bytes(), ""), None)
        await until(lambda: agree(ones, profile().version))
        store = leader.store
        assert isinstance(store, ValkeyStore)
        store.send_command("1", json.dumps(["nonsense"]))
        store.put_profile(StoredProfile("0" * 32, b"junk", 9e9))
        await until(lambda: "not known" in (store.take_reply("1") or ""))
        await until(lambda: "0" * 32 in store.versions())
        for name, order in (("2", "no json"), ("3", "[]"), ("4", "3")):
            store.send_command(name, order)
        for name in ("2", "3", "4"):
            await until(lambda name=name: "error" in (store.take_reply(name) or ""))  # type: ignore[misc]
        await leader.actions.rollback("asked for", None)
        await until(lambda: agree(ones, None))


# --- as it runs -------------------------------------------------------------------------------------------------------


def engine(admins: list[str]) -> Agent:
    """The real plugin's agent, holding what it is asked to hold."""
    counters = Counters()
    url = Engine.from_environment({"HEMOSTAT_ADMIN_URL": ",".join(admins), "HEMOSTAT_ENGINE_TOKEN": TOKEN})
    who = Identity("boot", 0, 1, VOCAB, "v1", "0")
    agent = Agent(who, url, Library(VOCAB), counters, Taps(counters))
    agent.start()
    return agent


async def served_with(one: Served, upstream: FakeVllm, times: int = 12) -> set[str | None]:
    """Versions that requests through this replica ask of the engine; the control arm asks for none."""
    upstream.requests.clear()
    for n in range(times):
        assert (await one.ask(f"question {n} of {time.monotonic()}")).status_code == 200
    return {(body.get("vllm_xargs") or {}).get("hemostat") for body in upstream.requests} - {None}


async def test_two_servers_one_engine_one_store(tmp_path: Path) -> None:
    """`hemostat serve` twice, real processes: what one promotes both serve; the store and the leader are killed."""
    upstream = FakeVllm(noise=0.5)
    with ExitStack() as stack:
        server = stack.enter_context(valkey.running(tmp_path / "valkey", "s3cret"))
        url = stack.enter_context(serving(upstream))
        reference = stack.enter_context(serving(FakeVllm()))
        ones = []
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            more: dict[str, Any] = {
                "reference": {"backend": "vllm", "url": reference},
                "store": {"url": server.url},
                "calibration": {"mode": "auto"},
            }
            ones.append(stack.enter_context(hemostat(tmp_path / name, upstream, url, **more)))
        agent = engine([one.admin for one in ones])
        stack.callback(agent.stop)
        for one in ones:
            await one.until(lambda status: status["reference"]["state"] == "ready", 40)
        await until_leads(ones)
        leader, follower = sorted(ones, key=leads, reverse=True)

        first, second = (replace(profile(seed, VOCAB), model="fake") for seed in (1, 2))
        async with httpx.AsyncClient(base_url=follower.admin, headers=AUTHORIZED, timeout=30) as client:
            for path, body in (("", first.to_bytes()), ("/promote", json.dumps({"version": first.version}).encode())):
                answer = await client.post(f"/api/v1/profiles{path}", content=body)
                assert answer.status_code == 200, answer.text
        for one in ones:
            await until_served_with(one, upstream, first.version)

        server.kill()
        for one in ones:
            await one.until(lambda status: not status["replica"]["store_reachable"], 30)
            assert await served_with(one, upstream) == {first.version}
            assert await one.metric("hemostat_store_errors_total") > 0
        server.start()
        await until_leads(ones)

        leader, follower = sorted(ones, key=leads, reverse=True)
        os.kill(leader.process.pid, signal.SIGKILL)
        await follower.until(lambda status: status["replica"]["leads"], 40)
        assert await served_with(follower, upstream) == {first.version}
        async with httpx.AsyncClient(base_url=follower.admin, headers=AUTHORIZED, timeout=30) as client:
            for path, body in (("", second.to_bytes()), ("/promote", json.dumps({"version": second.version}).encode())):
                answer = await client.post(f"/api/v1/profiles{path}", content=body)
                assert answer.status_code == 200, answer.text
        await until_served_with(follower, upstream, second.version)
        assert "s3cret" not in "".join((tmp_path / name / "log").read_text() for name in ("a", "b"))


async def until_served_with(one: Served, upstream: FakeVllm, version: str) -> None:
    """Once the engine has it and the relay knows."""
    async with asyncio.timeout(30):
        while await served_with(one, upstream) != {version}:
            await asyncio.sleep(0.1)


def leads(one: Served) -> bool:
    return bool(httpx.get(f"{one.admin}/api/v1/status", timeout=10).json()["replica"]["leads"])


async def until_leads(ones: list[Served]) -> None:
    await until(lambda: sum(leads(one) for one in ones) == 1)


@pytest.mark.parametrize("command", ["serve", "check"])
def test_a_wrong_password_ends_the_command_with_one_line(command: str, tmp_path: Path) -> None:
    with valkey.running(tmp_path / "valkey", "s3cret") as server:
        given = ["--upstream", "http://127.0.0.1:9", "--port", "0", "--admin-port", "0"]
        given += ["--set", f"store.url={server.url.replace('s3cret', 'wr0ng')}"]
        ended = subprocess.run(
            [sys.executable, "-m", "hemostat", command, *given], check=False, capture_output=True, text=True, timeout=60
        )
    assert ended.returncode == (2 if command == "serve" else 1)
    said = [line for line in (ended.stdout + ended.stderr).splitlines() if "refuses user or password" in line]
    assert len(said) == 1
    assert "store.url" in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr
    assert "wr0ng" not in ended.stdout + ended.stderr


# --- taking over takes longer than the lease --------------------------------------------------------------------------


def _slow(one: Control, seconds: float, times: list[int]) -> None:
    """Its store answers every read of a state after so long."""
    get_state = one.store.get_state

    def slowly(key: str) -> str | None:
        times[0] += 1
        time.sleep(seconds)
        return get_state(key)

    one.store.get_state = slowly  # type: ignore[method-assign]


async def test_a_replica_that_reads_for_longer_than_the_lease_leads_all_the_same(
    shared_server: Valkey, tmp_path: Path
) -> None:
    """If the lease ended while it reads, another one would take over and read in turn; nobody would ever lead."""
    async with replicas(shared_server, tmp_path, 3) as ones:
        reads = [0]
        for one in ones[1:]:
            _slow(one, 2.0 * replica_module.LEASE_SECONDS / len(STATE_KEYS), reads)
        await gone(ones[0])
        await until(lambda: ones[1].lease.leads or ones[2].lease.leads)
        assert reads[0] >= len(STATE_KEYS)


async def test_a_replica_that_cannot_use_what_it_reads_lets_another_one_lead(
    shared_server: Valkey, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with replicas(shared_server, tmp_path, 3) as ones:
        tried = asyncio.Event()

        def damaged(*_: Any) -> None:
            if holds_lease:
                tried.set()
            raise TypeError("not what was expected")

        holds_lease, store = [], ones[1].store.shared
        assert isinstance(store, ValkeyStore)
        acquire = store.acquire_lease

        def acquired(seconds: float) -> LeaseAnswer:
            answer = acquire(seconds)
            holds_lease.extend([True] * answer.leads)
            return answer

        store.acquire_lease = acquired  # type: ignore[method-assign]
        assert ones[1].replica is not None
        assert ones[2].replica is not None
        ones[1].replica._load = damaged
        heartbeat = ones[2].replica.heartbeat
        await gone(ones[2])
        await gone(ones[0])
        await asyncio.wait_for(tried.wait(), 30)
        ones[2].replica.heartbeat = heartbeat  # type: ignore[method-assign]
        await until(lambda: ones[2].lease.leads)
        assert not ones[1].lease.leads
