"""Several fake engines behind one relay."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from tests.support.relay import OK, Connect, Request, Script, Upstream, UpstreamConnection, listening

from hemostat.hooks import Hook
from hemostat.relay.relay import Relay
from hemostat.relay.upstreams.settings import UpstreamSettings


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
    engines: Sequence[FakeEngine], *, upstream: dict[str, Any] | None = None, hook: Hook | None = None, **options: Any
) -> AsyncIterator[tuple[Relay, Connect]]:
    """A relay before started engines. upstream: of `UpstreamSettings`. options: of `Relay`."""
    for engine in engines:
        await engine.start()
    settings = UpstreamSettings(
        tuple(f"http://{engine.name}" for engine in engines), **{"health_seconds": 0.0, **(upstream or {})}
    )
    relay = Relay(settings, **options)
    relay.hook = hook
    try:
        async with listening(relay) as connect:
            yield relay, connect
    finally:
        for engine in engines:
            await engine.stop()
        await asyncio.sleep(0.01)
