"""`hemostat serve` as a whole: each of its processes is killed, without effect on clients."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, closing, suppress
from functools import partial
from pathlib import Path

import httpx
import pytest
import yaml
from tests.support.connections import waiting
from tests.support.fake_vllm import FakeVllm, serving
from tests.support.served import AUTHORIZED, CHAT, RELAY, Served, hemostat
from tests.support.waiting import HANG_SECONDS, until

from hemostat_calibration import __version__
from hemostat_lab.demo.vllm_server import free_port


class Switch:
    """The reference's server, which can be stopped and started again under the same address."""

    def __init__(self) -> None:
        self.port = free_port()
        self._running = ExitStack()

    def on(self) -> None:
        self._running.enter_context(serving(FakeVllm(), self.port))

    def off(self) -> None:
        self._running.close()


@pytest.fixture(scope="module")
def reference() -> Iterator[Switch]:
    switch = Switch()
    switch.on()
    yield switch
    switch.off()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, reference: Switch) -> Iterator[Served]:
    """`hemostat serve` with two relays, shared by the tests of this file; each test leaves it working."""
    folder = tmp_path_factory.mktemp("serve")
    upstream = FakeVllm(noise=0.5)
    with (
        serving(upstream) as url,
        hemostat(
            folder,
            upstream,
            url,
            workers=2,
            reference={"backend": "vllm", "url": f"http://127.0.0.1:{reference.port}"},
            store={"url": f"sqlite:///{folder / 'store.db'}"},
        ) as process,
    ):
        yield process


@asynccontextmanager
async def engine(served: Served) -> AsyncIterator[None]:
    """Acts as the plugin of an engine: reports continuously, also while no process listens."""

    async def report() -> None:
        who = {"boot_id": "boot", "rank": 0, "world_size": 1, "runner": "v1", "vllm": "0", "plugin": __version__}
        body = who | {"versions": [], "vocab_size": 512, "counters": {}}
        async with httpx.AsyncClient(base_url=served.admin, headers=AUTHORIZED) as client:
            while True:
                with suppress(httpx.TransportError):
                    await client.post("/api/v1/engine/report", json=body)
                await asyncio.sleep(0.2)

    task = asyncio.create_task(report())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def scored_again(served: Served) -> int:
    """Assert that a request that is sent now is scored; how many were sent for it."""
    before = await served.until(lambda s: s["reference"]["state"] == "ready" and s["relays"] == 2)
    # A relay hears of it a moment later than the status says it.
    end, asked = time.monotonic() + HANG_SECONDS, 0
    while time.monotonic() < end:
        asked += 1
        assert (await served.ask(f"once more, {time.monotonic()} {asked}")).status_code == 200
        await asyncio.sleep(0.1)
        if (await served.status())["requests"]["scored"] > before["requests"]["scored"]:
            return asked
    pytest.fail(served.log.read_text())


async def test_requests_are_answered_scored_and_counted_over_all_workers(served: Served) -> None:
    await served.until(lambda s: s["reference"]["state"] == "ready" and s["relays"] == 2)
    before = await scored_again(served)
    answers = await asyncio.gather(*(served.ask(f"question {n}", stream=n % 2 == 0) for n in range(24)))
    assert {answer.status_code for answer in answers} == {200}
    status = await served.until(lambda s: s["requests"]["scored"] >= 24 and s["requests"]["pending"] == 0)
    assert status["requests"]["dropped"] == {}
    assert status["raw"]["kl_nats"]["estimate"] > 0
    end = time.monotonic() + HANG_SECONDS
    while await served.metric("hemostat_requests_total", outcome="ok", route=CHAT) != before + 24:
        assert time.monotonic() < end
        await asyncio.sleep(0.1)
    shadowed = await served.metric("hemostat_shadow_requests_total", outcome="shadowed")
    assert shadowed == await served.metric("hemostat_shadow_requests_total", outcome="scored")
    assert (await served.get("/readyz")).status_code == 200


