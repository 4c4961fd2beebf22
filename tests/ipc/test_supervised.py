"""Processes whose supervisor is killed with SIGKILL: each ends, also one whose orderly stop never comes to its end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.waiting import HANG_SECONDS, until

SUPERVISOR = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child.stdout.readline()  # it is loaded
child.stdin.write(b'{}\\n')
child.stdin.flush()
child.stdout.readline()  # it runs
print(child.pid, flush=True)
child.wait()
"""
CHILD = """
import asyncio, time
from hemostat.ipc import supervised
supervised.PARENT_LOOK_SECONDS, supervised.STOP_SECONDS = 0.05, 0.1

async def run(given, lines):
    stop = supervised.stop_event()
    supervised.tell_supervisor({"listening": True})
    {work}

supervised.run_supervised(run)
"""
WORKS = {
    "it stops in order": "await stop.wait()",
    "its stop never ends": "await stop.wait(); await asyncio.Event().wait()",
    "its event loop is blocked": "time.sleep(1000)",
    "a task loses its cancellation": """
    async def forever():
        while True:
            try:
                await asyncio.sleep(1000)
            except asyncio.CancelledError:
                pass
    task = asyncio.create_task(forever())
    await stop.wait()
    task.cancel()
    await asyncio.gather(task)""",
}


def is_alive(pid: int) -> bool:
    """A process that has ended and waits for its parent does not count."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def orphan(work: str) -> int:
    """A process whose supervisor has just been killed."""
    command = [sys.executable, "-c", SUPERVISOR, CHILD.replace("{work}", work)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as supervisor:
        assert supervisor.stdout is not None
        result = int(supervisor.stdout.readline())
        supervisor.kill()
    return result


@pytest.mark.parametrize("work", WORKS)
async def test_a_process_ends_with_its_supervisor(work: str) -> None:
    child = orphan(WORKS[work])
    try:
        await until(lambda: not is_alive(child), HANG_SECONDS / 4)
    finally:
        if is_alive(child):
            os.kill(child, signal.SIGKILL)
