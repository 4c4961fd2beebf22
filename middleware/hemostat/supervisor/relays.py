"""The relay processes, those that were replaced and let their requests end, and a spare one.

The spare one has loaded its modules and waits for its settings, so that a relay that ends is replaced at once.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hemostat.config.fields import split_address
from hemostat.config.schema import Settings
from hemostat.ipc.liveness import RELAY_SILENT_SECONDS
from hemostat.ipc.supervised import KILL_AFTER_SECONDS
from hemostat.supervisor.child import Child, Launch, StartFailure
from hemostat.supervisor.role import Role
from hemostat.supervisor.sockets import Sockets

log = logging.getLogger("hemostat.serve")

MODULE = "hemostat.relay.main"
DRAIN = signal.SIGUSR1
"""The signal by which a relay learns that it was replaced: it lets its requests end, and leaves idle connections a
moment for one more. After SIGTERM this moment is shorter.
"""
MAX_REPLACED = 4
"""The largest number of times that relays may be replaced while earlier ones still drain; beyond it the oldest are
stopped."""
KILL_SECONDS = 5.0
"""The time in which a relay that is killed has to end."""


class SpareRelay:
    """Owns a relay process that has loaded its modules, until a relay takes it; then it loads the next one.

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


log = logging.getLogger("hemostat.serve")


class Relays:
    """Owns the relays that serve, one that waits to take the place of any of them, and the replaced ones until they
    end."""

    def __init__(self) -> None:
        self._serving: list[Child] = []
        self._spare = SpareRelay(MODULE)
        self._replaced: list[tuple[list[Child], asyncio.Task[None]]] = []

    async def start(self, launches: Sequence[Launch]) -> None:
        """Starts a relay for each; they are not kept running before `keep`. Raises StartFailure, with none left
        running."""
        relays = [
            Child(f"relay {n}", MODULE, launch, self._spare.take, RELAY_SILENT_SECONDS)
            for n, launch in enumerate(launches)
        ]
        try:
            for relay in relays:
                await relay.start()
        except BaseException:
            await asyncio.gather(*(relay.stop(signal.SIGKILL, KILL_SECONDS) for relay in relays))
            raise
        self._serving = relays

    async def keep(self) -> None:
        """Restarts relays that end, from now on."""
        for relay in self._serving:
            relay.keep()
        if self._serving:
            await self._spare.provide(sorted({fd for relay in self._serving for fd in relay.launch.fds}))

    async def replace(self, launches: Sequence[Launch], settings: Settings) -> None:
        """Starts a relay for each, on the same sockets; only then the former ones accept no more connections.

        settings: how long those may drain. Raises StartFailure; then the former ones go on as if nothing had been
        asked.
        """
        former = self._serving
        await self.start(launches)
        await self.keep()
        draining = asyncio.create_task(self._stop(former, DRAIN, settings.drain_seconds), name="drains replaced relays")
        self._replaced = [(relays, task) for relays, task in self._replaced if not task.done()]
        self._replaced.append((former, draining))
        while len(self._replaced) > MAX_REPLACED:
            oldest, task = self._replaced.pop(0)
            log.warning("more than %d sets of replaced relays: the oldest is stopped", MAX_REPLACED)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await self._stop(oldest, signal.SIGTERM, settings.shutdown_seconds)

    async def drain(self, within: float) -> None:
        """Lets the requests of all relays end, since a successor's relays have taken over."""
        await self._spare.stop()
        await asyncio.gather(self._stop(self._serving, DRAIN, within), *(task for _, task in self._replaced))

    async def stop(self, within: float) -> None:
        """Stops all relays, and those that were being drained, too."""
        await self._spare.stop()
        relays = list(self._serving)
        for former, task in self._replaced:
            task.cancel()
            relays += former
        await asyncio.gather(*(task for _, task in self._replaced), return_exceptions=True)
        await self._stop(relays, signal.SIGTERM, within)

    async def _stop(self, relays: Sequence[Child], sig: signal.Signals, within: float) -> None:
        await asyncio.gather(*(relay.stop(sig, within + KILL_AFTER_SECONDS) for relay in relays))


def relay_launches(
    settings: Settings, sockets: Sockets, control_socket: Path, access_log: int | None, role: Role = Role.SERVE
) -> list[Launch]:
    """Returns the arguments of each relay. access_log: the file descriptor that lines of the access log are written
    to."""
    if not role.relays:
        return []
    sockets.provide(settings.workers)
    launches = []
    for worker in range(settings.workers):
        fds = [sock.fileno() for sock in sockets.of_worker(worker, settings.workers)]
        config = relay_config(settings, worker, control_socket, role) | {"fds": fds, "access_log_fd": access_log}
        launches.append(Launch(config, tuple(fds) if access_log is None else (*fds, access_log)))
    return launches


def relay_config(settings: Settings, worker: int, control_socket: Path, role: Role = Role.SERVE) -> dict[str, Any]:
    """Returns what `hemostat.relay.main` reads on its standard input, without file descriptors.

    control_socket: of this machine's control process, or of the admin port's process if the relays have none here.
    """
    upstream, control = settings.upstream, settings.control
    far = None
    if role is Role.RELAY:
        far = {
            "hosts": [split_address(address) for address in control.addresses],
            "token": control.token.get_secret_value() if control.token else "",
            "ca": str(control.ca) if control.ca else None,
            "upstreams": list(upstream.addresses),
        }
    return {
        "worker": worker,
        "upstream": {
            "urls": list(upstream.addresses),
            "api_key": upstream.api_key.get_secret_value() if upstream.api_key else None,
            "ca": str(upstream.ca) if upstream.ca else None,
            "max_connections": upstream.max_connections,
            "affinity": upstream.affinity,
        },
        "allow_adapter_routes": upstream.allow_adapter_routes,
        "control": far or {"path": str(control_socket)},
        "figures": str(control_socket) if far else None,
        "shutdown_seconds": settings.shutdown_seconds,
        "drain_seconds": settings.drain_seconds,
        "limits": settings.limits.model_dump(),
        "client_limits": settings.client_limits.model_dump(exclude={"trusted_proxies"}),
        "trusted_proxies": settings.client_limits.trusted_proxies,
        "log_level": settings.log.level,
        "log_format": settings.log.format,
        "log_requests": settings.log.requests,
        "access_log_clients": settings.log.access_clients,
        "tracing": settings.tracing.model_dump() if settings.tracing.endpoint else None,
    }
