"""Kills, reloads, upgrades and restarts of `hemostat serve` while clients stream: what is refused, what is cut."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tests.bench.faults import Row
from tests.support.connections import established, sockets
from tests.support.fake_vllm import FakeVllm, serving
from tests.support.served import RELAY, Served, hemostat
from tests.support.streaming_load import Load, streaming_load
from tests.support.waiting import until

NAME = "operations"
TAKES = "4 minutes"

CLIENTS = 24
TOKENS = 40
TOKEN_SECONDS = 0.02
WORKERS = 2
RATE = 500
"""Requests per second, each on a connection of its own, while one relay is killed."""
WINDOW_SECONDS = 2.0
"""From the kill on: the time of the requests whose latencies count."""
ROUNDS = 3
"""Of reloads and of upgrades, one after the other under the same load."""
MARKER = "hemostat.serve: process "
"""In the log of a supervisor whose successor serves, before the successor's process id."""
CONTROL = "hemostat.control.process"
WAIT_SECONDS = 120.0

Attack = Callable[[Served, Load], Awaitable[int]]
"""Does harm under load; the number of answers that may be cut."""


@dataclass(frozen=True, slots=True)
class Case:
    """before: of commit c8891da, by the same load."""

    name: str
    attack: Attack
    before: str


async def kill_relays(served: Served, load: Load) -> int:
    await until(lambda: load.streaming == CLIENTS, WAIT_SECONDS)
    for pid in served.pids(RELAY):
        os.kill(pid, signal.SIGKILL)
    await load.until_more(CLIENTS)
    return CLIENTS


async def kill_control(served: Served, load: Load) -> int:
    for pid in served.pids(CONTROL):
        os.kill(pid, signal.SIGKILL)
    await load.until_more(2 * CLIENTS)
    return 0


async def roll(served: Served, load: Load) -> int:
    """SIGHUP without a change replaces every relay."""
    for _ in range(ROUNDS):
        former = served.pids(RELAY)
        served.process.send_signal(signal.SIGHUP)
        await until(lambda former=former: len(served.pids(RELAY) - former) >= WORKERS, WAIT_SECONDS)  # type: ignore[misc]
        await load.until_more(CLIENTS)
    return 0


async def reload(served: Served, load: Load) -> int:
    """Settings of the relays and of the control process change; one file is not valid."""
    config = served.log.parent / "hemostat.yaml"
    settings: dict[str, Any] = yaml.safe_load(config.read_text())
    (control,) = served.pids(CONTROL)
    for change in ({"workers": "many"}, {"workers": 3}, {"labels": ["batch"]}):
        config.write_text(yaml.safe_dump(settings | change))
        served.process.send_signal(signal.SIGHUP)
        await load.until_more(CLIENTS)
    await until(lambda: served.pids(CONTROL) - {control}, WAIT_SECONDS)
    return 0


def successor(served: Served) -> int:
    """The process id of the last supervisor that took over; 0: none did."""
    _, separator, rest = served.log.read_text().rpartition(MARKER)
    return int(rest.split()[0]) if separator else 0


async def upgrade(served: Served, load: Load) -> int:
    """SIGUSR2 to each supervisor in turn."""
    for _ in range(ROUNDS):
        former = successor(served)
        os.kill(former or served.process.pid, signal.SIGUSR2)
        await until(lambda former=former: successor(served) != former, WAIT_SECONDS)  # type: ignore[misc]
        await load.until_more(CLIENTS)
    return 0


async def start_beside(served: Served, load: Load) -> int:
    """`hemostat serve` anew with the same run_dir."""
    command = [sys.executable, "-m", "hemostat", "serve", "--config", str(served.log.parent / "hemostat.yaml")]
    with (served.log.parent / "second.log").open("w") as log:
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)  # noqa: ASYNC220  returns at once
    await until(lambda: successor(served), WAIT_SECONDS)
    await load.until_more(2 * CLIENTS)
    return 0


CASES = (
    Case("kill -9 of every relay", kill_relays, "907 connections refused within 5 s, 35 answers cut"),
    Case("kill -9 of the control process", kill_control, ""),
    Case(f"SIGHUP, {ROUNDS} times: every relay replaced", roll, "it ended: 24 answers cut, then all refused"),
    Case("SIGHUP: a file that is not valid, then other settings of relays and control", reload, "as above"),
    Case(f"SIGUSR2, {ROUNDS} upgrades in place", upgrade, "it ended: 24 answers cut, then all refused"),
    Case("`hemostat serve` started beside a running one", start_beside, "it did not start: the port was in use"),
)


