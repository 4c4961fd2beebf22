"""One relay: accepts clients on one socket, relays to the engines, and drains."""

from __future__ import annotations

import asyncio
import ctypes
import socket
import ssl
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, cast

from hemostat.hooks import Hook
from hemostat.ipc.messages import OutcomeReport, Stats
from hemostat.ipc.origin import DNS, parse_origin
from hemostat.relay.access_log import AccessLog
from hemostat.relay.client_connection import ClientConnection
from hemostat.relay.client_limits import ClientLimits
from hemostat.relay.clients import Clients
from hemostat.relay.context import RelayContext
from hemostat.relay.counters import Counters
from hemostat.relay.limits import Limits
from hemostat.relay.request_budget import RequestBudget
from hemostat.relay.turns import Turns
from hemostat.relay.upstreams.checker import HealthChecker
from hemostat.relay.upstreams.group import Upstreams
from hemostat.relay.upstreams.resolver import Resolver
from hemostat.relay.upstreams.settings import UpstreamSettings

_trim: Final = cast("Callable[[int], int] | None", getattr(ctypes.CDLL(None), "malloc_trim", None))
"""The function malloc_trim of glibc; other C libraries have none."""


def return_freed_memory() -> None:
    """Returns freed memory to the system. It takes about 0.25 ms per MiB that is returned. glibc by itself returns only
    what lies behind everything that is in use."""
    if _trim is not None:
        _trim(0)


if TYPE_CHECKING:
    from hemostat.tracing import Tracing  # an extra; imported only where it is used

BACKLOG = 2048
SWEEP_SECONDS = 1.0
STOP_IDLE_SECONDS = 1.0
"""A connection without a request stays open for so long once the relay stops, for a request that is on its way."""
REPLACED_IDLE_SECONDS = 5.0
"""The same once another relay has taken this one's place."""
QUIET_ROUNDS = 3
"""The number of rounds of the event loop without a new connection, after which none waits in the queues of the
listening sockets."""