async def test_relays_continue_while_control_is_down_and_scoring_resumes(served: Served) -> None:
    await served.until(lambda s: s["relays"] == 2)
    async with engine(served):
        await served.until(lambda s: s["engines"]["live"] == 1)
        (pid,) = served.pids("hemostat.control.process")
        served.upstream.token_delay = 0.1
        before = len(served.upstream.requests)
        streaming = asyncio.create_task(served.ask("say: a long stream is going on here", stream=True, max_tokens=40))
        await until(lambda: any(request.get("stream") for request in served.upstream.requests[before:]))
        os.kill(pid, signal.SIGKILL)
        for _ in range(5):
            assert (await served.ask("meanwhile", max_tokens=1)).status_code == 200
        served.upstream.token_delay = 0.0
        answer = await streaming
        assert answer.status_code == 200
        assert answer.text.endswith("data: [DONE]\n\n")
        assert '"token_ids":[' not in answer.text
        await served.until(lambda s: s["relays"] == 2 and s["engines"]["live"] == 1)
        assert served.pids("hemostat.control.process") != {pid}
        await scored_again(served)
        assert await served.metric("hemostat_requests_total", outcome="ok", route=CHAT) >= 6, "relays told it anew"


async def test_a_killed_relay_is_restarted_while_the_port_keeps_answering(served: Served) -> None:
    await served.until(lambda s: s["relays"] == 2)
    before = await served.metric("hemostat_requests_total")
    pids = served.pids(RELAY)
    assert len(pids) == 2
    os.kill(min(pids), signal.SIGKILL)
    answers = await asyncio.gather(*(served.ask(f"still there {n}?") for n in range(10)))
    assert {answer.status_code for answer in answers} == {200}
    await served.until(lambda s: s["relays"] == 2)
    assert len(served.pids(RELAY) - pids) == 1
    assert await served.metric("hemostat_requests_total") >= before
    await scored_again(served)


async def test_what_waits_in_the_queue_of_a_relay_that_is_killed_is_answered_by_the_next_one(served: Served) -> None:
    """SIGKILL breaks the connections that the relay had accepted, and no others: the supervisor holds the queue."""
    await served.until(lambda s: s["relays"] == 2)
    await until(served.spare)
    pids = served.pids(RELAY)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    asking = [asyncio.create_task(served.ask(f"waiting {n}")) for n in range(20)]
    await until(lambda: waiting(int(served.data.rpartition(":")[2])) == len(asking))
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert Counter(answer.status_code for answer in await asyncio.gather(*asking)) == {200: len(asking)}
    await served.until(lambda s: s["relays"] == 2)


async def test_a_damaged_store_is_counted_and_requests_are_served(served: Served) -> None:
    """Where its file was deleted, the process begins anew: what it holds is not what is stored."""
    await served.until(lambda s: s["relays"] == 2)
    store = served.log.parent / "store.db"
    before = await served.metric("hemostat_store_errors_total")
    # An action that the store does not keep is answered after 5 s.
    async with httpx.AsyncClient(base_url=served.admin, headers=AUTHORIZED, timeout=30) as admin:
        store.write_bytes(b"this is no database" * 1000)
        await admin.post("/api/v1/calibration", json={"mode": "off"})
        end = time.monotonic() + 60
        while await served.metric("hemostat_store_errors_total") == before:
            assert time.monotonic() < end
            await asyncio.sleep(0.05)
        await scored_again(served)
        store.unlink()
        await served.until(lambda s: store.exists() and s["control"]["state"] == "active" and s["relays"] == 2)
        assert (await admin.post("/api/v1/calibration", json={"mode": "observe"})).status_code == 200
        await scored_again(served)
    assert (await served.status())["profile"]["mode"] == "observe"


