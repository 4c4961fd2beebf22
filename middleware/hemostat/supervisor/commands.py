"""The commands to the supervisor: from signals, and from successors that connect."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections import deque
from collections.abc import Coroutine
from enum import Enum, auto
from typing import Any, TypeVar

from hemostat.supervisor.takeover import Channel

T = TypeVar("T")


class Command(Enum):
    RELOAD = auto()
    """The command of SIGHUP."""
    UPGRADE = auto()
    """The command of SIGUSR2."""


class Stopped(Exception):
    """The supervisor got SIGTERM or SIGINT."""


class Commands:
    """Owns those that wait, in order of arrival; a signal that waits already is not added again."""

    def __init__(self) -> None:
        self._stop = asyncio.Event()
        self._waiting: deque[Command | Channel] = deque()
        self._arrived = asyncio.Event()
        self._listener: socket.socket | None = None
        loop = asyncio.get_running_loop()
        for sig in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(sig, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._add, Command.RELOAD)
        loop.add_signal_handler(signal.SIGUSR2, self._add, Command.UPGRADE)

    def listen(self, listener: socket.socket) -> None:
        """Listens to successors, which connect to it."""
        self._listener = listener
        asyncio.get_running_loop().add_reader(listener, self._accept)

    def close(self) -> None:
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
        for waiter in self._waiting:
            if isinstance(waiter, Channel):
                waiter.close()

    async def next(self) -> Command | Channel:
        while not self._waiting:
            self._arrived.clear()
            await self.unless_stopped(self._arrived.wait())
        return self._waiting.popleft()

    async def unless_stopped(self, work: Coroutine[Any, Any, T]) -> T:
        """Returns the work's result; it is cancelled, and Stopped raised, when the supervisor is to stop."""
        working = asyncio.ensure_future(work)
        stopping = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise Stopped
            return working.result()
        finally:
            working.cancel()
            stopping.cancel()
            await asyncio.gather(working, stopping, return_exceptions=True)

    def _add(self, command: Command | Channel) -> None:
        if command not in self._waiting:
            self._waiting.append(command)
        self._arrived.set()

    def _accept(self) -> None:
        assert self._listener is not None
        with contextlib.suppress(OSError):
            self._add(Channel(self._listener.accept()[0]))
