"""The relay process that is loaded before it is needed."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from tests.support.waiting import until

from hemostat.supervisor.child import Child, Launch
from hemostat.supervisor.relays import SpareRelay

RELAY = """
import json, os, sys
print("{}", flush=True)
settings = json.loads(input())
print(json.dumps({"pid": os.getpid(), **settings}), flush=True)
sys.stdin.read()
"""
"""It tells what it is started with."""


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> list[asyncio.subprocess.Process]:
    """All that have been started."""
    create, started = asyncio.create_subprocess_exec, []

    async def start(*_: Any, **options: Any) -> asyncio.subprocess.Process:
        started.append(await create(sys.executable, "-c", RELAY, **options))
        return started[-1]

    monkeypatch.setattr(asyncio, "create_subprocess_exec", start)
    return started


@asynccontextmanager
async def serving(fds: list[int]) -> AsyncIterator[list[Child]]:
    """A relay for each file descriptor, and their spare."""
    spare = SpareRelay("unused")
    relays = [Child("relay", "unused", Launch({"fds": [fd]}, (fd,)), spare.take) for fd in fds]
    try:
        for relay in relays:
            await relay.start()
            relay.keep()
        await spare.provide(fds)
        yield relays
    finally:
        await spare.stop()
        for relay in relays:
            await relay.stop(signal.SIGKILL, 30.0)


def pids(processes: list[asyncio.subprocess.Process]) -> list[int]:
    return [process.pid for process in processes if process.returncode is None]


async def test_a_relay_that_ends_is_replaced_by_one_that_was_loaded_before(
    processes: list[asyncio.subprocess.Process], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "hemostat.serve")
    pair = list(os.pipe())
    try:
        async with serving(pair) as relays:
            await until(lambda: "a spare relay waits" in caplog.text)
            first, second, spare = pids(processes)
            os.kill(second, signal.SIGKILL)
            await until(lambda: relays[1].listening["pid"] != second)
            assert relays[1].listening == {"pid": spare, "fds": [pair[1]], "other_fds": [pair[0]]}
            assert relays[0].listening["pid"] == first
            await until(lambda: len(pids(processes)) == 3)
            await until(lambda: caplog.text.count("a spare relay waits") == 2)
        assert pids(processes) == []
    finally:
        for fd in pair:
            os.close(fd)


async def test_without_a_loaded_one_a_relay_is_started_anew(
    processes: list[asyncio.subprocess.Process], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "hemostat.serve")
    async with serving([0]) as relays:
        await until(lambda: "a spare relay waits" in caplog.text)
        relay, spare = pids(processes)
        os.kill(spare, signal.SIGKILL)
        await until(lambda: pids(processes) == [relay])
        os.kill(relay, signal.SIGKILL)
        await until(lambda: relays[0].listening["pid"] not in {relay, spare})
        await until(lambda: caplog.text.count("a spare relay waits") == 2)
    assert pids(processes) == []
