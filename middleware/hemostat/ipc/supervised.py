"""The parts that processes need which a supervisor, or another parent, has started."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hemostat.tracing import Tracing

_PR_SET_PDEATHSIG = 1
MAX_LINE_BYTES = 16 * 1024 * 1024
"""The largest line that the supervisor sends."""
STOP_SECONDS = 10.0
"""A process that stops in order is killed after this time, unless its own settings give it more."""
KILL_AFTER_SECONDS = 5.0
"""The time between the end of a relay's own time to drain and the kill."""
PARENT_LOOK_SECONDS = 1.0


def die_with_parent(parent: int, sig: int = signal.SIGTERM) -> None:
    """Has this process get `sig` when the process `parent` is gone; it ends at once if that is gone already.

    Linux sends the signal when the *thread* ends that has started this process, so that every parent starts its
    processes in its main thread. On other platforms a thread of this process looks after the parent.
    """
    if sys.platform.startswith("linux"):
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_PR_SET_PDEATHSIG, sig, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(0)
    if not sys.platform.startswith("linux"):
        ParentWatch(parent, sig, STOP_SECONDS)


class ParentWatch:
    """A thread that ends this process after its parent: with `sig`, and `grace_seconds` later by SIGKILL.

    A signal alone is not enough. Without its parent nobody kills a process whose orderly stop does not come to its end:
    it would hold the listening ports and the store's lock for good. Neither a blocked event loop nor a task that
    ignores its cancellation stops this thread. grace_seconds: may be changed while it runs.
    """

    def __init__(self, parent: int, sig: int, grace_seconds: float) -> None:
        self.grace_seconds = grace_seconds
        self._parent = parent
        self._sig = sig
        threading.Thread(target=self._watch, name="watches the parent", daemon=True).start()

    def _watch(self) -> None:
        while os.getppid() == self._parent:
            time.sleep(PARENT_LOOK_SECONDS)
        os.kill(os.getpid(), self._sig)
        time.sleep(self.grace_seconds)
        os.kill(os.getpid(), signal.SIGKILL)


def tell_supervisor(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)  # noqa: T201  the supervisor reads it


def run_supervised(run: Callable[[dict[str, Any], asyncio.StreamReader], Coroutine[Any, Any, None]]) -> None:
    """Runs a process that the supervisor keeps: it says that it is loaded, and is given its settings.

    run: gets the first line of standard input, and the stream of further ones.
    """

    async def begin() -> None:
        lines = asyncio.StreamReader(limit=MAX_LINE_BYTES)
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
        if line := await lines.readline():
            await run(json.loads(line), lines)

    end_after_supervisor()
    tell_supervisor({"loaded": True})
    asyncio.run(begin())


def end_after_supervisor() -> ParentWatch:
    """Is the first step of a process that the supervisor keeps. From then on the process stops in order once the
    supervisor is gone, and is killed if that takes too long; the watch that does so is returned. A supervisor that is
    gone before this call is noticed at the end of the input."""
    parent = os.getppid()
    die_with_parent(parent)
    return ParentWatch(parent, signal.SIGTERM, STOP_SECONDS)


def stop_event() -> asyncio.Event:
    """Returns an event that SIGTERM and SIGINT set from now on."""
    stop = asyncio.Event()
    for sig in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(sig, stop.set)
    return stop


def is_compiled(module: str) -> bool:
    """Returns True if this process has loaded that module from machine code instead of its source; False if it is not
    loaded.
    """
    return str(getattr(sys.modules.get(module), "__file__", "")).endswith(tuple(EXTENSION_SUFFIXES))


def make_tracing(config: dict[str, Any] | None) -> Tracing | None:
    """Returns the tracing that `tracing` of the configuration describes; None if it names no endpoint."""
    if not config or not config.get("endpoint"):
        return None
    from hemostat.tracing import Tracing  # noqa: PLC0415  an extra: only what is used

    return Tracing(config["endpoint"], config["ratio"], version("hemostat"))
