"""Tells parents if their processes still work: a process says so while its event loop runs, and silence is counted.

A process that is stopped (SIGSTOP, a debugger), or whose event loop never runs again, holds the store's lock or its
clients and does nothing for them. Its parent kills it after a time that no work takes, and starts another one. A
process whose event loop is busy for seconds is left alone.

Supervisors listen to `beat`. A helper computes for hours without an event loop, so that its parent asks only whether it
`is_stopped`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import sys
from pathlib import Path

BEAT = b'{"alive": true}\n'
"""The line that a process writes while its event loop runs."""
BEAT_SECONDS = 5.0
LOOK_SECONDS = 5.0
"""The pause between two looks at a process."""
SILENT_SECONDS = 60.0
"""A process that has been silent or stopped for so long is killed."""
RELAY_SILENT_SECONDS = 120.0
"""A relay that has been silent for so long is killed, and its clients lose their answers.

They have got no byte for these two minutes, and nobody serves the relay's share of the new connections, so it is better
to kill it than to leave it. It is given more time than others, because a relay that is killed by mistake hurts
clients. One step of its event loop takes milliseconds.
"""


async def beat() -> None:
    """Writes BEAT to standard output every BEAT_SECONDS, until cancelled. It is begun once the process listens.

    It never waits for the supervisor: nothing is written where that does not read, or is gone.
    """
    output = sys.stdout.fileno()
    while True:
        with contextlib.suppress(OSError):  # it may be closed
            if select.select((), (output,), (), 0.0)[1]:
                os.write(output, BEAT)
        await asyncio.sleep(BEAT_SECONDS)


class Silence:
    """Counts the seconds for which a process has been silent or stopped, by looks every LOOK_SECONDS.

    Whoever looks may have been stopped itself, with its machine for example. So one look adds at most twice the pause
    between two looks, and what the process has said meanwhile is heard before the next one.
    """

    def __init__(self, now: float) -> None:
        """now: monotonic seconds, as in `look`."""
        self._looked_at = now
        self.seconds = 0.0

    def broken(self) -> None:
        """The process has said something, or is not stopped."""
        self.seconds = 0.0

    def look(self, now: float) -> float:
        """Returns the seconds of silence so far."""
        self.seconds += min(now - self._looked_at, 2.0 * LOOK_SECONDS)
        self._looked_at = now
        return self.seconds


def is_stopped(pid: int) -> bool:
    """Returns True if SIGSTOP or a debugger has stopped this process, and False if the system does not say."""
    try:
        # The name of the program, in parentheses, may have any bytes.
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] in {b"T", b"t"}
    except OSError:
        return False
