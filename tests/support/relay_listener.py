"""What relays connect to, in a test: a control process's end on a Unix socket."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from hemostat.ipc.control_end import RelayLink
from hemostat.ipc.messages import PROTOCOL, Hello
from hemostat.ipc.relay_listener import RelayListener, listen_locally


def listen(link: RelayLink, path: Path) -> RelayListener:
    """Admits relays to the link, until it is closed."""
    listener = RelayListener([listen_locally(path)])
    listener.admit = link.serve
    listener.start()
    return listener


@asynccontextmanager
async def listening(link: RelayLink, path: Path) -> AsyncIterator[RelayLink]:
    listener = listen(link, path)
    try:
        yield link
    finally:
        await listener.close()


def hello(process: str = "", *, pid: int = 1, worker: int = 0, compiled: bool = False) -> Hello:
    """Of a relay of this version."""
    return Hello(protocol=PROTOCOL, process=process, pid=pid, worker=worker, compiled=compiled)
