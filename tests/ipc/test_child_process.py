"""Helper processes, which compute without an event loop: one that is stopped is killed, one that computes is not."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

import pytest
from tests.support.waiting import until

from hemostat.ipc import liveness
from hemostat.ipc.child_process import Child

COMPUTES = "print('begins', flush=True)\nwhile True: pass"


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(liveness, "SILENT_SECONDS", 0.3)


async def started() -> Child:
    lines: list[bytes] = []
    child = await Child.start_command((sys.executable, "-c", COMPUTES), lines.append)
    await until(lambda: lines)
    return child


async def test_a_helper_that_is_stopped_is_killed_and_says_why() -> None:
    child = await started()
    os.kill(child.pid, signal.SIGSTOP)
    await until(child.exited.is_set)
    await child.close()
    assert child.exit_summary().startswith("it had been stopped (SIGSTOP)")
    assert child.returncode == -signal.SIGKILL


async def test_a_helper_that_computes_and_says_nothing_is_left_alone() -> None:
    child = await started()
    await asyncio.sleep(1.0)
    assert not child.exited.is_set()
    await child.close(grace_seconds=0.0)


async def test_a_helper_that_goes_on_in_time_is_left_alone() -> None:
    child = await started()
    for _ in range(4):
        os.kill(child.pid, signal.SIGSTOP)
        await asyncio.sleep(0.1)
        os.kill(child.pid, signal.SIGCONT)
        await asyncio.sleep(0.1)
    assert not child.exited.is_set()
    await child.close(grace_seconds=0.0)
