"""The control process's end of its relays' connections."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing

import msgspec

from hemostat.ipc.framing import READ_SIZE
from hemostat.ipc.messages import (
    ALIVE_SECONDS,
    Alive,
    Capture,
    EngineHealth,
    Hello,
    Message,
    MessageReader,
    OutcomeReport,
    OutcomeReports,
    Policy,
    SampledCount,
    SampledCounts,
    Stats,
    encode,
)
from hemostat.metrics import names
from hemostat.metrics.samples import Sample

log = logging.getLogger("hemostat.control")

MAX_QUEUED_BYTES = 1024 * 1024
"""The largest number of bytes of policies that a relay may leave unread before its connection is closed (it
reconnects)."""
MAX_LARGE_MESSAGES = 4
"""The number of messages of more than READ_SIZE that are received at a time, whatever the number of relays. The others
wait, with at most three times READ_SIZE of each in memory; their relays drop captures when they have too many.
"""
MAX_FORMER_RELAYS = 64
"""The number of disconnected relays whose figures are kept apart, because the same process may reconnect; the figures
of older ones are summed.
"""
_HOW_TO_COMPILE = (
    "the relay is interpreted, which takes more than twice the processor time of the compiled one; with a C compiler "
    "and Python's headers, `HATCH_BUILD_HOOKS_ENABLE=1 pip install ./calibration .` in a clone compiles it"
)
SILENCE_SECONDS = 30.0
"""The time without a message after which a relay's connection is closed: its figures come once a second."""


