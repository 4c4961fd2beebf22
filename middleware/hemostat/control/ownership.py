"""The ownership of the store: of several control processes with the same store, one owns it, and so decides.

    state       what happens                                             next
    STANDBY     `acquire` says that the store is this process's          READING
    READING     all was read, and handed to its users                    ACTIVE
    READING     the store may be another process's                       STANDBY
    ACTIVE      the store may be another process's, or was replaced      SUSPENDED
    SUSPENDED   it is this process's, and holds what it wrote last       ACTIVE
    SUSPENDED   another process has written                              ENDED

- STANDBY: it waits, and holds nothing of what is stored. It refuses relays, engines and what would change state, and
  loads no reference model: two of them at once would need twice the memory, and a reference is there a minute later.
- READING: a read that fails says nothing about what is stored. It is repeated; nothing is decided or written meanwhile.
- ACTIVE: it decides and writes. Where a write fails and the store is certainly its own, it goes on and repeats it.
  It stops by itself where it could not verify in time that the store is its own (`Store.owned_until`).
- SUSPENDED: nothing is decided; relays are dismissed and look for the active one, engines go on with what they have.
- ENDED: what is in memory may contradict what is stored. The process ends, and its supervisor starts it anew.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable
from dataclasses import replace
from enum import StrEnum

from hemostat.store import schema_1
from hemostat.store.errors import StoreErrorLog
from hemostat.store.protocol import (
    VERIFY_SECONDS,
    ExclusionLost,
    NotActiveError,
    Snapshot,
    Store,
    StoreAccessDenied,
    StoreConflict,
    StoreFailure,
    StoreIncompatible,
)
from hemostat.store.thread import StoreThread
from hemostat.store.writer import StoreWriter
from hemostat_calibration.backoff import Backoff
from hemostat_calibration.errors import HemostatError

log = logging.getLogger("hemostat.control")

RETRY_SECONDS = (0.5, 1.0)
"""The longest pauses between attempts at a store that fails, or that another process owns."""
CLOSE_SECONDS = 2.0


class Superseded(HemostatError):
    """Another process has written to the store: this one has to begin anew."""


class OwnershipState(StrEnum):
    STANDBY = "standby"
    READING = "reading"
    ACTIVE = "active"
    SUSPENDED = "suspended"
    ENDED = "ended"


class _Event(StrEnum):
    ACQUIRED = "this process owns the store now"
    USED = "all was read"
    LOST = "the store may be another process's"
    REGAINED = "the store is this process's again"
    OTHERS_WROTE = "another process has written"


_NEXT = {
    (OwnershipState.STANDBY, _Event.ACQUIRED): OwnershipState.READING,
    (OwnershipState.READING, _Event.USED): OwnershipState.ACTIVE,
    (OwnershipState.READING, _Event.LOST): OwnershipState.STANDBY,
    (OwnershipState.ACTIVE, _Event.LOST): OwnershipState.SUSPENDED,
    (OwnershipState.SUSPENDED, _Event.REGAINED): OwnershipState.ACTIVE,
    (OwnershipState.SUSPENDED, _Event.OTHERS_WROTE): OwnershipState.ENDED,
}
_TROUBLE = (_Event.LOST, _Event.OTHERS_WROTE)


class Ownership:
    """Owns the state, the writer of the store, and the thread that executes the store's calls. Lives in the event loop.

    clock: the clock that `Store.owned_until` uses.
    """

    def __init__(self, store: Store, errors: StoreErrorLog, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._thread = StoreThread()
        self._errors = errors
        self._clock = clock
        self._state = OwnershipState.STANDBY
        self.why = ""
        """The reason why it is not active, in one line."""
        self.on_move: Callable[[], None] = lambda: None
        """A function that is called after each change of the state."""
        self.settled = asyncio.Event()
        """It is active, or waits for what it needs."""
        self._active, self._lost = asyncio.Event(), asyncio.Event()
        self.writer = StoreWriter(store, self._thread, errors, self._active, self._lose)

    @property
    def state(self) -> OwnershipState:
        """The clock alone ends ACTIVE: no thread, and nothing that the server says, is waited for."""
        if self._state is OwnershipState.ACTIVE and self._clock() >= self._store.owned_until:
            failure = ExclusionLost("store: it could not be verified in time that this process still owns it")
            self._errors.record(failure)
            self._lose(failure)
        return self._state

    @property
    def active(self) -> bool:
        """It is True if this process decides, and answers relays and engines."""
        return self.state is OwnershipState.ACTIVE

    def require_active(self) -> None:
        """Raises NotActiveError if this process is not active."""
        if not self.active:
            raise NotActiveError(
                f"not active: {self.why or self.state}; ask the control process that is active, or this one again in a "
                "moment"
            )

    def require_known(self) -> None:
        """Raises NotActiveError if what is stored is not known to this process."""
        if not self.knows:
            self.require_active()

    @property
    def knows(self) -> bool:
        """It is True if this process has read what is stored. What ends something (mode `off`, a rollback) is carried
        out.
        """
        return self.state in (OwnershipState.ACTIVE, OwnershipState.SUSPENDED)

    def _move(self, event: _Event, why: str) -> None:
        state = _NEXT[self._state, event]
        log.log(logging.WARNING if event in _TROUBLE else logging.INFO, "%s: %s", state, why or event)
        active = state is OwnershipState.ACTIVE
        self._state, self.why = state, "" if active else why or event
        (self._active.set if active else self._active.clear)()
        self.on_move()

    async def begin(self) -> Snapshot:
        """Returns, in READING, what is stored; the first commit upgrades what an earlier version has written. Raises
        StoreIncompatible or StoreAccessDenied: an operator has to act."""
        backoff = Backoff(RETRY_SECONDS, random.random)
        while (snapshot := await self.try_to_begin()) is None:  # noqa: ASYNC110  another process decides
            await asyncio.sleep(backoff.pause())
        if snapshot.head.schema == schema_1.SCHEMA:
            changed = schema_1.upgraded(snapshot.states, snapshot.blobs)
            for key, value in changed.items():
                self.writer.set_state(key, value)
            snapshot = replace(snapshot, states={**snapshot.states, **changed})
        return snapshot

    async def try_to_begin(self) -> Snapshot | None:
        """Tries once to begin. Returns None if another process owns the store, or if it is not known what it holds."""
        try:
            if self.state is OwnershipState.STANDBY:
                if not await self._thread.call(self._store.acquire):
                    self._wait("another process owns the store")
                    return None
                self._move(_Event.ACQUIRED, "")
            snapshot = await self._thread.call(self._store.read)
        except (StoreIncompatible, StoreAccessDenied):
            raise
        except StoreFailure as failure:
            self._errors.record(failure)
            if self.state is OwnershipState.READING and isinstance(failure, ExclusionLost | StoreConflict):
                self._move(_Event.LOST, str(failure))
            self._wait(f"what is stored is not known: {failure}")
            return None
        self._errors.clear()
        self.writer.head = snapshot.head
        return snapshot

    def _wait(self, why: str) -> None:
        if why != self.why or not self.settled.is_set():
            log.info("%s: %s", self.state, why)
        self.why = why
        self.settled.set()

    def activate(self) -> None:
        """Makes this process active, once all that `begin` has returned is in use. It writes at once: a former owner
        that has lost its session ends where it finds another head, and relays leave it then."""
        self._move(_Event.USED, "")
        self.writer.claim()
        self.settled.set()

    def _lose(self, failure: StoreFailure) -> None:
        if self._state is OwnershipState.ACTIVE:
            self._move(_Event.LOST, str(failure))
            self._lost.set()

    async def watch(self) -> None:
        """Watches the ownership once this process is active, until it is cancelled. Raises Superseded."""
        looking = asyncio.create_task(self._look_at_the_time(), name="suspends in time")
        try:
            await self._verify_and_regain()
        finally:
            looking.cancel()

    async def _look_at_the_time(self) -> None:
        """Suspends in time, whatever the store's thread waits for."""
        while True:
            left = self._store.owned_until - self._clock() if self.active else VERIFY_SECONDS
            await asyncio.sleep(min(max(left, 0.0), VERIFY_SECONDS))

    async def _verify_and_regain(self) -> None:
        while True:
            try:
                async with asyncio.timeout(VERIFY_SECONDS):
                    await self._lost.wait()
            except TimeoutError:
                await self.verify()
            if not self.active:
                backoff = Backoff(RETRY_SECONDS, random.random)
                while not await self.try_to_regain():  # noqa: ASYNC110
                    await asyncio.sleep(backoff.pause())
                self._lost.clear()

    async def verify(self) -> None:
        """Verifies once if the store is still this process's."""
        try:
            await self._thread.call(self._store.verify)
        except (ExclusionLost, StoreConflict) as failure:
            self._errors.record(failure)
            self._lose(failure)
        except StoreFailure as failure:
            self._errors.record(failure)

    async def try_to_regain(self) -> bool:
        """Tries once to regain the ownership, and returns True if it did. Raises Superseded if the store holds anything
        but what this process wrote last.
        """
        try:
            await self._require_own_head()
            if await self._thread.call(self._store.acquire):
                await self._require_own_head()  # no other process can have written from now on
                self._move(_Event.REGAINED, "")
                return True
        except (StoreIncompatible, StoreConflict) as failure:
            self._end(str(failure))
        except StoreFailure as failure:
            self._errors.record(failure)
        return False

    async def _require_own_head(self) -> None:
        head = await self._thread.call(self._store.head)
        if not self.writer.is_own(head):
            self._end(f"the store is at revision {head.revision}, and this process wrote {self.writer.head.revision}")

    def _end(self, why: str) -> None:
        self._move(_Event.OTHERS_WROTE, why)
        raise Superseded(f"another process has written to the store: {why}")

    async def close(self) -> None:
        """Gives the store up: another process can own it now, or at the end of this one where the store does not answer
        in time."""
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._thread.call(self._store.close)
        except TimeoutError:
            log.warning("the store did not answer within %g s: it is left as it is", CLOSE_SECONDS)
        self._thread.close()
