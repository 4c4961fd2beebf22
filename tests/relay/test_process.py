"""The relay process: its configuration, its link to the control process, and its exit."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import socket
import sys
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.captures import sized_capture
from tests.support.compiled import is_compiled
from tests.support.memory import resident_mib
from tests.support.relay import (
    GET,
    Client,
    Request,
    Script,
    Upstream,
    UpstreamConnection,
    answering,
    post,
)
from tests.support.relay_listener import listening
from tests.support.waiting import HANG_SECONDS, until
from tests.support.wire import policy

from hemostat.ipc.addresses import ControlAddresses
from hemostat.ipc.control_end import RelayLink
from hemostat.ipc.liveness import is_stopped
from hemostat.ipc.messages import Alive, Policy, Stats, encode
from hemostat.ipc.relay_end import MAX_QUEUED_BYTES, ControlLink

POLICY = policy(shadow_rate=0.0)
BAD_VERSION = b"X-Hemostat-Calibration: ../../etc"
"""Refused by the hook: the status shows whether there is one."""


class Process:
    """`python -m hemostat.relay.main`."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self.process = process
        self.port = port

    async def connect(self) -> Client:
        return Client(*await asyncio.open_connection("127.0.0.1", self.port))

    async def ask(self, request: bytes) -> int:
        client = await self.connect()
        await client.send(request)
        status = (await client.response()).status
        await client.close()
        return status


async def start(config: dict[str, Any], open_files: int | None = None) -> asyncio.subprocess.Process:
    limit = f"ulimit -n {open_files}; " if open_files else ""
    process = await asyncio.create_subprocess_exec(
        *("sh", "-c", f'{limit}exec "$0" -m hemostat.relay.main', sys.executable),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        pass_fds=config["fds"],
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(config).encode())
    process.stdin.close()
    assert await asyncio.wait_for(process.stdout.readline(), HANG_SECONDS) == b'{"loaded": true}\n'
    return process


@contextlib.asynccontextmanager
async def running(script: Script, control_socket: Path, open_files: int | None = None) -> AsyncIterator[Process]:
    upstream = Upstream(script)
    await upstream.start()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        process = await start(
            {
                "worker": 3,
                "fds": [listener.fileno()],
                "upstream": {"urls": [f"http://127.0.0.1:{upstream.port}"]},
                "control": {"path": str(control_socket)},
                "shutdown_seconds": 5.0,
                "drain_seconds": HANG_SECONDS,
                "limits": {"head_bytes": 65536},
            },
            open_files,
        )
    assert process.stdout is not None
    try:
        port = json.loads(await asyncio.wait_for(process.stdout.readline(), HANG_SECONDS))["listening"]
        yield Process(process, port)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        await upstream.stop()
        await asyncio.sleep(0.01)


async def test_memory_of_incomplete_heads_is_returned_when_their_clients_are_gone(tmp_path: Path) -> None:
    async with running(answering([]), tmp_path / "no.sock") as relay:
        pid = relay.process.pid
        # Not the last memory that is asked for: what stays in use behind the heads must not keep theirs.
        clients = [await relay.connect() for _ in range(500)]
        before = resident_mib(pid)
        for client in clients:
            await client.send(b"GET / HTTP/1.1\r\nX: %b" % (b"x" * 60_000))
        stays = await relay.connect()
        await stays.send(b"GET / HTTP/1.1\r\nHost: a\r\nX: %b" % (b"x" * 60_000))
        await until(lambda: resident_mib(pid) > before + 25)
        for client in clients:
            await client.close()
        await until(lambda: resident_mib(pid) < before + 8)
        await stays.send(b"\r\n\r\n")
        assert (await stays.response()).status == 200
        await stays.close()


async def refused(relay: Process) -> None:
    """Wait until it accepts no more connections. One that was in the queue when it closed its socket is reset."""
    async with asyncio.timeout(HANG_SECONDS):
        while True:
            try:
                await (await relay.connect()).close()
            except ConnectionResetError:
                continue
            except ConnectionRefusedError:
                return


