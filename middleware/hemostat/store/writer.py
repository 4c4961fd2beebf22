"""The one place from which the control process writes to the store: a bounded queue of typed writes, in order.

Writes are queued on the event loop and happen in a thread. A failed write is counted and dropped, unless the server
cannot be reached: then the write is repeated until it answers.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, TypeAlias

from hemostat.ipc.backoff import Backoff
from hemostat.store.errors import StoreErrorLog
from hemostat.store.protocol import Store, StoredProfile, StoreFailure, StoreUnreachable

MAX_QUEUED_WRITES = 1000
RETRY_SECONDS = (0.5, 1.0, 2.0, 5.0, 10.0)
"""Longest pauses between attempts to reach the server; the last one repeats."""


@dataclass(frozen=True, slots=True)
class PutProfile:
    profile: StoredProfile


@dataclass(frozen=True, slots=True)
class DeleteProfile:
    version: str


@dataclass(frozen=True, slots=True)
class AppendEvent:
    event: dict[str, Any]


@dataclass(frozen=True, slots=True)
class SetState:
    key: str
    value: str | None


@dataclass(frozen=True, slots=True)
class RaiseState:
    key: str
    value: int


@dataclass(frozen=True, slots=True)
class PutBlob:
    """The newest bytes under this key that wait to be written: several writes that wait become one."""

    key: str


Write: TypeAlias = PutProfile | DeleteProfile | AppendEvent | SetState | RaiseState | PutBlob


class StoreWriter:
    """Implements `protocol.StoreWrites`: each call queues one write. Lives in the control process's event loop."""

    def __init__(self, store: Store, errors: StoreErrorLog) -> None:
        self._store = store
        self._errors = errors
        self._queue: asyncio.Queue[Write] = asyncio.Queue(MAX_QUEUED_WRITES)
        self._blobs: dict[PutBlob, bytes] = {}
        """That wait to be written."""

    # --- protocol.StoreWrites --------------------------------------------------------------------------------------

    def put_profile(self, profile: StoredProfile) -> None:
        self._enqueue(PutProfile(profile))

    def delete_profile(self, version: str) -> None:
        self._enqueue(DeleteProfile(version))

    def append_event(self, event: dict[str, Any]) -> None:
        self._enqueue(AppendEvent(event))

    def set_state(self, key: str, value: str | None) -> None:
        self._enqueue(SetState(key, value))

    def raise_state(self, key: str, value: int) -> None:
        self._enqueue(RaiseState(key, value))

    def put_blob(self, key: str, data: bytes) -> None:
        write = PutBlob(key)
        waits = write in self._blobs
        self._blobs[write] = data
        if not waits:
            self._enqueue(write)

    # --- the queue -------------------------------------------------------------------------------------------------

    def _enqueue(self, write: Write) -> None:
        try:
            self._queue.put_nowait(write)
        except asyncio.QueueFull:
            self._errors.count += 1
            if isinstance(write, PutBlob):
                self._blobs.pop(write)

    async def run(self) -> None:
        """Write what is queued, one after the other, until cancelled."""
        while True:
            write = await self._queue.get()
            backoff = Backoff(RETRY_SECONDS)
            while True:
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
            write = self._queue.get_nowait()
            self._queue.task_done()
            try:
                await self._write(write)
            except StoreUnreachable:
                raise
            except StoreFailure as failure:
                self._errors.record(failure)

    async def _write(self, write: Write) -> None:
        """StoreFailure; after StoreUnreachable a blob waits again."""
        blob = self._blobs.pop(write) if isinstance(write, PutBlob) else b""
        try:
            await asyncio.to_thread(self._write_now, write, blob)
        except StoreUnreachable:
            if isinstance(write, PutBlob):
                self._blobs.setdefault(write, blob)  # a newer one wins
            raise
        if self._errors.not_opened:
            raise StoreFailure(self._errors.not_opened)  # it is in memory, and will be lost

    def _write_now(self, write: Write, blob: bytes) -> None:
        match write:
            case PutProfile(profile):
                self._store.put_profile(profile)
            case DeleteProfile(version):
                self._store.delete_profile(version)
            case AppendEvent(event):
                self._store.append_event(event)
            case SetState(key, value):
                self._store.set_state(key, value)
            case RaiseState(key, number):
                self._store.raise_state(key, number)
            case PutBlob(key):
                self._store.put_blob(key, blob)
