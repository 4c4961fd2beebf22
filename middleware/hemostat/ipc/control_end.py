"""The control process's end of the Unix socket that relays connect to."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from hemostat.ipc.messages import (
    Capture,
    EngineHealth,
    Hello,
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

READ_SIZE = 256 * 1024
MAX_QUEUED_BYTES = 1024 * 1024
"""Bytes of policies that a relay may leave unread before its connection is closed (it reconnects)."""
MAX_FORMER_RELAYS = 64
"""Disconnected relays whose figures are kept apart, because the same process may reconnect; those of older ones are
summed."""


class RelayLink:
    """Receives captures and figures from every relay and sends each the policy, now and whenever it changes.

    The sum over relays survives their restarts: the last figures of a disconnected relay are kept, and replaced when
    the same process reconnects.
    """

    def __init__(
        self,
        path: Path,
        on_capture: Callable[[Capture], None],
        on_outcome: Callable[[OutcomeReport], None] = lambda report: None,
        on_sampled: Callable[[SampledCount], None] = lambda count: None,
    ) -> None:
        self._path = path
        self._on_capture = on_capture
        self._on_outcome = on_outcome
        self._on_sampled = on_sampled
        self._policy: Policy | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._live: dict[asyncio.StreamWriter, Stats] = {}
        self._former: OrderedDict[tuple[int, int], Stats] = OrderedDict()
        self._retired: Stats | None = None
        self._serving: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, str(self._path), limit=READ_SIZE)
        self._path.chmod(0o600)

    @property
    def relays(self) -> int:
        """Relays connected now."""
        return len(self._writers)

    @property
    def reporting(self) -> int:
        """Of them, those that have reported their figures."""
        return len(self._live)

    def engines(self) -> Iterator[list[EngineHealth]]:
        """What each connected relay knows of the engines."""
        return (stats.engines for stats in self._live.values())

    def samples(self) -> Iterator[Sample]:
        yield Sample(names.RELAYS, (), self.relays)

    @property
    def ready(self) -> bool:
        """True when at least one relay takes requests."""
        return any(stats.ready for stats in self._live.values())

    def total(self) -> Stats:
        """Figures summed over every relay since this process started."""
        total = Stats(counters={}, overhead_buckets=[], overhead_sum=0.0, ready=False)
        for stats in (self._retired, *self._former.values(), *self._live.values()):
            if stats is not None:
                total = add(total, stats)
        return msgspec.structs.replace(total, ready=self.ready)

    def set_policy(self, policy: Policy) -> None:
        self._policy = policy
        frame = encode(policy)
        for writer in tuple(self._writers):
            if writer.transport.get_write_buffer_size() > MAX_QUEUED_BYTES:
                writer.transport.abort()
            else:
                writer.write(frame)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        frames = MessageReader()
        identity: tuple[int, int] | None = None
        self._writers.add(writer)
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)
        try:
            if self._policy is not None:
                writer.write(encode(self._policy))
            while data := await reader.read(READ_SIZE):
                for message in frames.feed(data):
                    match message:
                        case Capture():
                            self._on_capture(message)
                        case OutcomeReports():
                            for report in message.reports:
                                self._on_outcome(report)
                        case SampledCounts():
                            for count in message.counts:
                                self._on_sampled(count)
                        case Stats():
                            self._live[writer] = message
                            if identity is not None:
                                self._former.pop(identity, None)  # these include its former ones
                        case Hello():
                            identity = (message.worker, message.pid)
                            code = "compiled" if message.compiled else "interpreted"
                            log.info("relay %d connected (pid %d, %s)", message.worker, message.pid, code)
                        case _:
                            raise ValueError(f"a relay sent {type(message).__name__}")
        except (ConnectionError, ValueError, msgspec.DecodeError) as error:
            log.warning("relay link closed: %s", error)
        finally:
            self._writers.discard(writer)
            last = self._live.pop(writer, None)
            if last is not None:
                self._former[identity or (-1, -1)] = last
                while len(self._former) > MAX_FORMER_RELAYS:
                    oldest = self._former.popitem(last=False)[1]
                    self._retired = oldest if self._retired is None else add(self._retired, oldest)
            writer.close()

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for writer in tuple(self._writers):
            writer.transport.abort()
        if self._serving:
            await asyncio.wait(tuple(self._serving), timeout=1.0)


def add(a: Stats, b: Stats) -> Stats:
    """Sum of two relays' figures; either may lack what the other has."""
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
