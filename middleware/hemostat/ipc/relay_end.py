"""A relay's end of the Unix socket to the control process. The relay goes on serving whatever happens to it."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from typing import cast

import msgspec

from hemostat.ipc.backoff import Backoff
from hemostat.ipc.messages import Capture, Hello, MessageReader, OutcomeReport, OutcomeReports, Policy, Stats, encode
from hemostat.ipc.process import is_compiled
from hemostat.ipc.sampled import SampledTally

log = logging.getLogger("hemostat.relay")

MAX_QUEUED_BYTES = 16 * 1024 * 1024
"""Bytes that may be queued for the control process; beyond that captures are dropped."""
MAX_QUEUED_REPORTS = 1024
"""Reports of outcomes that wait for the next message."""
REPORTS_PER_MESSAGE = 64
"""So many are sent at once; fewer with the next figures."""
STATS_SECONDS = 1.0
HOT_MODULE = "hemostat.relay.exchange"
"""A name only, for this layer cannot import it: all modules of the hot path are compiled, or none."""
RECONNECT_SECONDS = (0.1, 0.2, 0.5, 1.0, 2.0)
"""Longest pauses between attempts to connect."""


class ControlLink:
    """Keeps a connection to the control process, and reconnects when it breaks.

    on_policy: called with each policy, and with None when the connection is lost.
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
        self._reports: list[OutcomeReport] = []
        self.sampled = SampledTally()
        """Of this relay's sampled requests; sent with the figures."""
        self._lost: asyncio.Future[None] | None = None

    def emit(self, capture: Capture) -> bool:
        """Queue a capture; False when it is dropped, because there is no control process or too much is queued."""
        transport = self._transport
        if transport is None or transport.get_write_buffer_size() > MAX_QUEUED_BYTES:
            return False
        transport.write(encode(capture))
        return True

    def report_outcome(self, report: OutcomeReport) -> bool:
        """Queue a report; False when it is dropped, which does not depend on what it says."""
        if self._transport is None or len(self._reports) >= MAX_QUEUED_REPORTS:
            return False
        self._reports.append(report)
        if len(self._reports) >= REPORTS_PER_MESSAGE:
            self._send_reports()
        return True

    def _send_reports(self) -> None:
        transport = self._transport
        if self._reports and transport is not None and transport.get_write_buffer_size() <= MAX_QUEUED_BYTES:
            transport.write(encode(OutcomeReports(self._reports)))
            self._reports = []

    def report(self) -> None:
        """Send the figures now, and the reports of outcomes that wait."""
        transport = self._transport
        if transport is not None and transport.get_write_buffer_size() <= MAX_QUEUED_BYTES:
            transport.write(encode(self._stats()))
            if (sampled := self.sampled.take()) is not None:
                transport.write(encode(sampled))
        self._send_reports()

    async def run(self) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        backoff = Backoff(RECONNECT_SECONDS)
        while True:
            self._lost = lost = loop.create_future()
            try:
                await loop.create_unix_connection(lambda future=lost: _Protocol(self, future), self._path)  # type: ignore[misc]
            except OSError as error:
                if backoff.failures == 0:
                    log.warning("relay %d: no control process (%s)", self._worker, error.strerror or error)
            else:
                backoff.reset()
                while not lost.done():
                    self.report()
                    await asyncio.wait((lost,), timeout=STATS_SECONDS)
                log.warning("relay %d: lost the control process; relaying without it", self._worker)
            await asyncio.sleep(backoff.pause())

    async def close(self, timeout: float = 1.0) -> None:  # noqa: ASYNC109  a limit, not a cancellation
        """Send the figures once more, and wait until what is queued has been sent."""
        transport = self._transport
        if transport is None:
            return
        self.report()
        transport.close()
        if self._lost is not None:
            await asyncio.wait((self._lost,), timeout=timeout)

    def _connected(self, transport: asyncio.WriteTransport) -> None:
        self._transport = transport
        hello = Hello(pid=os.getpid(), worker=self._worker, compiled=is_compiled(HOT_MODULE))
        transport.write(encode(hello))

    def _disconnected(self) -> None:
        self._transport = None
        self._on_policy(None)


class _Protocol(asyncio.Protocol):
    def __init__(self, link: ControlLink, lost: asyncio.Future[None]) -> None:
        self._link = link
        self._lost = lost
        self._frames = MessageReader()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._link._connected(self._transport)

    def data_received(self, data: bytes) -> None:
        assert self._transport is not None
        try:
            messages = self._frames.feed(data)
        except (ValueError, msgspec.DecodeError) as error:
            log.error("the control process sent an invalid message: %s", error)
            self._transport.abort()
            return
        for message in messages:
            if isinstance(message, Policy):
                self._link._on_policy(message)

    def connection_lost(self, exc: Exception | None) -> None:
        self._link._disconnected()
        if not self._lost.done():
            self._lost.set_result(None)
