"""A relay process that has loaded its modules and waits for its settings, so that one that ends is replaced at once."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Sequence

from hemostat.supervisor.child import Child, Launch, StartFailure

log = logging.getLogger("hemostat.serve")

KILL_SECONDS = 5.0


class SpareRelay:
    """Owns the process until a relay takes it; then it loads the next one.

    Loading takes more than a second, during which the connections to the ended relay's socket would wait. Another relay
    cannot accept them meanwhile: it would also get that socket's share of the connections afterwards.
    """

    def __init__(self, module: str) -> None:
        self._module = module
        self._child: Child | None = None
        self._loading: asyncio.Task[None] | None = None
        self._loaded = False

    async def provide(self, fds: Sequence[int]) -> None:
        """Loads a process that inherits these file descriptors, which are the ones of every relay, in place of the
        present one.
        """
        await self.stop()
        self._load(tuple(fds))

    def take(self) -> Child | None:
        """Returns the loaded process, which is then no longer the spare one; None: it is not ready."""
        child = self._child
        if child is None or self._loading is None or not self._loading.done():
            return None
        ready = self._loaded and child.running
        self._load(child.launch.fds)
        return child if ready else None

    async def stop(self) -> None:
        loading, self._loading = self._loading, None
        child, self._child = self._child, None
        if loading is not None:
            loading.cancel()
            await asyncio.gather(loading, return_exceptions=True)
        if child is not None:
            await child.stop(signal.SIGKILL, KILL_SECONDS)

    def _load(self, fds: tuple[int, ...]) -> None:
        self._child = Child("spare relay", self._module, Launch({}, fds))
        self._loaded = False
        self._loading = asyncio.create_task(self._wait_for(self._child), name="loads a spare relay")

    async def _wait_for(self, child: Child) -> None:
        try:
            await child.load()
        except StartFailure as failure:
            log.error("%s; it is tried again when a relay has ended", failure)
        else:
            self._loaded = True
            log.info("a spare relay waits (pid %d)", child.pid)