class Relay:
    """Relays what clients send on a listening socket to the engines. Create it inside a running event loop.

    It begins without a hook. Assign `hook` at any time: a request keeps the one that it began with.

    upstream: where the engines are; a text is the address of one.
    tracing: creates a span for every generation. log_requests: write a log record for each. report_outcome: takes what
    the client of a treated or a control request got, see `RelayContext`.
    Raises ValueError if an address is not http(s)://host[:port], and OSError if `upstream.ca` cannot be read.
    """

    def __init__(
        self,
        upstream: UpstreamSettings | str,
        *,
        limits: Limits | None = None,
        counters: Counters | None = None,
        tracing: Tracing | None = None,
        log_requests: bool = False,
        report_outcome: Callable[[OutcomeReport], bool] | None = None,
        access_log: AccessLog | None = None,
        client_limits: ClientLimits | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        if isinstance(upstream, str):
            upstream = UpstreamSettings((upstream,))
        by_name = len(upstream.urls) == 1 and upstream.urls[0].startswith(DNS)
        origins = [parse_origin(url.removeprefix(DNS)) for url in upstream.urls]
        context = ssl.create_default_context(cafile=upstream.ca) if origins[0].tls else None
        authorization = f"Authorization: Bearer {upstream.api_key}".encode() if upstream.api_key else None
        checked = upstream.health_seconds > 0.0
        self.upstreams = Upstreams(
            self._loop,
            [] if by_name else origins,
            limit=upstream.max_connections,
            queue_seconds=upstream.queue_seconds,
            context=context,
            checked=checked,
            affinity=upstream.affinity,
        )
        self._resolver = Resolver(self.upstreams, upstream.urls[0], upstream.resolve_seconds) if by_name else None
        self._checker = None
        if checked:
            self._checker = HealthChecker(self.upstreams, upstream.health_seconds, authorization, context)
        self._watching: list[asyncio.Task[None]] = []
        self.counters = counters or Counters()
        limits = limits or Limits()
        self.tracing = tracing
        self.clients: Clients[ClientConnection] = Clients(limits, self.counters)
        self._context = RelayContext(
            loop=self._loop,
            upstreams=self.upstreams,
            limits=limits,
            budget=RequestBudget(limits.buffered_bytes, upstream.max_connections),
            turns=Turns(self._loop),
            counters=self.counters,
            authorization=authorization,
            tracing=tracing,
            log_requests=log_requests,
            report_outcome=report_outcome,
            access_log=access_log,
            client_limits=client_limits,
        )
        self._servers: list[asyncio.Server] = []
        self._accepted = 0
        self._sweeper: asyncio.TimerHandle | None = None

    @property
    def hook(self) -> Hook | None:
        return self._context.hook

    @hook.setter
    def hook(self, hook: Hook | None) -> None:
        self._context.hook = hook

    async def serve(self, *sockets: socket.socket) -> None:
        """Listens on bound sockets; returns at once, or after the first look-up of the engines' name."""
        if self._resolver is not None:
            await self._resolver.resolve()
        watchers = [watcher for watcher in (self._resolver, self._checker) if watcher is not None]
        self._watching = [self._loop.create_task(watcher.run()) for watcher in watchers]
        for sock in sockets:
            self._servers.append(await self._loop.create_server(self._new_client, sock=sock, backlog=BACKLOG))
        self._sweeper = self._loop.call_later(SWEEP_SECONDS, self._sweep)

    @property
    def ready(self) -> bool:
        """It is True while new connections are accepted."""
        return bool(self._servers) and not self._context.draining

    def stats(self) -> Stats:
        """Returns what is sent to the control process once a second."""
        return self.counters.stats(ready=self.ready, engines=self.upstreams.report())

    async def drain(
        self,
        timeout: float,  # noqa: ASYNC109  not a cancellation
        idle_seconds: float = STOP_IDLE_SECONDS,
    ) -> bool:
        """Accepts no more connections, and waits up to `timeout` seconds for the requests in progress to end.

        idle_seconds: connections without a request stay open for so long, as their clients may have sent one or be
        about to; its response closes the connection. Returns False if some requests have not ended.
        """
        self._context.draining = True
        self._context.draining_since = self._loop.time()
        self._context.idle_drain_seconds = idle_seconds
        await self._accept_waiting()
        for server in self._servers:
            server.close()
        try:
            async with asyncio.timeout(timeout):
                await self.clients.gone()
        except TimeoutError:
            return not self.busy
        return True

    @property
    def busy(self) -> int:
        """The number of requests in progress."""
        return sum(client.exchange is not None for client in self.clients)

    async def _accept_waiting(self) -> None:
        """Takes the connections that wait in the queues of the listening sockets: closing these would reset them.

        Their clients may have sent requests already, and cannot know that nobody has accepted them.
        """
        quiet = 0
        for _ in range(BACKLOG):
            accepted = self._accepted
            await asyncio.sleep(0)
            quiet = quiet + 1 if self._accepted == accepted else 0
            if quiet >= QUIET_ROUNDS:
                return

    async def close(self) -> None:
        """Aborts all connections."""
        self._context.draining = True
        for server in self._servers:
            server.close()
        if self._sweeper is not None:
            self._sweeper.cancel()
        for client in self.clients:
            client.transport.abort()
        for task in self._watching:
            task.cancel()
        self.upstreams.close()
        await asyncio.sleep(0)
        if self._context.access_log is not None:
            await self._context.access_log.close()

    def _new_client(self) -> ClientConnection:
        self._accepted += 1
        return ClientConnection(self._context, self.clients)

    def _sweep(self) -> None:
        now = self._loop.time()
        for client in self.clients:
            client.sweep(now)
        self.upstreams.sweep(now)
        if self._context.budget.take_freed():
            return_freed_memory()
        if self._context.access_log is not None:
            self._context.access_log.flush()
        self._sweeper = self._loop.call_later(SWEEP_SECONDS, self._sweep)
