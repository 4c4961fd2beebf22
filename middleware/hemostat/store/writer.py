"""The one place from which the control process writes to the store: a bounded queue of typed writes, in order.

Writes are queued on the event loop and happen in a thread. A failed write is counted and dropped, unless the server
cannot be reached: then the write is repeated until it answers.

Replicas that share a store: a write `as_leader` is queued only while this replica is the last known leader. Once
another replica has led since, the server refuses it (`LeaseLost`), and it is not tried again, not even where this
replica leads again: it is of before what the other one has decided. Other writes are made by every replica.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from hemostat.ipc.backoff import Backoff
from hemostat.store.errors import StoreErrorLog
from hemostat.store.lease import Lease
from hemostat.store.protocol import Store, StoredProfile, StoreFailure, StoreUnreachable, StoreWrites

MAX_QUEUED_WRITES = 1000
RETRY_SECONDS = (0.5, 1.0, 2.0, 5.0, 10.0)
"""Longest pauses between attempts to reach the server; the last one repeats."""


@dataclass(frozen=True, slots=True)
class PutProfile:
    profile: StoredProfile
    as_leader: bool


@dataclass(frozen=True, slots=True)
class DeleteProfile:
    version: str
    as_leader: bool


@dataclass(frozen=True, slots=True)
class AppendEvent:
    event: dict[str, Any]
    as_leader: bool


@dataclass(frozen=True, slots=True)
class SetState:
    key: str
    value: str | None
    as_leader: bool


@dataclass(frozen=True, slots=True)
class SetStates:
    """The newest values of the states that wait to be written together: such writes that wait one after the other
    become one. With another write between them they stay two: that one may be of what the later states name."""

    as_leader: bool
    term: int = 0
    number: int = 0


@dataclass(frozen=True, slots=True)
class RaiseState:
    key: str
    value: int
    as_leader: bool


@dataclass(frozen=True, slots=True)
class PutBlob:
    """The newest bytes under this key that wait to be written: several writes that wait become one."""

    key: str
    as_leader: bool
    term: int = 0
    """Of the lease, when it was queued; so below."""


@dataclass(frozen=True, slots=True)
class SendCommand:
    """A command for whichever replica leads; only stores that replicas share carry commands."""

    name: str
    command: str


Write: TypeAlias = PutProfile | DeleteProfile | AppendEvent | SetState | SetStates | RaiseState | PutBlob | SendCommand


class QueuedWrites:
    """Implements `protocol.StoreWrites`: each call queues one write."""

    def __init__(
        self,
        enqueue: Callable[[Write], None],
        enqueue_blob: Callable[[PutBlob, bytes], None],
        enqueue_states: Callable[[SetStates, Mapping[str, str | None]], None],
        *,
        as_leader: bool,
    ) -> None:
        self._enqueue = enqueue
        self._enqueue_blob = enqueue_blob
        self._enqueue_states = enqueue_states
        self._as_leader = as_leader

    def put_profile(self, profile: StoredProfile) -> None:
        self._enqueue(PutProfile(profile, self._as_leader))

    def delete_profile(self, version: str) -> None:
        self._enqueue(DeleteProfile(version, self._as_leader))

    def append_event(self, event: dict[str, Any]) -> None:
        self._enqueue(AppendEvent(event, self._as_leader))

    def set_state(self, key: str, value: str | None) -> None:
        self._enqueue(SetState(key, value, self._as_leader))

    def set_states(self, values: Mapping[str, str | None]) -> None:
        self._enqueue_states(SetStates(self._as_leader), values)

    def raise_state(self, key: str, value: int) -> None:
        self._enqueue(RaiseState(key, value, self._as_leader))

    def put_blob(self, key: str, data: bytes) -> None:
        self._enqueue_blob(PutBlob(key, self._as_leader), data)


class StoreWriter:
    """Lives in the control process's event loop; owns the queue of writes.

    as_leader: writes that only the leader makes (what is proposed, promoted, rolled back, set by an operator).
    as_replica: writes that every replica makes (its own alarms).
    """

    def __init__(self, store: Store, lease: Lease, errors: StoreErrorLog) -> None:
        self._store = store
        self._lease = lease
        self._errors = errors
        self._queue: asyncio.Queue[tuple[int, Write]] = asyncio.Queue(MAX_QUEUED_WRITES)
        """With the lease's term in which each was queued."""
        self._blobs: dict[PutBlob, bytes] = {}
        """That wait to be written."""
        self._newest: Write | None = None
        """The write that was queued last."""
        self._numbers = itertools.count(1)
        self._states: dict[SetStates, dict[str, str | None]] = {}
        """The same."""
        more = self._enqueue_blob, self._enqueue_states
        self.as_leader: StoreWrites = QueuedWrites(self._enqueue_as_leader, *more, as_leader=True)
        self.as_replica: StoreWrites = QueuedWrites(self._enqueue, *more, as_leader=False)

    def send_command(self, name: str, command: str) -> None:
        """Queue a command for whichever replica leads once the store answers again."""
        self._enqueue(SendCommand(name, command))

    def _enqueue_as_leader(self, write: Write) -> None:
        if self._lease.is_last_leader:
            self._enqueue(write)

    def _enqueue(self, write: Write) -> None:
        try:
            self._queue.put_nowait((self._lease.term, write))
            self._newest = write
        except asyncio.QueueFull:
            self._errors.count += 1
            self._drop(write)

    def _waiting(self, write: Write) -> dict[Any, Any] | None:
        """Where this write's values wait; None where it has them itself."""
        match write:
            case PutBlob():
                return self._blobs
            case SetStates():
                return self._states
            case _:
                return None

    def _drop(self, write: Write) -> None:
        """It will not be written."""
        if (waiting := self._waiting(write)) is not None:
            waiting.pop(write, None)

    def _enqueue_blob(self, write: PutBlob, data: bytes) -> None:
        if write.as_leader and not self._lease.is_last_leader:
            return
        write = replace(write, term=self._lease.term)
        waits = write in self._blobs
        self._blobs[write] = data
        if not waits:
            self._enqueue(write)

    def _enqueue_states(self, write: SetStates, values: Mapping[str, str | None]) -> None:
        if write.as_leader and not self._lease.is_last_leader:
            return
        term, newest = self._lease.term, self._newest
        if isinstance(newest, SetStates) and (newest.as_leader, newest.term) == (write.as_leader, term):
            waiting = self._states.get(newest)
            if waiting is not None:
                waiting.update(values)
                return
        write = replace(write, term=term, number=next(self._numbers))
        self._states[write] = dict(values)
        self._enqueue(write)

    async def run(self) -> None:
        """Write what is queued, one after the other, until cancelled."""
        while True:
            term, write = await self._queue.get()
            backoff = Backoff(RETRY_SECONDS)
            while self._is_due(term, write):
                try:
                    await self._write(write)
                    break
                except StoreUnreachable as failure:
                    self._errors.record(failure)
                except StoreFailure as failure:
                    self._errors.record(failure)
                    break
                await asyncio.sleep(backoff.pause())
            self._queue.task_done()

    async def wait_until_written(self, seconds: float) -> bool:
        """Returns once nothing is queued or being written, at the latest after `seconds`; False in that case."""
        try:
            await asyncio.wait_for(self._queue.join(), seconds)
        except TimeoutError:
            return False
        return True

    async def drain(self) -> None:
        """At the end of the process, after `run` was cancelled: write what is still queued, each once.
        StoreUnreachable as soon as the server does not answer."""
        while not self._queue.empty():
            term, write = self._queue.get_nowait()
            self._queue.task_done()
            if not self._is_due(term, write):
                continue
            try:
                await self._write(write)
            except StoreUnreachable:
                raise
            except StoreFailure as failure:
                self._errors.record(failure)

    def _is_due(self, term: int, write: Write) -> bool:
        """False for a write of the leader that this replica was, before another one led."""
        due = isinstance(write, SendCommand) or not write.as_leader or term == self._lease.term
        if not due:
            self._drop(write)
        return due

    async def _write(self, write: Write) -> None:
        """What waits is taken here, on the event loop: in the thread it could be taken between two steps of a caller.
        StoreFailure; after StoreUnreachable it waits again."""
        waiting = self._waiting(write)
        values = None if waiting is None else waiting.pop(write, None)
        if waiting is not None and values is None:
            return  # written with an earlier one
        try:
            await asyncio.to_thread(self._write_now, write, values)
        except StoreUnreachable:
            if waiting is not None:
                waiting.setdefault(write, values)  # a newer blob wins; of states, each number has its own values
            raise
        if self._errors.not_opened:
            raise StoreFailure(self._errors.not_opened)  # it is in memory, and will be lost

    def _write_now(self, write: Write, values: Any) -> None:
        match write:
            case PutProfile(profile):
                self._target(write.as_leader).put_profile(profile)
            case DeleteProfile(version):
                self._target(write.as_leader).delete_profile(version)
            case AppendEvent(event):
                self._target(write.as_leader).append_event(event)
            case SetState(key, value):
                self._target(write.as_leader).set_state(key, value)
            case SetStates():
                self._target(write.as_leader).set_states(values)
            case RaiseState(key, number):
                self._target(write.as_leader).raise_state(key, number)
            case PutBlob(key):
                self._target(write.as_leader).put_blob(key, values)
            case SendCommand(name, command):
                if self._store.shared is not None:
                    self._store.shared.send_command(name, command)

    def _target(self, as_leader: bool) -> StoreWrites:
        return self._store.shared.as_leader if as_leader and self._store.shared is not None else self._store
