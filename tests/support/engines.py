"""Several fake engines behind one relay."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from tests.support.relay import OK, Client, Request, Script, Upstream, UpstreamConnection

from hemostat.relay.upstreams.settings import UpstreamSettings
from hemostat.relay.worker import Relay

Connect = Callable[[], Awaitable[Client]]


class FakeEngine:
    """Answers GET /health by itself, everything else by `answer`; `stop` is its end, `start` its return at the same
    port. asked: the requests, without those for /health."""

    def __init__(self, answer: bytes | Callable[[Request], bytes] | Script = OK) -> None:
        self.asked: list[Request] = []
        self.healthy = True
        self.answer = answer
        self.server = Upstream(self._script)
        self.port = 0

    async def start(self) -> None:
        self.server = Upstream(self._script)
        await self.server.start(port=self.port)
        self.port = self.server.port

    async def stop(self) -> None:
        await self.server.stop()

    @property
    def name(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def _script(self, connection: UpstreamConnection) -> None:
        while (request := await connection.request()) is not None:
            if request.target == b"/health":
                status = b"200 OK" if self.healthy else b"503 Service Unavailable"
                await connection.send(b"HTTP/1.1 %b\r\nContent-Length: 0\r\n\r\n" % status)
                continue
            self.asked.append(request)
            answer = self.answer
            if isinstance(answer, bytes):
                await connection.send(answer)
                continue
            result = answer(request)  # type: ignore[arg-type]
            await connection.send(result if isinstance(result, bytes) else await result)


@contextlib.asynccontextmanager
async def balancing(
    engines: Sequence[FakeEngine], *, upstream: dict[str, Any] | None = None, **options: Any
) -> AsyncIterator[tuple[Relay, Connect]]:
    """A relay before started engines. upstream: of `UpstreamSettings`. options: of `Relay`."""
    for engine in engines:
        await engine.start()
    settings = UpstreamSettings(
        tuple(f"http://{engine.name}" for engine in engines), **{"health_seconds": 0.0, **(upstream or {})}
    )
    relay = Relay(settings, **options)
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    await relay.serve(sock)
    port = sock.getsockname()[1]
    clients: list[Client] = []

    async def connect() -> Client:
        client = Client(*await asyncio.open_connection("127.0.0.1", port))
        clients.append(client)
        return client

    try:
        yield relay, connect
    finally:
        for client in clients:
            await client.close()
        await relay.close()
        for engine in engines:
            await engine.stop()
        await asyncio.sleep(0.01)