async def test_requests_are_dropped_while_the_reference_is_down_and_scored_again_later(
    served: Served, reference: Switch
) -> None:
    await served.until(lambda s: s["reference"]["state"] == "ready")
    await scored_again(served)
    reference.off()
    for n in range(40):
        assert (await served.ask(f"unscored {n}")).status_code == 200
        if (await served.status())["reference"]["state"] == "down":
            break
        await asyncio.sleep(0.05)
    status = await served.until(lambda s: s["reference"]["state"] == "down")
    assert status["requests"]["dropped"]["reference_down"] >= 5
    assert (await served.get("/readyz")).status_code == 200, "readiness does not depend on the reference"
    assert (await served.ask("still")).status_code == 200
    reference.on()
    await scored_again(served)


async def test_sigterm_completes_requests_in_flight_and_exits_with_0(tmp_path: Path) -> None:
    upstream = FakeVllm(hold_after=5)
    with serving(upstream) as url, hemostat(tmp_path, upstream, url, shutdown_seconds=60) as served:
        await served.until(lambda s: s["relays"] == 1)
        streaming = asyncio.create_task(served.ask("say: this goes on for a while", stream=True, max_tokens=30))
        end = time.monotonic() + 60
        while not any(body.get("stream") for body in upstream.requests):
            assert time.monotonic() < end, "the request reaches the engine"
            await asyncio.sleep(0.02)
        served.process.send_signal(signal.SIGTERM)
        while (await served.get("/readyz")).status_code != 503:
            assert time.monotonic() < end, "not ready while it drains"
            await asyncio.sleep(0.02)
        assert not streaming.done()
        with pytest.raises(httpx.ConnectError):
            await served.ask("too late")
        upstream.hold_after = None
        answer = await streaming
        assert answer.text.endswith("data: [DONE]\n\n")
        assert await asyncio.to_thread(served.process.wait, 10) == 0
        assert "Traceback" not in served.log.read_text()


@pytest.mark.parametrize("section", ["listen", "admin"])
def test_a_port_in_use_is_reported_in_one_line_with_exit_code_2(tmp_path: Path, section: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ports = {"listen": 0, "admin": free_port()} | {section: port}
        settings = {
            "upstream": {"url": "http://127.0.0.1:1"},
            "log": {"level": "error"},
            **{name: {"host": "127.0.0.1", "port": number} for name, number in ports.items()},
        }
        config = tmp_path / "hemostat.yaml"
        config.write_text(yaml.safe_dump(settings))
        command = [sys.executable, "-m", "hemostat", "serve", "--config", str(config)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode == 2
    lines = ended.stderr.strip().splitlines()
    assert len(lines) == 1, ended.stderr
    assert f"{section}.port: cannot bind 127.0.0.1:{port} (Address already in use)" in lines[0]
    assert f"{section}.port" in lines[0]


def test_every_line_of_a_json_log_is_json(tmp_path: Path) -> None:
    """Also the addresses of the ports, which are printed for people otherwise."""
    admin = free_port()
    command = [
        sys.executable,
        "-m",
        "hemostat",
        "serve",
        "--upstream",
        "http://127.0.0.1:1",
        "--admin-port",
        str(admin),
    ]
    command += ["--set", "listen.host=127.0.0.1", "--set", "listen.port=0", "--set", "log.format=json"]
    with (tmp_path / "out").open("wb") as out, (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=out, stderr=log, env=os.environ | {"HEMOSTAT_LOG__LEVEL": "info"})
        try:
            end = time.monotonic() + 60
            while "admin port" not in (tmp_path / "log").read_text() + (tmp_path / "out").read_text():
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < end
                time.sleep(0.05)
        finally:
            process.terminate()
            process.wait(60)
    lines = [json.loads(line) for name in ("out", "log") for line in (tmp_path / name).read_text().splitlines()]
    said = " ".join(line["message"] for line in lines)
    assert "data port http://127.0.0.1:" in said
    assert f"admin port http://127.0.0.1:{admin}" in said


def _run_once(command: str, folder: Path, run_dir: Path) -> subprocess.CompletedProcess[str]:
    config = folder / "hemostat.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "listen": {"host": "127.0.0.1", "port": 0},
                "admin": {"port": free_port()},
                "upstream": {"url": "http://127.0.0.1:1"},
                "control": {"addresses": ["127.0.0.1:1"], "token": "a-relay-token"} if command == "relay" else {},
                "run_dir": str(run_dir),
            }
        )
    )
    program = [sys.executable, "-m", "hemostat", command, "--config", str(config)]
    return subprocess.run(program, capture_output=True, text=True, timeout=HANG_SECONDS, check=False)


