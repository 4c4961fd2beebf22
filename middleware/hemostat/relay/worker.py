"""One relay: accepts clients on one socket, relays to one upstream, and drains."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from hemostat.hooks import Hook
from hemostat.ipc.messages import OutcomeReport
from hemostat.relay.client_connection import ClientConnection
from hemostat.relay.clients import Clients
from hemostat.relay.context import RelayContext
from hemostat.relay.counters import Counters
from hemostat.relay.http.origin import parse_origin
from hemostat.relay.limits import Limits
from hemostat.relay.pool import Pool
from hemostat.relay.request_budget import RequestBudget

if TYPE_CHECKING:
    from hemostat.tracing import Tracing  # an extra; imported only where it is used

BACKLOG = 2048
SWEEP_SECONDS = 1.0


class Relay:
    """Relays what clients send on a listening socket to `upstream_url`. Create it inside a running event loop.

    hook: may be replaced at any time; a request keeps the one that it began with.
    upstream_api_key: sent as a bearer token where the client sends no Authorization of its own.
    upstream_ca: PEM file of the authority that signed the upstream's certificate, for https.
    upstream_max_connections: requests beyond it wait in order of arrival.
    tracing: creates a span for every generation. log_requests: write a log record for each. report_outcome: takes what
    the client of a treated or a control request got, see `RelayContext`.
    allow_adapter_routes: clients may load and unload adapters at the upstream.
    Raises ValueError if upstream_url is not http(s)://host[:port], OSError if upstream_ca cannot be read.
    """

    def __init__(
        self,
        upstream_url: str,
        *,
        hook: Hook | None = None,
        limits: Limits | None = None,
        counters: Counters | None = None,
        upstream_api_key: str | None = None,
        upstream_ca: Path | None = None,
        upstream_max_connections: int = 512,
        tracing: Tracing | None = None,
        log_requests: bool = False,
        report_outcome: Callable[[OutcomeReport], bool] | None = None,
        allow_adapter_routes: bool = False,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        origin = parse_origin(upstream_url)
        context = ssl.create_default_context(cafile=upstream_ca) if origin.tls else None
        self.pool = Pool(self._loop, origin, upstream_max_connections, context)
        self.counters = counters or Counters()
        limits = limits or Limits()
        self.tracing = tracing
        self.clients = Clients(limits, self.counters)
        self._context = RelayContext(
            loop=self._loop,
            origin=origin,
            pool=self.pool,
            limits=limits,
            budget=RequestBudget(limits.buffered_bytes, upstream_max_connections),
            counters=self.counters,
            authorization=f"Authorization: Bearer {upstream_api_key}".encode() if upstream_api_key else None,
            tracing=tracing,
            log_requests=log_requests,
            hook=hook,
            report_outcome=report_outcome,
            allow_adapter_routes=allow_adapter_routes,
        )
        self._server: asyncio.Server | None = None
        self._sweeper: asyncio.TimerHandle | None = None

    @property
    def hook(self) -> Hook | None:
        return self._context.hook

    @hook.setter
    def hook(self, hook: Hook | None) -> None:
        self._context.hook = hook

    async def serve(self, sock: socket.socket) -> None:
        """Listen on a bound socket; returns at once."""
        self._server = await self._loop.create_server(self._new_client, sock=sock, backlog=BACKLOG)
        self._sweeper = self._loop.call_later(SWEEP_SECONDS, self._sweep)

    @property
    def ready(self) -> bool:
        """New connections are accepted."""
        return self._server is not None and not self._context.draining

    async def drain(self, timeout: float) -> bool:  # noqa: ASYNC109  the caller's limit, not a cancellation
        """Accept no more connections, and wait up to `timeout` seconds for the requests in progress to end.

        False if some have not ended.
        """
        self._context.draining = True
        if self._server is not None:
            self._server.close()
        for client in self.clients:
            client.drain()
        try:
            async with asyncio.timeout(timeout):
                await self.clients.gone()
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """Abort all connections."""
        self._context.draining = True
        if self._server is not None:
            self._server.close()
        if self._sweeper is not None:
            self._sweeper.cancel()
        for client in self.clients:
            client.transport.abort()
        self.pool.close()
        await asyncio.sleep(0)

    def _new_client(self) -> ClientConnection:
        return ClientConnection(self._context, self.clients)

    def _sweep(self) -> None:
        now = self._loop.time()
        for client in self.clients:
            client.sweep(now)
        self.pool.sweep(now)
        self._sweeper = self._loop.call_later(SWEEP_SECONDS, self._sweep)
