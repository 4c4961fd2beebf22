"""Batches of all replicas, taken by the one that leads and counted once each."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable

from hemostat.control.evidence.positions import Positions
from hemostat.ipc.backoff import Backoff
from hemostat.store.lease import Lease
from hemostat.store.protocol import StoreFailure, Stream, StreamEntry

log = logging.getLogger("hemostat.evidence")

TAKE_SECONDS = 0.25
"""Between two looks at an empty stream."""
TAKE_ENTRIES = 32
"""At a time."""
REMOVE_SECONDS = 2.0
"""Between two removals of what has been written with the states that it went into."""
RETRY_SECONDS = (0.5, 1.0, 2.0, 5.0, 10.0)
"""Longest pauses between attempts while the store does not answer."""


class Inbox:
    """Lives in the control process's event loop.

    use: called with each entry, in order; one that was used before may come again.
    prepare: awaited before the first entry that is taken, and again before the first one after another replica has led;
    StoreFailure. ready: nothing is taken before. persisted: the positions as the store has them, read in a thread;
    `on_persisted` is called with them now and then. on_failure: called with every failure of the store.
    clock: monotonic seconds. wall: Unix time.
    """

    def __init__(
        self,
        stream: Stream,
        lease: Lease,
        *,
        use: Callable[[StreamEntry], None],
        persisted: Callable[[], Positions],
        prepare: Callable[[], Awaitable[None]] | None = None,
        ready: Callable[[], bool] = lambda: True,
        on_failure: Callable[[StoreFailure], None],
        on_persisted: Callable[[Positions], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._stream = stream
        self._lease = lease
        self._use = use
        self._persisted = persisted
        self._on_failure = on_failure
        self._on_persisted = on_persisted
        self._clock = clock
        self._wall = wall
        self._prepare = prepare
        self._ready = ready
        self._prepared_in: int | None = None
        """The lease's term in which `prepare` was awaited."""
        self._begun_in: int | None = None
        """The lease's term in which everything that earlier leaders had taken was taken again; None: not yet."""
        self._counted: deque[StreamEntry] = deque()
        """Counted and not removed, without their data."""
        self._removed_at = clock()
        self.lag_seconds = 0.0
        """Age of the oldest entry at the last look, by the server's clock; 0 where there was none."""

    async def run(self) -> None:
        """Until cancelled."""
        backoff = Backoff(RETRY_SECONDS)
        while True:
            pause, found = TAKE_SECONDS, 0
            try:
                if self._lease.leads and self._ready():
                    found = await self.take()
                    await self._remove_if_due()
                else:
                    self.lag_seconds = 0.0
                backoff.reset()
            except StoreFailure as failure:
                self._on_failure(failure)
                pause = backoff.pause()
            await asyncio.sleep(0 if found >= TAKE_ENTRIES else pause)

    async def take(self) -> int:
        """As the leader: count what has come, and return how many entries that was. StoreFailure."""
        term = self._lease.term
        if self._prepare is not None and self._prepared_in != term:
            await self._prepare()
            self._prepared_in = term
            if not self._ready():
                return 0
        if self._begun_in != term:
            await self._take_again(term)
        self._begun_in = None  # an answer that is lost leaves entries that only `take_again` finds
        entries = await asyncio.to_thread(self._stream.take, TAKE_ENTRIES)
        if self._lease.term != term:
            return 0  # another replica has led since: they are the next leader's
        self._begun_in = term
        self.lag_seconds = self._age(entries[0]) if entries else 0.0
        for entry in entries:
            self._count(entry)
        return len(entries)

    async def _take_again(self, term: int) -> None:
        self._counted.clear()
        cursor = ""
        while True:
            entries, cursor = await asyncio.to_thread(self._stream.take_again, TAKE_ENTRIES, cursor)
            if self._lease.term != term:
                return
            for entry in entries:
                self._count(entry)
            if not cursor:
                return

    def _count(self, entry: StreamEntry) -> None:
        self._counted.append(StreamEntry(entry.sender, entry.first, entry.items, b"", entry.entry))
        if not entry.items:
            log.error("entry %s of the stream of evidence is not one of this version: it is left out", entry.entry)
        else:
            self._use(entry)

    async def _remove_if_due(self) -> None:
        """Remove from the stream what the store has also as part of the states."""
        if self._clock() - self._removed_at < REMOVE_SECONDS:
            return
        self._removed_at = self._clock()
        await self.remove()

    async def remove(self) -> None:
        persisted = await asyncio.to_thread(self._persisted)
        self._on_persisted(persisted)
        done = list(itertools.takewhile(persisted.covers, self._counted))
        await asyncio.to_thread(self._stream.remove, [entry.entry for entry in done])
        for _ in done:
            self._counted.popleft()

    def _age(self, entry: StreamEntry) -> float:
        milliseconds = entry.entry.partition("-")[0]
        return max(0.0, self._wall() - int(milliseconds) / 1000.0) if milliseconds.isdecimal() else 0.0