class RelayLink:
    """Receives captures and figures from every relay and sends each the policy, now and whenever it changes.

    The sum over relays survives their restarts: the last figures of a disconnected relay are kept, and replaced when
    the same process reconnects. clock: monotonic seconds, by which captures are dated.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.on_capture: Callable[[Capture], None] = lambda capture: None
        """A function that is called with each capture; whoever uses captures sets it."""
        self.on_outcome: Callable[[OutcomeReport], None] = lambda report: None
        """A function that is called with each outcome, likewise."""
        self.on_sampled: Callable[[SampledCount], None] = lambda count: None
        """A function that is called with each count of sampled requests, likewise."""
        self._clock = clock
        self._policy: Policy | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._live: dict[asyncio.StreamWriter, Stats] = {}
        self._former: OrderedDict[str, Stats] = OrderedDict()
        self._retired: Stats | None = None
        self._unconnected: OrderedDict[str, tuple[Stats, float]] = OrderedDict()
        """The last figures, and when they came, of processes that report without a connection (`update`)."""
        self._said_how_to_compile = False
        self._large_messages = asyncio.Semaphore(MAX_LARGE_MESSAGES)
        self.requests = 0.0
        """The number of requests that relays have answered while they were connected, without what they had answered
        before.
        """

    @property
    def relays(self) -> int:
        """The number of relays that are connected now, and of other processes that report."""
        return len(self._writers) + len(self._unconnected)

    @property
    def reporting(self) -> int:
        """The number of connected relays that have reported their figures."""
        return len(self._live) + len(self._unconnected)

    def engines(self) -> Iterator[list[EngineHealth]]:
        """Yields what each connected relay knows of the engines."""
        return (stats.engines for stats in self._live.values())

    def samples(self) -> Iterator[Sample]:
        yield Sample(names.RELAYS, (), self.relays)

    @property
    def ready(self) -> bool:
        """True when at least one relay takes requests."""
        return bool(self._unconnected) or any(stats.ready for stats in self._live.values())

    def total(self) -> Stats:
        """Returns the figures summed over every relay since this process started."""
        total = Stats(counters={}, overhead_buckets=[], overhead_sum=0.0, ready=False)
        unconnected = (stats for stats, _ in self._unconnected.values())
        for stats in (self._retired, *self._former.values(), *self._live.values(), *unconnected):
            if stats is not None:
                total = add(total, stats)
        return msgspec.structs.replace(total, ready=self.ready)

    def update(self, process: str, stats: Stats) -> None:
        """Takes the figures of a process that stands in a relay's place and has no connection of its own."""
        if (last := self._unconnected.get(process)) is not None:
            self.requests += _answered(stats) - _answered(last[0])
        self._unconnected[process] = stats, self._clock()
        self._former.pop(process, None)

    def _forget_silent(self) -> None:
        now = self._clock()
        for process, (stats, at) in list(self._unconnected.items()):
            if now - at > SILENCE_SECONDS:
                del self._unconnected[process]
                self._keep_former(process, stats)

    def _keep_former(self, process: str, stats: Stats) -> None:
        self._former[process] = stats
        while len(self._former) > MAX_FORMER_RELAYS:
            oldest = self._former.popitem(last=False)[1]
            self._retired = oldest if self._retired is None else add(self._retired, oldest)

    def set_policy(self, policy: Policy) -> None:
        self._policy = policy
        frame = encode(policy)
        for writer in tuple(self._writers):
            if writer.transport.get_write_buffer_size() > MAX_QUEUED_BYTES:
                writer.transport.abort()
            else:
                writer.write(frame)

    async def run(self) -> None:
        """Tells relays that this process is there, until it is cancelled."""
        alive = encode(Alive())
        while True:
            await asyncio.sleep(ALIVE_SECONDS)
            self._forget_silent()
            for writer in tuple(self._writers):
                writer.write(alive)

    async def serve(self, hello: Hello, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serves one relay that was admitted, until its connection ends."""
        code = "compiled" if hello.compiled else "interpreted"
        peer = writer.get_extra_info("peername")
        machine = f" from {peer[0]}" if isinstance(peer, tuple) else ""
        log.info("relay %d connected%s (pid %d, %s)", hello.worker, machine, hello.pid, code)
        if not hello.compiled and not self._said_how_to_compile:
            self._said_how_to_compile = True
            log.info(_HOW_TO_COMPILE)
        self._writers.add(writer)
        try:
            writer.write(encode(self._policy or Alive()))
            async with aclosing(self._messages(reader)) as messages:
                async for message in messages:
                    self._receive(message, hello, writer)
        except TimeoutError:
            log.warning("relay link closed: nothing came within %g s", SILENCE_SECONDS)
            writer.transport.abort()
        except (OSError, ValueError) as error:
            log.warning("relay link closed: %s", error)
        finally:
            self._writers.discard(writer)
            last = self._live.pop(writer, None)
            if last is not None:
                self._keep_former(hello.process, last)

    async def _messages(self, reader: asyncio.StreamReader) -> AsyncGenerator[Message]:
        """Yields the messages of one connection. Raises TimeoutError, OSError or ValueError."""
        frames = MessageReader()
        while data := await self._read(reader):
            for message in frames.feed(data):
                yield message
            if frames.missing > READ_SIZE:
                async with self._large_messages:
                    while frames.missing and (data := await self._read(reader)):
                        for message in frames.feed(data):
                            yield message

    async def _read(self, reader: asyncio.StreamReader) -> bytes:
        """Returns the next bytes. Raises TimeoutError if the relay is silent for too long."""
        async with asyncio.timeout(SILENCE_SECONDS):
            return await reader.read(READ_SIZE)

    def _receive(self, message: Message, hello: Hello, writer: asyncio.StreamWriter) -> None:
        """Raises ValueError for a message that relays do not send."""
        match message:
            case Capture():
                self.on_capture(msgspec.structs.replace(message, captured_at=self._clock()))
            case OutcomeReports():
                for report in message.reports:
                    self.on_outcome(report)
            case SampledCounts():
                for count in message.counts:
                    self.on_sampled(count)
            case Stats():
                if (last := self._live.get(writer)) is not None:
                    self.requests += _answered(message) - _answered(last)
                self._live[writer] = message
                self._former.pop(hello.process, None)  # these include its former ones
            case _:
                raise ValueError(f"a relay sent {type(message).__name__}")


def _answered(stats: Stats) -> float:
    return sum(stats.counters.get(names.REQUESTS, {}).values())


def add(a: Stats, b: Stats) -> Stats:
    """Returns the sum of two relays' figures; either may lack what the other has."""
    counters = {name: dict(series) for name, series in a.counters.items()}
    for name, series in b.counters.items():
        into = counters.setdefault(name, {})
        for labels, value in series.items():
            into[labels] = into.get(labels, 0.0) + value
    longest = max(len(a.overhead_buckets), len(b.overhead_buckets))
    buckets = [
        (a.overhead_buckets[i] if i < len(a.overhead_buckets) else 0)
        + (b.overhead_buckets[i] if i < len(b.overhead_buckets) else 0)
        for i in range(longest)
    ]
    return Stats(
        counters=counters,
        overhead_buckets=buckets,
        overhead_sum=a.overhead_sum + b.overhead_sum,
        ready=a.ready or b.ready,
    )
