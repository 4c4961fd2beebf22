"""Asks every engine for GET /health."""

from __future__ import annotations

import asyncio
import ssl

from hemostat.relay.upstreams.group import Engine, Upstreams

CHECK_SECONDS = 5.0
"""The longest time for one answer; shorter where checks are more frequent."""
_MAX_LINE = 1024


class HealthChecker:
    """Reports to each engine's `Health`. seconds: pause between two checks. authorization: a field line. context: for
    TLS.

    Whatever answers with a status below 500 is alive: a router may not have the route. vLLM answers 503 when its engine
    process has ended.
    """

    def __init__(
        self, upstreams: Upstreams, seconds: float, authorization: bytes | None, context: ssl.SSLContext | None
    ) -> None:
        self._upstreams = upstreams
        self._seconds = seconds
        self._fields = b"" if authorization is None else authorization + b"\r\n"
        self._context = context

    async def run(self) -> None:
        """Checks the engines until it is cancelled."""
        while True:
            await asyncio.gather(*map(self.check, self._upstreams.engines))
            await asyncio.sleep(self._seconds)

    async def check(self, engine: Engine) -> None:
        """Checks one engine once."""
        try:
            async with asyncio.timeout(min(self._seconds, CHECK_SECONDS)):
                passed = await self._status(engine) < 500
        except (OSError, ValueError):  # TimeoutError and ssl.SSLError are OSErrors
            passed = False
        now = asyncio.get_running_loop().time()
        if passed:
            engine.health.check_passed(now)
        else:
            engine.health.check_failed(now)

    async def _status(self, engine: Engine) -> int:
        """Returns the status of the engine's /health. Raises ValueError if the answer is not HTTP."""
        origin = engine.origin
        reader, writer = await asyncio.open_connection(
            origin.address,
            origin.port,
            ssl=self._context,
            server_hostname=origin.host if self._context else None,
            limit=_MAX_LINE,
        )
        try:
            writer.write(
                b"GET /health HTTP/1.1\r\nHost: %b\r\n%bConnection: close\r\n\r\n" % (origin.authority, self._fields)
            )
            version, status, *_ = (await reader.readline()).split(b" ", 2)
            if not version.startswith(b"HTTP/1."):
                raise ValueError("not HTTP")
            return int(status)
        finally:
            writer.transport.abort()