@pytest.mark.parametrize(
    ("command", "folder"),
    [
        pytest.param("serve", "x" * 120, id="its path is too long"),
        pytest.param("relay", "x" * 120, id="its path is too long for a relay"),
        pytest.param("serve", "run/control.lock", id="a folder is in place of the lock"),
    ],
)
def test_a_run_folder_that_cannot_be_used_is_reported_in_one_line_with_exit_code_2(
    tmp_path: Path, command: str, folder: str
) -> None:
    (tmp_path / folder).mkdir(parents=True)
    result = _run_once(command, tmp_path, tmp_path / folder.partition("/")[0])
    assert result.returncode == 2
    assert len(re.findall("ERROR.*: run_dir: cannot (?:open|bind) ", result.stderr)) == 1
    assert "Traceback" not in result.stderr


def _have_ended(pids: set[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


async def test_no_process_outlives_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    """Relays let their requests end. Everything can be started again on the same ports."""
    upstream = FakeVllm(token_delay=0.05)
    with serving(upstream) as url:
        store = {"url": f"sqlite:///{tmp_path / 'store.db'}"}
        ports = {"listen": {"host": "127.0.0.1", "port": free_port()}, "admin": {"port": free_port()}}
        for _ in range(2):
            with hemostat(tmp_path, upstream, url, store=store, workers=2, **ports) as served:
                served.admin = f"http://127.0.0.1:{ports['admin']['port']}"
                await served.until(lambda status: status["relays"] == 2)
                await until(served.spare)
                children = served.children()
                assert len(children) == 4, "two relays, a spare one, the control process"
                asking = asyncio.create_task(served.ask("a question", max_tokens=20))
                await until(lambda: "a question" in str(upstream.requests))
                served.process.kill()
                await until(partial(_have_ended, children))
                assert (await asking).status_code == 200
                upstream.requests.clear()


async def test_an_operator_whose_action_waits_for_the_store_as_the_process_stops_is_told_so(tmp_path: Path) -> None:
    upstream, store = FakeVllm(), tmp_path / "store.db"
    with serving(upstream) as url, hemostat(tmp_path, upstream, url, store={"url": f"sqlite:///{store}"}) as served:
        await served.until(lambda status: status["control"]["state"] == "active" and status["relays"] == 1)
        await until(store.exists)
        (control,) = served.pids("hemostat.control.process")
        with closing(sqlite3.connect(store, isolation_level=None, timeout=60)) as other:
            other.execute("BEGIN EXCLUSIVE")  # as a backup that takes long
            async with httpx.AsyncClient(base_url=served.admin, headers=AUTHORIZED, timeout=60) as client:
                asking = asyncio.create_task(client.post("/api/v1/calibration", json={"mode": "off"}))
                await asyncio.sleep(0.3)
                os.kill(control, signal.SIGTERM)
                answer = await asking
            assert answer.status_code == 503, answer.text
            assert "this process stops" in answer.json()["detail"]
            assert answer.headers["retry-after"] == "2"
            other.execute("ROLLBACK")
        await until(lambda: control not in served.pids("hemostat.control.process"))
        assert "Traceback" not in served.log.read_text()
