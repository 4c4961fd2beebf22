"""The health of the engines where no relay reports it: the control process asks each for `/health` itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

from hemostat.engines.configured import ConfiguredEngines
from hemostat.engines.engine import UP
from hemostat.ipc.messages import EngineHealth
from hemostat.reference.protocol import ReferenceFailure
from hemostat.reference.server import VllmServer

CHECK_SECONDS = 2.0
TIMEOUT_SECONDS = 5.0
DOWN = "ejected"


class DirectEngines:
    """Owns which engines answer. connect: returns a client of the engine at an address."""

    def __init__(self, configured: ConfiguredEngines, connect: Callable[[str, float], VllmServer]) -> None:
        self._configured = configured
        self._connect = connect
        self._servers: dict[str, VllmServer] = {}
        self._answers: dict[str, bool] = {}

    def engines(self) -> Iterator[list[EngineHealth]]:
        """Yields the engines in the form in which a relay reports them; nothing before the first check."""
        if self._answers:
            yield [
                EngineHealth(name, UP if answers else DOWN, False, 0, 0, 0, 0)
                for name, answers in self._answers.items()
            ]

    def only(self) -> str:
        """Returns the engine's address if there is one; else ""."""
        return next(iter(self._answers)) if len(self._answers) == 1 else ""

    async def check(self) -> None:
        """Asks every engine once."""
        names = self._configured.names()
        answers = await asyncio.gather(*map(self._check, names))
        self._answers = dict(zip(names, answers, strict=True))
        for name in self._servers.keys() - set(names):
            await self._servers.pop(name).close()

    async def _check(self, name: str) -> bool:
        try:
            if name not in self._servers:
                self._servers[name] = self._connect(name, TIMEOUT_SECONDS)
            await self._servers[name].text("GET", "/health")
        except ReferenceFailure:
            return False
        return True

    async def run(self) -> None:
        """Checks again and again, until it is cancelled."""
        try:
            while True:
                await self.check()
                await asyncio.sleep(CHECK_SECONDS)
        finally:
            for server in self._servers.values():
                await server.close()
