"""Relays as the control process sees them: connections that send captures, reports of outcomes and figures."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import msgspec
import numpy as np
from tests.bench.load import KIND, PROMPT, VOCABULARY, answers

from hemostat.ipc.messages import (
    OVERHEAD_BUCKETS,
    PROTOCOL,
    Hello,
    MessageReader,
    OutcomeReport,
    OutcomeReports,
    Policy,
    Stats,
    encode,
)
from hemostat.ipc.relay_end import MAX_QUEUED_BYTES, MAX_QUEUED_REPORTS, REPORTS_PER_MESSAGE, STATS_SECONDS
from hemostat.ipc.relay_samples import INITIAL_SERIES
from hemostat.metrics import names
from hemostat.openai.routes import CHAT

TICK = 0.05
"""Seconds between two looks of a relay at what its clients have sent."""
MAX_AT_ONCE = 64
"""Captures, and reports, of a relay at one look: all relays share a process here, which could not make more."""


class Relay:
    """One connection. requests: it has answered, as its figures say."""

    def __init__(self, number: int, version: str, rng: np.random.Generator) -> None:
        self._number = number
        self._version = version
        self._rng = rng
        self._capture = answers().capture
        self._numbers = itertools.count(number << 32)
        self._tasks: list[asyncio.Task[None]] = []
        self.policy: Policy | None = None
        self.requests = 0
        self.captures = self.reports = self.dropped = 0
        """Sent; dropped: captures and reports for which there was no room."""
        self._waiting: list[OutcomeReport] = []

    async def connect(self, path: Path) -> None:
        self._reader, self._writer = await asyncio.open_unix_connection(str(path))
        hello = Hello(protocol=PROTOCOL, process=f"relay {self._number}", pid=self._number, worker=self._number)
        self._writer.write(encode(hello))
        self._tasks = [asyncio.create_task(loop) for loop in (self._listen(), self._report())]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._writer.close()

    async def _listen(self) -> None:
        frames = MessageReader()
        while data := await self._reader.read(1 << 16):
            for message in frames.feed(data):
                if isinstance(message, Policy):
                    self.policy = message

    async def _report(self) -> None:
        while True:
            if self._has_room():
                self._writer.write(encode(self._stats()))
                self._send_reports()
            await asyncio.sleep(STATS_SECONDS)

    def _stats(self) -> Stats:
        counters = {name: dict.fromkeys(series, 1.0) for name, series in INITIAL_SERIES.items()}
        counters[names.REQUESTS] = {(CHAT, "ok"): float(self.requests)}
        buckets = [1] * (len(OVERHEAD_BUCKETS) + 1)
        return Stats(counters=counters, overhead_buckets=buckets, overhead_sum=1.0, ready=True)

    def _has_room(self) -> bool:
        return self._writer.transport.get_write_buffer_size() <= MAX_QUEUED_BYTES

    def capture(self) -> bool:
        """Send a capture; False, and it is dropped, where the connection is full."""
        if not self._has_room():
            self.dropped += 1
            return False
        number = next(self._numbers)
        prompt = self._rng.integers(0, VOCABULARY, PROMPT).astype("<i4").tobytes()
        name = number.to_bytes(16, "little")
        made = msgspec.structs.replace(
            self._capture, request_id=f"r{number}", prompt_token_ids=prompt, conversation=name, client=name[:1]
        )
        self._writer.write(encode(made))
        self.captures += 1
        return True

    def report(self, drawn: float = 0.0) -> None:
        """Queue the outcome of an answer of a new conversation, in one of the two arms."""
        if len(self._waiting) >= MAX_QUEUED_REPORTS:
            self.dropped += 1
            return
        number = next(self._numbers)
        name = number.to_bytes(16, "little")
        bad = {"loop": False, "cut": number % 7 == 0, "empty": False, "json": number % 5 == 0}
        treated = bool(self._rng.random() < 0.9)
        self._waiting.append(OutcomeReport(KIND, self._version, treated, name, name[:1], bad, 100, drawn))
        if len(self._waiting) >= REPORTS_PER_MESSAGE and self._has_room():
            self._send_reports()

    def _send_reports(self) -> None:
        if self._waiting:
            self._writer.write(encode(OutcomeReports(self._waiting)))
            self.reports += len(self._waiting)
            self._waiting = []

    async def drain(self) -> None:
        """Until the control process has taken most of what was sent."""
        await self._writer.drain()

    async def serve(self, requests_per_second: float) -> None:
        """Answer so many requests, all of them in an arm, and sample them as the policy says; until cancelled."""
        loop = asyncio.get_running_loop()
        last = loop.time()
        while True:
            await asyncio.sleep(TICK)
            now = loop.time()
            answered = int(self._rng.poisson(requests_per_second * (now - last)))
            last = now
            self.requests += answered
            policy = self.policy
            if policy is None:
                continue
            wanted = int(self._rng.binomial(answered, policy.outcome_fraction))
            for _ in range(min(wanted, MAX_AT_ONCE)):
                self.report(float(self._rng.random()) * policy.outcome_fraction)
            captures = int(self._rng.binomial(answered, policy.shadow_rate)) if policy.scoring else 0
            for _ in range(min(captures, MAX_AT_ONCE)):
                self.capture()
            self.dropped += max(wanted - MAX_AT_ONCE, 0) + max(captures - MAX_AT_ONCE, 0)


@asynccontextmanager
async def connected(path: Path, number: int, version: str, first: int = 0) -> AsyncIterator[list[Relay]]:
    """So many relays."""
    relays = [Relay(first + n, version, np.random.default_rng([first, n])) for n in range(number)]
    for relay in relays:
        await relay.connect(path)
    try:
        yield relays
    finally:
        with suppress(ConnectionError):
            await asyncio.gather(*(relay.close() for relay in relays))
