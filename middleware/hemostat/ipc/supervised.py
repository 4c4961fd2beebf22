"""What processes need that a supervisor, or another parent, has started."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hemostat.tracing import Tracing

_PR_SET_PDEATHSIG = 1
MAX_LINE_BYTES = 16 * 1024 * 1024
"""Of what the supervisor sends."""


def die_with_parent(parent: int, sig: int = signal.SIGTERM) -> None:
    """Have the kernel send `sig` when the process `parent` is gone; ends at once if it is gone already. Linux only."""
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, sig, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(0)


def tell_supervisor(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)  # noqa: T201  the supervisor reads it


def run_supervised(run: Callable[[dict[str, Any], asyncio.StreamReader], Coroutine[Any, Any, None]]) -> None:
    """The life of a process that the supervisor keeps: it says that it is loaded, and is given its settings.

    run: gets the first line of standard input, and the stream of further ones.
    """

    async def begin() -> None:
        lines = asyncio.StreamReader(limit=MAX_LINE_BYTES)
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
        if line := await lines.readline():
            await run(json.loads(line), lines)

    die_with_parent(os.getppid())
    tell_supervisor({"loaded": True})
    asyncio.run(begin())


def stop_event() -> asyncio.Event:
    """Set by SIGTERM and SIGINT from now on."""
    stop = asyncio.Event()
    for sig in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(sig, stop.set)
    return stop


def is_compiled(module: str) -> bool:
    """Whether this process has loaded that module from machine code instead of its source; False if not loaded."""
    return str(getattr(sys.modules.get(module), "__file__", "")).endswith(tuple(EXTENSION_SUFFIXES))


def make_tracing(config: dict[str, Any] | None) -> Tracing | None:
    """From `tracing` of the configuration; None where it names no endpoint."""
    if not config or not config.get("endpoint"):
        return None
    from hemostat.tracing import Tracing  # noqa: PLC0415  an extra: only what is used

    return Tracing(config["endpoint"], config["ratio"], version("hemostat"))