@contextmanager
def _served() -> Iterator[Served]:
    upstream = FakeVllm(token_delay=TOKEN_SECONDS)
    with tempfile.TemporaryDirectory() as folder, serving(upstream) as url:
        path = Path(folder)
        (path / "run").mkdir()
        settings = {"run_dir": str(path / "run"), "store": {"url": f"sqlite:///{path / 'store.db'}"}}
        with hemostat(path, upstream, url, workers=WORKERS, shadow={"rate": 0.0}, **settings) as served:
            try:
                yield served
            finally:
                if pid := successor(served):
                    os.kill(pid, signal.SIGTERM)
                    _wait_for_end(pid)


def _wait_for_end(pid: int) -> None:
    with suppress(OSError):
        while os.readlink(f"/proc/{pid}/exe"):  # fails for a zombie, too
            time.sleep(0.05)


async def _under_load(attack: Attack) -> tuple[Load, int]:
    with _served() as served:
        await served.until(lambda s: s["relays"] == WORKERS, WAIT_SECONDS)
        async with streaming_load(served.data, CLIENTS, TOKENS) as load:
            await load.until_more(CLIENTS)
            allowed = await attack(served, load)
        return load, allowed


async def _spread(connections: int) -> int:
    """New connections that the busier one of two relays gets, of a burst."""
    with _served() as served:
        await served.until(lambda s: s["relays"] == WORKERS, WAIT_SECONDS)
        port = int(served.data.rpartition(":")[2])
        opened = [await asyncio.open_connection("127.0.0.1", port) for _ in range(connections)]
        held = Counter[int]()

        def count() -> bool:
            held.clear()
            for pid in served.pids(RELAY):
                held[pid] = _connections(pid, port)
            return sum(held.values()) == connections

        await until(count, WAIT_SECONDS)
        for _, writer in opened:
            writer.close()
        return max(held.values())


def _connections(pid: int, port: int) -> int:
    """The number of established connections to this port that a process has accepted."""
    return len(set(established(port).values()) & sockets(pid))


async def _latencies(url: str, kill: Callable[[], None]) -> tuple[list[float], int]:
    """Seconds of each request that began within WINDOW_SECONDS after `kill`, connecting included, as clients that do
    not wait for each other see them; and how many of all were not answered."""
    address = url.removeprefix("http://").split(":")
    unanswered = 0

    async def request() -> float:
        nonlocal unanswered
        started = time.monotonic()
        try:
            reader, writer = await asyncio.open_connection(address[0], int(address[1]))
            writer.write(b"GET /v1/models HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            unanswered += not (await reader.read()).startswith(b"HTTP/1.1 200 ")
            writer.close()
        except ConnectionError:
            unanswered += 1
        return time.monotonic() - started

    async def requests(seconds: float) -> list[asyncio.Task[float]]:
        begun, ends = time.monotonic(), []
        for number in range(int(seconds * RATE)):
            await asyncio.sleep(begun + number / RATE - time.monotonic())
            ends.append(asyncio.create_task(request()))
        return ends

    before = await requests(WINDOW_SECONDS)
    kill()
    measured = await requests(WINDOW_SECONDS)
    await asyncio.gather(*before)
    return sorted(await asyncio.gather(*measured)), unanswered


def _killed_relay() -> Row:
    with _served() as served:
        asyncio.run(served.until(lambda s: s["relays"] == WORKERS, WAIT_SECONDS))
        asyncio.run(until(served.spare, WAIT_SECONDS))
        latencies, unanswered = asyncio.run(
            _latencies(served.data, lambda: os.kill(min(served.pids(RELAY)), signal.SIGKILL))
        )
    p99 = latencies[int(0.99 * len(latencies))]
    return Row(
        f"kill -9 of one of {WORKERS} relays at {RATE} requests/s: p99 of those of the next {WINDOW_SECONDS:g} s",
        "3.1 s",
        f"{p99:.3f} s, {unanswered} of {2 * len(latencies)} not answered",
        "at most 0.3 s, and 1 % not answered: those that the killed relay had accepted",
        p99 <= 0.3 and unanswered <= 0.01 * 2 * len(latencies),
    )


def rows() -> Iterator[Row]:
    yield _killed_relay()
    for case in CASES:
        load, allowed = asyncio.run(_under_load(case.attack))
        wrong = load.refused + load.failed + max(0, load.cut - allowed)
        measured = f"{load.refused} refused, {load.cut} cut, {load.failed} failed, {load.complete} complete"
        limit = "0 refused, " + (f"at most {allowed} cut: those of the killed processes" if allowed else "0 cut")
        yield Row(f"{case.name} ({CLIENTS} streams)", case.before, measured, limit, wrong == 0)
    most = asyncio.run(_spread(64))
    yield Row("64 connections at once to 2 relays: those of the busier one", "", most, "at most 48", most <= 48)
