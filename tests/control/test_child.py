"""A child process that is kept running though the system refuses processes for a while."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import sys
from typing import Any

import pytest
from tests.support.waiting import until

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
