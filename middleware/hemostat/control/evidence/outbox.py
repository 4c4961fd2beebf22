"""Units on their way to the leader: numbered, sent in batches, each batch again until the store has it."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Iterable

import msgspec

from hemostat.ipc.backoff import Backoff
from hemostat.store.protocol import StoreFailure, Stream, StreamEntry

MAX_UNITS = 4096
"""That wait; beyond it the oldest are dropped."""
MAX_BYTES = 32 * 1024 * 1024
"""The same."""
MAX_BATCH_UNITS = 256
MAX_BATCH_BYTES = 256 * 1024
"""Of one entry of the stream, unless a single unit is larger."""
SEND_SECONDS = 0.25
"""A unit waits so long for others to be sent with it."""
RETRY_SECONDS = (0.5, 1.0, 2.0, 5.0, 10.0)
"""Longest pauses between attempts while the store does not answer."""


class Outbox:
    """Lives in the control process's event loop. sender: this process, random: numbers begin at 1 with it.

    on_failure: called with every failure of the store.
    """

    def __init__(self, stream: Stream, sender: str, on_failure: Callable[[StoreFailure], None]) -> None:
        self._stream = stream
        self._sender = sender
        self._on_failure = on_failure
        self._units: deque[bytes] = deque()
        self._bytes = 0
        self._next = 1
        self._entries: deque[StreamEntry] = deque()
        """That are sent first."""
        self._batch: StreamEntry | None = None
        """That is being sent, until the store has it."""
        self._wake = asyncio.Event()
        self.sent = 0
        """Units that the store has."""
        self.sent_bytes = 0
        self.dropped = 0
        """Units that no longer fitted."""

    @property
    def waiting(self) -> int:
        """Units that the store does not have yet: what is lost if this process dies now."""
        batch = self._batch.items if self._batch is not None else 0
        return len(self._units) + batch + sum(entry.items for entry in self._entries)

    def add_again(self, entries: Iterable[StreamEntry]) -> None:
        """Batches that were numbered before."""
        self._entries.extend(entries)
        self._wake.set()

    def add(self, unit: bytes) -> None:
        """unit: encoded."""
        self._units.append(unit)
        self._bytes += len(unit)
        while len(self._units) > MAX_UNITS or self._bytes > MAX_BYTES:
            self._bytes -= len(self._units.popleft())
            self.dropped += 1
        if len(self._units) >= MAX_BATCH_UNITS:
            self._wake.set()

    async def run(self) -> None:
        """Until cancelled."""
        backoff = Backoff(RETRY_SECONDS)
        while True:
            try:
                await self.send()
            except StoreFailure as failure:
                self._on_failure(failure)
                await asyncio.sleep(backoff.pause())
                continue
            backoff.reset()
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), SEND_SECONDS)

    async def send(self) -> None:
        """Send all that waits. StoreFailure: the rest still waits."""
        while self._batch is not None or self._entries or self._units:
            if self._batch is None:
                self._batch = self._entries.popleft() if self._entries else self._take_batch()
            await asyncio.to_thread(self._stream.append, self._batch)
            self.sent += self._batch.items
            self.sent_bytes += len(self._batch.data)
            self._batch = None

    def _take_batch(self) -> StreamEntry:
        batch = next_batch(self._sender, self._next, self._units)
        self._next += batch.items
        self._bytes = sum(map(len, self._units))
        return batch


def next_batch(sender: str, first: int, units: deque[bytes]) -> StreamEntry:
    """Remove the oldest units from `units`, as many as one entry may hold; `first` is the number of the oldest."""
    taken = [units.popleft()]
    size = len(taken[0])
    while units and len(taken) < MAX_BATCH_UNITS and size + len(units[0]) <= MAX_BATCH_BYTES:
        taken.append(units.popleft())
        size += len(taken[-1])
    return StreamEntry(sender, first, len(taken), msgspec.msgpack.encode([msgspec.Raw(unit) for unit in taken]))
