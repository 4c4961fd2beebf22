"""A child process that is kept running: the system refuses processes for a while, or it does nothing any more."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from tests.support.waiting import until

from hemostat.ipc import liveness
from hemostat.ipc.liveness import Silence
from hemostat.supervisor import child as module
from hemostat.supervisor.child import Child, Launch, StartFailure

LISTENS = "print('{}', flush=True); input(); print('{}', flush=True)"
"""And ends at once."""


async def test_a_child_is_restarted_until_the_system_allows_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    create, calls = asyncio.create_subprocess_exec, 0

    async def scarce(*_: Any, **options: Any) -> asyncio.subprocess.Process:
        nonlocal calls
        calls += 1
        if calls in {2, 3}:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return await create(sys.executable, "-c", LISTENS, **options)

    monkeypatch.setattr(module, "RESTART_SECONDS", (0.01,))
    monkeypatch.setattr(asyncio, "create_subprocess_exec", scarce)
    child = Child("relay 0", "unused", Launch({}))
    await child.start()
    child.keep()
    try:
        await until(lambda: calls >= 4)
    finally:
        await child.stop(signal.SIGKILL, 30.0)


async def test_a_first_start_that_the_system_refuses_is_a_start_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scarce(*_: Any, **options: Any) -> asyncio.subprocess.Process:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(asyncio, "create_subprocess_exec", scarce)
    with pytest.raises(StartFailure):
        await Child("relay 0", "unused", Launch({})).start()


SERVES = """
import asyncio, sys, time
from hemostat.ipc import liveness
{change}
print("{}", flush=True); input(); print("{}", flush=True)

async def main():
    beating = asyncio.create_task(liveness.beat())
    await asyncio.sleep(0.05)
    {work}
    await asyncio.Event().wait()

asyncio.run(main())
"""
OFTEN = "liveness.BEAT_SECONDS = 0.02"


@asynccontextmanager
async def kept(
    monkeypatch: pytest.MonkeyPatch, silent_seconds: float, work: str = "pass", change: str = OFTEN
) -> AsyncIterator[Child]:
    """A child that does this work in its event loop once it listens."""
    create = asyncio.create_subprocess_exec
    code = SERVES.replace("{change}", change).replace("{work}", work)

    async def own(*_: Any, **options: Any) -> asyncio.subprocess.Process:
        return await create(sys.executable, "-c", code, **options)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", own)
    child = Child("relay 0", "unused", Launch({}), silent_seconds=silent_seconds)
    await child.start()
    child.keep()
    try:
        yield child
    finally:
        await child.stop(signal.SIGKILL, 30.0)


HANGS = {
    "SIGSTOP": "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)",
    "its event loop never runs again": "time.sleep(1000)",
}


@pytest.mark.parametrize("hang", HANGS)
async def test_a_child_that_does_nothing_any_more_is_killed_and_started_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, hang: str
) -> None:
    monkeypatch.setattr(liveness, "LOOK_SECONDS", 0.02)
    async with kept(monkeypatch, 0.2, HANGS[hang]) as child:
        first = child.pid
        await until(lambda: child.pid != first)
    assert "silent for 0 s; killed" in caplog.text


async def test_a_child_that_is_busy_for_a_third_of_the_limit_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers are the program's, twenty times as fast: 20 s of work in one step, and a limit of 60 s."""
    monkeypatch.setattr(liveness, "LOOK_SECONDS", liveness.LOOK_SECONDS / 20)
    work = "\n    ".join(["time.sleep(1.0)", "await asyncio.sleep(0.1)"] * 3)
    async with kept(monkeypatch, liveness.SILENT_SECONDS / 20, work) as child:
        first = child.pid
        await asyncio.sleep(3.5)
        assert child.pid == first
        assert child.running


@pytest.mark.slow
async def test_a_child_whose_event_loop_is_blocked_for_20_s_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    change = "print('begins', file=sys.stderr)"
    async with kept(monkeypatch, liveness.SILENT_SECONDS, "time.sleep(20)", change) as child:
        first = child.pid
        await asyncio.sleep(25.0)
        assert child.pid == first
        assert child.running


async def test_a_child_of_a_version_that_says_nothing_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "LOOK_SECONDS", 0.02)
    silent = "liveness.BEAT = b'something else\\n'"
    async with kept(monkeypatch, 0.1, "time.sleep(1000)", silent) as child:
        first = child.pid
        await asyncio.sleep(0.5)
        assert child.pid == first


async def test_a_pause_of_the_supervisor_itself_does_not_count_as_silence() -> None:
    silence = Silence(0.0)
    assert silence.look(5.0) == 5.0
    assert silence.look(10_000.0) == 15.0  # its machine was suspended
    silence.broken()
    assert silence.look(10_005.0) == 5.0
