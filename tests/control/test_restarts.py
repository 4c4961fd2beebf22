"""`hemostat serve` is reloaded, upgraded and damaged while clients stream: no connection is refused, no answer cut."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from tests.support.fake_vllm import FakeVllm, serving
from tests.support.served import AUTHORIZED, RELAY, Served, hemostat
from tests.support.streaming_load import Load, streaming_load
from tests.support.waiting import HANG_SECONDS, until

from hemostat.supervisor import takeover

CONTROL = "hemostat.control.process"
CLIENTS = 6


@contextmanager
def running(folder: Path, **more: Any) -> Iterator[Served]:
    upstream = FakeVllm(token_delay=0.01)
    settings = {"shadow": {"rate": 0.0}, "store": {"url": f"sqlite:///{folder / 'store.db'}"}}
    with serving(upstream) as url, hemostat(folder, upstream, url, workers=2, **settings | more) as process:
        yield process


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Shared by the tests that leave the same supervisor working."""
    with running(tmp_path_factory.mktemp("restarts")) as process:
        yield process


async def until_status(served: Served, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    return await served.until(condition)


def change(served: Served, **sections: Any) -> None:
    """Change the configuration file, and send SIGHUP."""
    path = served.log.parent / "hemostat.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | sections))
    served.process.send_signal(signal.SIGHUP)


async def reloaded(served: Served, before: dict[str, Any]) -> dict[str, Any]:
    loaded_at = before["configuration"]["loaded_at"]
    return await until_status(served, lambda s: s["configuration"]["loaded_at"] > loaded_at and s["relays"] == 2)


@asynccontextmanager
async def streams(served: Served) -> AsyncIterator[Load]:
    """No connection is refused and no answer cut or failed while the block runs."""
    await until_status(served, lambda s: s["relays"] == 2)
    async with streaming_load(served.data, CLIENTS) as load:
        yield load
        await load.until_more(5 * CLIENTS)
    assert (load.refused, load.cut, load.failed) == (0, 0, 0), load.failures


async def test_sighup_replaces_the_relays_under_load(served: Served) -> None:
    relays, controls = served.pids(RELAY), served.pids(CONTROL)
    before = await served.status()
    async with streams(served):
        change(served)
        await reloaded(served, before)
        assert not served.pids(RELAY) & relays or len(served.pids(RELAY)) > 2, "new ones; the former may still drain"
        assert served.pids(CONTROL) == controls, "nothing has changed for it"
    await until(lambda: len(served.pids(RELAY)) == 2)
    assert not served.pids(RELAY) & relays


async def test_kill_of_every_relay_refuses_no_connection(served: Served) -> None:
    await until_status(served, lambda s: s["relays"] == 2)
    async with streaming_load(served.data, CLIENTS) as load:
        await until(lambda: load.streaming == CLIENTS)
        for pid in served.pids(RELAY):
            os.kill(pid, signal.SIGKILL)
        await load.until_more(3 * CLIENTS)
    assert load.refused == load.failed == 0, load.failures
    assert load.cut <= CLIENTS, "one for each connection of the killed processes"
    await until_status(served, lambda s: s["relays"] == 2)


async def test_a_relay_that_was_loaded_before_takes_the_place_of_a_killed_one(served: Served) -> None:
    """Of one that was loaded after a reload too, and once more, whichever relay it is."""
    before = await served.status()
    change(served)
    await reloaded(served, before)
    await until(lambda: len(served.pids(RELAY)) == 2)
    for order in (min, max):
        await until(served.spare)
        spare, relays = served.spare(), served.pids(RELAY)
        assert spare not in relays
        killed = order(relays)
        os.kill(killed, signal.SIGKILL)
        await until(lambda killed=killed: killed not in served.pids(RELAY) and len(served.pids(RELAY)) == 2)  # type: ignore[misc]
        assert served.pids(RELAY) - relays == {spare}, "no process was started for it"
        assert {(await served.ask(f"still there {n}?")).status_code for n in range(10)} == {200}


async def test_a_bad_file_changes_nothing_and_says_why(served: Served) -> None:
    before = await served.status()
    relays = served.pids(RELAY)
    change(served, workers="many")
    status = await until_status(served, lambda s: s["configuration"]["error"] != "")
    assert "workers" in status["configuration"]["error"]
    assert status["configuration"]["loaded_at"] == before["configuration"]["loaded_at"]
    assert served.pids(RELAY) == relays
    assert await served.metric("hemostat_config_last_reload_successful") == 0
    lines = [line for line in served.log.read_text().splitlines() if "SIGHUP: nothing was changed" in line]
    assert len(lines) == 1
    assert "workers" in lines[0]
    change(served, workers=2)
    status = await reloaded(served, before)
    assert status["configuration"]["error"] == ""
    assert await served.metric("hemostat_config_last_reload_successful") == 1


async def test_settings_apply_in_place_by_a_new_control_process_or_are_named(served: Served) -> None:
    before = await served.status()
    (control,) = served.pids(CONTROL)
    token, engines = (served.log.parent / name for name in ("token", "engines"))
    token.write_text("first\n")
    engines.write_text("third\n")
    port = int(served.admin.rpartition(":")[2])
    change(
        served, shadow={"rate": 0.25}, admin={"port": port, "token_file": str(token), "engine_token_file": str(engines)}
    )
    status = await reloaded(served, before)
    assert status["shadow"]["rate"] == 0.25
    assert served.pids(CONTROL) == {control}, "it goes on"

    async def mode(value: str, path: str = "calibration") -> int:
        async with httpx.AsyncClient(base_url=served.admin, headers={"Authorization": f"Bearer {value}"}) as admin:
            return (await admin.post(f"/api/v1/{path}", json={"mode": "off"})).status_code

    assert [await mode("secret"), await mode("first")] == [401, 200]
    assert [await mode("first", "engine/report"), await mode("third", "engine/report")] == [401, 400]
    token.write_text("second\n")
    engines.write_text("fourth\n")
    change(served)
    await reloaded(served, status)
    assert [await mode("first"), await mode("second")] == [401, 200], "the file was read again"
    assert [await mode("third", "engine/report"), await mode("fourth", "engine/report")] == [401, 400]

    async with streams(served):
        before = await served.status()
        change(served, shadow={"rate": 0.0, "top_k": 4}, listen={"host": "127.0.0.1", "port": 1})
        status = await reloaded(served, before)
    assert status["top_k"] == 4
    assert status["profile"]["mode"] == "off", "the new control process has read the store"
    assert served.pids(CONTROL) != {control}
    assert status["configuration"]["needs_restart"] == ["listen.port"]
    await until(lambda: "take effect after a restart: listen.port" in served.log.read_text())


async def test_sighup_opens_the_access_log_again_and_limits_clients(served: Served) -> None:
    """As logrotate does it: the file is renamed, then SIGHUP is sent."""
    before = await served.status()
    file = served.log.parent / "access.log"
    limits = {"requests_per_second": 0.001, "burst": 1}
    change(served, log={"access": str(file), "format": "json"}, client_limits=limits)
    before = await reloaded(served, before)
    await until(lambda: len(served.pids(RELAY)) == 2)
    statuses = {(await served.ask("one of many", max_tokens=1)).status_code for _ in range(6)}
    assert statuses == {200, 429}
    file.rename(served.log.parent / "access.log.1")
    change(served)
    before = await reloaded(served, before)
    assert '"status":429' in (served.log.parent / "access.log.1").read_text()
    await until(lambda: len(served.pids(RELAY)) == 2)
    await served.ask("another one", max_tokens=1)
    await until(lambda: '"route":"/v1/chat/completions"' in file.read_text())
    change(served, log={"access": "/no/such/folder/access.log"}, client_limits={})
    status = await until_status(served, lambda s: s["configuration"]["error"] != "")
    assert "log.access: cannot open /no/such/folder/access.log" in status["configuration"]["error"]
    change(served, log={"access": "off"})
    await reloaded(served, before)
    await until(lambda: len(served.pids(RELAY)) == 2)


async def stream(served: Served, text: str) -> httpx.Response:
    """However long it takes."""
    body = {"model": "fake", "messages": [{"role": "user", "content": text}], "max_tokens": 30, "stream": True}
    async with httpx.AsyncClient(base_url=served.data, timeout=None) as client:
        return await client.post("/v1/chat/completions", json=body)


def lives(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@asynccontextmanager
async def successor_of(served: Served) -> AsyncIterator[None]:
    """Stop the supervisor that serves at the end, which is no child of the test."""
    try:
        yield
    finally:
        served.process.kill()
        for line in served.log.read_text().splitlines():
            _, separator, rest = line.partition("hemostat.serve: process ")
            pid = int(rest.split()[0]) if separator else 0
            if separator and lives(pid):
                os.kill(pid, signal.SIGTERM)
                await until(lambda pid=pid: not lives(pid))  # type: ignore[misc]


async def test_sigusr2_hands_over_the_store_and_what_former_relays_still_capture(tmp_path: Path) -> None:
    reference = FakeVllm()
    with serving(reference) as reference_url:
        settings = {"reference": {"backend": "vllm", "url": reference_url}, "shadow": {"rate": 1.0, "top_k": 8}}
        with running(tmp_path, **settings) as served:
            async with successor_of(served):
                await until_status(served, lambda s: s["reference"]["state"] == "ready" and s["relays"] == 2)
                async with httpx.AsyncClient(base_url=served.admin, headers=AUTHORIZED) as admin:
                    await admin.post("/api/v1/calibration", json={"mode": "off"})
                while (await served.status())["requests"]["shadowed"] == 0:
                    await served.ask("until the relays sample", max_tokens=1)
                served.upstream.hold_after = 5
                held = asyncio.create_task(stream(served, "say: this answer takes a while"))
                await until(lambda: served.upstream.requests[-1].get("stream"))
                (control,) = served.pids(CONTROL)
                served.process.send_signal(signal.SIGUSR2)
                await until(lambda: "serves; draining" in served.log.read_text())
                assert not lives(control), "there is one control process at a time"
                status = await until_status(served, lambda s: s["relays"] >= 3 and s["reference"]["state"] == "ready")
                assert status["profile"]["mode"] == "off", "of the store"
                served.upstream.hold_after = None
                answer = await held
                assert answer.text.endswith("data: [DONE]\n\n")
                await until_status(served, lambda s: s["requests"]["shadowed"] >= 1)
                assert await asyncio.to_thread(served.process.wait, HANG_SECONDS) == 0
                async with streaming_load(served.data, CLIENTS) as load:
                    pass
                assert (load.refused, load.cut, load.failed) == (0, 0, 0), load.failures


async def test_a_second_serve_in_the_same_run_dir_takes_over_under_load(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    command = [sys.executable, "-m", "hemostat", "serve", "--config", str(tmp_path / "hemostat.yaml")]
    with running(tmp_path, run_dir=str(run_dir)) as served:
        await until_status(served, lambda s: s["relays"] == 2)
        with started(command, tmp_path / "log2") as second:
            async with streams(served):
                await until(lambda: f"process {second.pid} serves" in served.log.read_text())
                await until_status(served, lambda s: s["relays"] >= 2)
            assert await asyncio.to_thread(served.process.wait, HANG_SECONDS) == 0
            assert second.poll() is None


async def test_a_successor_that_fails_leaves_the_former_one_serving(tmp_path: Path) -> None:
    """Before it has asked for anything, and after the control process has been released."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with running(tmp_path, run_dir=str(run_dir)) as served:
        async with streams(served):
            config = tmp_path / "hemostat.yaml"
            good = config.read_text()
            config.write_text("workers: many\n")
            served.process.send_signal(signal.SIGUSR2)
            await until(lambda: "it did not take over" in served.log.read_text())
            config.write_text(good)
            (control,) = served.pids(CONTROL)
            channel = takeover.connect_to_predecessor(run_dir)
            assert channel is not None
            message, sockets = await channel.receive()
            assert message["sockets"] == {"data": 2, "admin": 1, "control": 0}
            for sock in sockets:
                sock.close()
            channel.send({"step": takeover.RELEASE_CONTROL})
            await channel.expect(takeover.RELEASED)
            assert served.pids(CONTROL) == set()
            channel.close()
            await until_status(served, lambda s: s["relays"] == 2)
            assert served.pids(CONTROL) not in (set(), {control})
        assert served.process.poll() is None


AS_SYSTEMD = """
import os, sys
for own, number in zip(sys.argv[1:3], (63, 64)):
    os.dup2(int(own), number)
os.dup2(63, 3)
os.dup2(64, 4)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "2", "LISTEN_FDNAMES": "admin:data"}
os.execv(sys.executable, [sys.executable, "-m", "hemostat", "serve", *sys.argv[3:]])
"""
"""Arguments: the descriptors of the two sockets, then those of `serve`. systemd numbers sockets from 3 on."""


@contextmanager
def started(command: list[str], log: Path, *sockets: socket.socket) -> Iterator[subprocess.Popen[str]]:
    """A process that inherits the sockets; it ends in order at the end of the block."""
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=file, text=True, pass_fds=[sock.fileno() for sock in sockets]
        )
    try:
        yield process
        process.terminate()
        assert process.wait(HANG_SECONDS) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


async def test_systemd_passes_on_sockets_with_connections_in_their_queues(tmp_path: Path) -> None:
    """A client that connected before the start is answered; the addresses are the sockets', not the settings'."""
    with (
        socket.create_server(("127.0.0.1", 0)) as data,
        socket.create_server(("127.0.0.1", 0)) as admin,
        socket.create_connection(data.getsockname()) as early,
        serving(FakeVllm()) as url,
    ):
        early.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        own = [str(admin.fileno()), str(data.fileno())]
        flags = ["--upstream", url, "--port", "1", "--admin-port", "2"]
        command = [sys.executable, "-c", AS_SYSTEMD, *own, *flags]
        with started(command, tmp_path / "log", admin, data) as process:
            assert process.stdout is not None
            announced = [await asyncio.to_thread(process.stdout.readline) for _ in range(2)]
            assert f":{data.getsockname()[1]} ->" in announced[0], (tmp_path / "log").read_text()
            assert f":{admin.getsockname()[1]} " in announced[1]
            early.settimeout(HANG_SECONDS)
            assert (await asyncio.to_thread(early.recv, 15)).startswith(b"HTTP/1.1 200 OK")
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{admin.getsockname()[1]}") as client:
                assert (await client.get("/livez")).status_code == 200
