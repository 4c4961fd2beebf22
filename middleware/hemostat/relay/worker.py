"""One relay: listens, relays to one upstream, drains."""

from __future__ import annotations

import asyncio
import socket
import ssl
from pathlib import Path
from typing import TYPE_CHECKING

from hemostat.relay.counters import Counters
from hemostat.relay.hooks import Hook
from hemostat.relay.http import Limits, parse_origin
from hemostat.relay.server import ClientProtocol
from hemostat.relay.upstream import Pool

if TYPE_CHECKING:
    from hemostat.tracing import Tracing

BACKLOG = 2048
SWEEP_SECONDS = 1.0


class Relay:
    """Relays what clients send on a listening socket to `upstream_url`. To be made inside a running event loop.

    upstream_api_key: sent as a bearer token where the client sends no Authorization of its own.
    upstream_ca: PEM file of the authority that signed the upstream's certificate, for https.
    upstream_max_connections: clients beyond it wait in order of arrival.
    hook: may be assigned at any time; requests that have begun keep the one they began with.
    tracing: makes a span of every generation. log_requests: one line of log for each.
    Raises ValueError on an upstream_url that is not http(s)://host[:port], OSError on an unreadable upstream_ca.
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
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.origin = parse_origin(upstream_url)
        self.hook = hook
        self.limits = limits or Limits()
        self.counters = counters or Counters()
        self.authorization = f"Authorization: Bearer {upstream_api_key}".encode() if upstream_api_key else None
        context = ssl.create_default_context(cafile=upstream_ca) if self.origin.tls else None
        self.pool = Pool(self.loop, self.origin, upstream_max_connections, context)
        self.tracing = tracing
        self.log_requests = log_requests
        self.clients: set[ClientProtocol] = set()
        self.draining = False
        self._server: asyncio.Server | None = None
        self._nobody = asyncio.Event()
        self._sweeper: asyncio.TimerHandle | None = None

    async def serve(self, sock: socket.socket) -> None:
        """Listen on a bound socket; returns at once."""
        self._server = await self.loop.create_server(lambda: ClientProtocol(self), sock=sock, backlog=BACKLOG)
        self._sweeper = self.loop.call_later(SWEEP_SECONDS, self._sweep)

    @property
    def ready(self) -> bool:
        """True while new connections are accepted."""
        return self._server is not None and not self.draining

    async def drain(self, timeout: float) -> bool:  # noqa: ASYNC109  the caller's limit, not a cancellation
        """Accept nothing more, let exchanges in flight end for up to `timeout` seconds; False if some did not."""
        self.draining = True
        if self._server is not None:
            self._server.close()
        for client in tuple(self.clients):
            client.drain()
        self._nobody.clear()
        if self.clients:
            try:
                await asyncio.wait_for(self._nobody.wait(), timeout)
            except TimeoutError:
                return False
        return True

    async def close(self) -> None:
        """Break off whatever is left."""
        self.draining = True
        if self._server is not None:
            self._server.close()
        if self._sweeper is not None:
            self._sweeper.cancel()
        for client in tuple(self.clients):
            client.transport.abort()
        self.pool.close()
        await asyncio.sleep(0)

    def gone(self, client: ClientProtocol) -> None:
        """A client's connection is closed."""
        self.clients.discard(client)
        if not self.clients:
            self._nobody.set()

    def _sweep(self) -> None:
        now = self.loop.time()
        for client in tuple(self.clients):
            client.sweep(now)
        self.pool.sweep(now)
        self._sweeper = self.loop.call_later(SWEEP_SECONDS, self._sweep)