async def test_a_relay_follows_its_control_process_and_continues_without_one(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    seen: list[Request] = []
    async with running(answering(seen), path) as relay:
        assert await relay.ask(post(b"{}", BAD_VERSION)) == 200, "no control process: a plain proxy"
        for _ in range(2):
            async with listening(RelayLink(), path) as link:
                link.set_policy(POLICY)
                await until(lambda link=link: link.ready)  # type: ignore[misc]
                assert await relay.ask(post(b"{}", BAD_VERSION)) == 400
            assert await relay.ask(post(b"{}", BAD_VERSION)) == 400, "a restart of the control process changes nothing"
    assert all(request.get(b"x-hemostat-calibration") == [] for request in seen)


async def test_idle_clients_leave_descriptors_for_the_upstream(tmp_path: Path) -> None:
    async with running(answering([]), tmp_path / "control.sock", open_files=160) as relay:
        idle = [await relay.connect() for _ in range(300)]
        assert await relay.ask(GET) == 200
        for client in idle:
            await client.close()


async def test_the_control_process_logs_whether_a_relay_is_compiled(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The relay's own process, which has to take the same code as the test's."""
    caplog.set_level(logging.INFO)
    path = tmp_path / "control.sock"
    async with listening(RelayLink(), path), running(answering([]), path) as relay:
        code = "compiled" if is_compiled("hemostat.relay.exchange") else "interpreted"
        await until(lambda: f"relay 3 connected (pid {relay.process.pid}, {code})" in caplog.text)


async def test_counters_are_reported(tmp_path: Path) -> None:
    link = RelayLink()
    link.set_policy(POLICY)
    path = tmp_path / "control.sock"
    async with listening(link, path), running(answering([]), path) as relay:
        await until(lambda: link.ready)
        assert await relay.ask(GET) == 200
        await until(
            lambda: "hemostat_requests_total" in link.total().counters and sum(link.total().overhead_buckets) > 0
        )
        assert link.total().counters["hemostat_requests_total"] == {("/v1/models", "ok"): 1.0}
        assert link.total().overhead_sum > 0
        relay.process.send_signal(signal.SIGTERM)
        await until(lambda: not link.ready)
        assert await relay.process.wait() == 0
    assert link.total().counters["hemostat_requests_total"] == {("/v1/models", "ok"): 1.0}


async def test_sigterm_lets_a_stream_end(tmp_path: Path) -> None:
    asked, go = asyncio.Event(), asyncio.Event()

    async def script(connection: UpstreamConnection) -> None:
        await connection.request()
        asked.set()
        await connection.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
        await go.wait()
        await connection.send(b"5\r\nworld\r\n0\r\n\r\n")

    async with running(script, tmp_path / "none.sock") as relay:
        client, idle = await relay.connect(), await relay.connect()
        await client.send(GET)
        reading = asyncio.create_task(client.response())
        await until(asked.is_set)
        relay.process.send_signal(signal.SIGTERM)
        assert await idle.rest() == b""
        with pytest.raises(ConnectionRefusedError):
            await relay.connect()
        assert relay.process.returncode is None
        go.set()
        assert (await reading).body == b"helloworld"
        assert await asyncio.wait_for(relay.process.wait(), HANG_SECONDS) == 0
        await client.close()
        await idle.close()


WAITING = 40
"""Connections in the queue of the listening socket."""


async def test_sigterm_answers_what_waits_in_the_queue_of_the_listening_socket(tmp_path: Path) -> None:
    """Their clients have connected and sent a request: they cannot know that no relay has accepted them."""
    async with running(answering([]), tmp_path / "none.sock") as relay:
        relay.process.send_signal(signal.SIGSTOP)
        await until(lambda: is_stopped(relay.process.pid))
        clients = [await relay.connect() for _ in range(WAITING)]
        for client in clients:
            await client.send(GET)
        relay.process.send_signal(signal.SIGTERM)
        relay.process.send_signal(signal.SIGCONT)
        answers = Counter[str]()
        for client in clients:
            try:
                answer = await client.response()
                answers[f"{answer.status} {answer.get(b'connection')}"] += 1
            except (OSError, asyncio.IncompleteReadError) as error:
                answers[type(error).__name__] += 1
            await client.close()
        assert answers == {"200 [b'close']": WAITING}
        assert await asyncio.wait_for(relay.process.wait(), HANG_SECONDS) == 0


async def test_sigterm_answers_a_request_that_follows_an_answer_at_once(tmp_path: Path) -> None:
    """The head of that answer had promised, before the signal, that the connection stays open."""
    go = asyncio.Event()

    async def script(connection: UpstreamConnection) -> None:
        while await connection.request() is not None:
            await connection.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
            await go.wait()
            await connection.send(b"5\r\nworld\r\n0\r\n\r\n")

    async with running(script, tmp_path / "none.sock") as relay:
        client = await relay.connect()
        await client.send(GET)
        assert b"close" not in await client.reader.readuntil(b"hello\r\n")
        relay.process.send_signal(signal.SIGTERM)
        await refused(relay)
        go.set()
        await client.reader.readuntil(b"0\r\n\r\n")
        await client.send(GET)
        second = await client.response()
        assert (second.body, second.get(b"connection")) == (b"helloworld", [b"close"])
        assert await asyncio.wait_for(relay.process.wait(), HANG_SECONDS) == 0
        await client.close()


async def test_a_replaced_relay_answers_one_more_request_of_each_connection(tmp_path: Path) -> None:
    """A client that is about to send its next request must not find its connection closed."""
    async with running(answering([]), tmp_path / "none.sock") as relay:
        used, new = await relay.connect(), await relay.connect()
        await used.send(GET)
        assert (await used.response()).get(b"connection") == []
        relay.process.send_signal(signal.SIGUSR1)
        await refused(relay)
        for client in (used, new):
            await client.send(GET)
            answer = await client.response()
            assert (answer.status, answer.get(b"connection")) == (200, [b"close"])
        assert await asyncio.wait_for(relay.process.wait(), HANG_SECONDS) == 0
        await used.close()
        await new.close()


async def test_sigterm_shortens_the_drain_of_a_replaced_relay(tmp_path: Path) -> None:
    async with running(answering([]), tmp_path / "none.sock") as relay:
        idle = await relay.connect()
        await idle.send(GET)
        await idle.response()
        relay.process.send_signal(signal.SIGUSR1)
        relay.process.send_signal(signal.SIGTERM)
        assert await idle.rest() == b""
        assert await asyncio.wait_for(relay.process.wait(), HANG_SECONDS) == 0
        await idle.close()


async def test_a_relay_that_cannot_start_exits_with_1() -> None:
    config = {"worker": 0, "fds": [], "upstream": {"urls": ["no address"]}, "control": {"path": "x"}}
    process = await start(config)
    assert await asyncio.wait_for(process.wait(), HANG_SECONDS) == 1
    assert process.stdout is not None
    assert await process.stdout.read() == b""


async def test_captures_are_dropped_while_the_link_is_full(tmp_path: Path) -> None:
    stats = Stats(counters={}, overhead_buckets=[], overhead_sum=0.0, ready=True)
    path = tmp_path / "control.sock"
    policies: list[Policy | None] = []
    link = ControlLink(ControlAddresses(str(path)), 0, policies.append, lambda: stats)
    assert not link.emit(sized_capture(size=1)), "not connected"
    running = asyncio.create_task(link.run())
    hold = asyncio.Event()
    received: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(encode(Alive()))
        await hold.wait()
        while data := await reader.read(1 << 20):
            received.append(data)
        writer.close()

    server = await asyncio.start_unix_server(serve, str(path))
    size = 1 << 20
    accepted = 0
    while not link.emit(sized_capture(size=size)):
        await asyncio.sleep(0.01)
    while link.emit(sized_capture(size=size)):
        accepted += 1
        assert accepted * size < 4 * MAX_QUEUED_BYTES, "it is bounded"
    assert accepted * size >= MAX_QUEUED_BYTES / 2
    hold.set()
    await until(lambda: link.emit(sized_capture(size=1)))
    await link.close()
    assert policies == []
    assert sum(map(len, received)) > accepted * size
    running.cancel()
    server.close()
    await asyncio.sleep(0.01)
