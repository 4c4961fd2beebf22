"""A relay's end of the Unix socket to the control process. Whatever happens there, the relay goes on."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from typing import cast

import msgspec

from hemostat.ipc.messages import Capture, FrameReader, Hello, Policy, Stats, encode

log = logging.getLogger("hemostat.relay")

MAX_UNSENT = 16 * 1024 * 1024
"""Bytes that may wait for the control process to read them; beyond that captures are dropped."""
STATS_SECONDS = 1.0
RECONNECT = (0.1, 0.2, 0.5, 1.0, 2.0)


class ControlLink:
    """Keeps a connection to the control process, and connects again whenever it breaks.

    on_policy: called with each policy, and with None when there is no control process any more.
    stats: the figures to report, once a second.
    """

    def __init__(
        self, path: str, worker: int, on_policy: Callable[[Policy | None], None], stats: Callable[[], Stats]
    ) -> None:
        self._path = path
        self._worker = worker
        self._on_policy = on_policy
        self._stats = stats
        self._transport: asyncio.WriteTransport | None = None
        self._lost: asyncio.Future[None] | None = None

    def emit(self, capture: Capture) -> bool:
        """Hand a capture on; False, and it is dropped, when there is no control process or too much waits already."""
        transport = self._transport
        if transport is None or transport.get_write_buffer_size() > MAX_UNSENT:
            return False
        transport.write(encode(capture))
        return True

    def report(self) -> None:
        """Send the figures now."""
        transport = self._transport
        if transport is not None and transport.get_write_buffer_size() <= MAX_UNSENT:
            transport.write(encode(self._stats()))

    async def run(self) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        failures = 0
        while True:
            self._lost = lost = loop.create_future()
            try:
                await loop.create_unix_connection(lambda future=lost: _Protocol(self, future), self._path)  # type: ignore[misc]
            except OSError as error:
                if failures == 0:
                    log.warning("relay %d: no control process (%s)", self._worker, error.strerror or error)
            else:
                failures = 0
                while not lost.done():
                    self.report()
                    await asyncio.wait((lost,), timeout=STATS_SECONDS)
                log.warning("relay %d: the control process is gone; relaying plainly", self._worker)
            await asyncio.sleep(RECONNECT[min(failures, len(RECONNECT) - 1)])
            failures += 1

    async def close(self, timeout: float = 1.0) -> None:  # noqa: ASYNC109  a limit, not a cancellation
        """Report once more and wait a little for what was written to go out."""
        transport = self._transport
        if transport is None:
            return
        self.report()
        transport.close()
        if self._lost is not None:
            await asyncio.wait((self._lost,), timeout=timeout)

    def _connected(self, transport: asyncio.WriteTransport) -> None:
        self._transport = transport
        transport.write(encode(Hello(pid=os.getpid(), worker=self._worker)))

    def _disconnected(self) -> None:
        self._transport = None
        self._on_policy(None)


class _Protocol(asyncio.Protocol):
    def __init__(self, link: ControlLink, lost: asyncio.Future[None]) -> None:
        self._link = link
        self._lost = lost
        self._frames = FrameReader()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._link._connected(self._transport)

    def data_received(self, data: bytes) -> None:
        assert self._transport is not None
        try:
            messages = self._frames.feed(data)
        except (ValueError, msgspec.DecodeError) as error:
            log.error("the control process sent nonsense: %s", error)
            self._transport.abort()
            return
        for message in messages:
            if isinstance(message, Policy):
                self._link._on_policy(message)

    def connection_lost(self, exc: Exception | None) -> None:
        self._link._disconnected()
        if not self._lost.done():
            self._lost.set_result(None)
