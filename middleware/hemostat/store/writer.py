"""The one place from which the control process writes to the store.

Invariants:
- What waits is coalesced: the newest value of a state, the newest bytes of a blob, whether a profile is to be there or
  not; all events, of which the store keeps the newest `MAX_EVENTS`. So it is bounded however long the store is away.
- All that waits is one commit. What one step of the event loop queues is never split.
- A commit is repeated, the same writes under the same id, until the store says that it has happened: it happens exactly
  once, and nothing is dropped. Only where another process owns the store meanwhile it never happens; the process ends
  then (`control.ownership`).
"""

from __future__ import annotations

import asyncio
import random
import secrets
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hemostat.store.errors import StoreErrorLog
from hemostat.store.protocol import (
    MAX_BLOB_BYTES,
    MAX_EVENTS,
    AppendEvent,
    BlobKey,
    DeleteProfile,
    ExclusionLost,
    Head,
    NotActiveError,
    PutBlob,
    PutProfile,
    SetState,
    StateKey,
    Store,
    StoreConflict,
    StoredProfile,
    StoreFailure,
    Write,
)
from hemostat.store.thread import StoreThread
from hemostat_calibration.backoff import Backoff

RETRY_SECONDS = (0.1, 0.5, 1.0, 2.0, 5.0)
"""The longest pauses between attempts; the last one repeats."""
STOPPING = (
    "this process stops, and whether the store keeps this is not known yet; look at the state in a moment, and ask "
    "again if it does not show this"
)


@dataclass(frozen=True, slots=True)
class _Commit:
    commit_id: str
    writes: list[Write]
    last: int
    """The number of the last write that it has."""


class StoreWriter:
    """Implements `protocol.StoreWrites`. Lives in the control process's event loop.

    thread: executes the store's calls. on_lost: called where the store may be another process's now; `run` goes on once
    `active` is set again.
    """

    def __init__(
        self,
        store: Store,
        thread: StoreThread,
        errors: StoreErrorLog,
        active: asyncio.Event,
        on_lost: Callable[[StoreFailure], None],
    ) -> None:
        self._store = store
        self._thread = thread
        self._errors = errors
        self._active = active
        self._on_lost = on_lost
        self.head = Head()
        """The head of this process's last commit that has happened, or of what it has read."""
        self._profiles: dict[str, PutProfile | DeleteProfile] = {}
        self._events: deque[dict[str, Any]] = deque(maxlen=MAX_EVENTS)
        self._states: dict[StateKey, str | None] = {}
        self._blobs: dict[BlobKey, bytes] = {}
        self._commit: _Commit | None = None
        """The commit that has begun, and whose outcome is not known yet."""
        self._queued = 0
        """The number of writes that were ever queued; `_written` is how many of these were written."""
        self._written = 0
        self._stopping = False
        self._work = asyncio.Event()
        self._progress = asyncio.Event()

    def put_profile(self, profile: StoredProfile) -> None:
        self._profiles[profile.version] = PutProfile(profile)
        self._note()

    def delete_profile(self, version: str) -> None:
        self._profiles[version] = DeleteProfile(version)
        self._note()

    def append_event(self, event: dict[str, Any]) -> None:
        self._events.append(event)
        self._note()

    def set_state(self, key: StateKey, value: str | None) -> None:
        self._states[key] = value
        self._note()

    def put_blob(self, key: BlobKey, data: bytes) -> None:
        if len(data) > MAX_BLOB_BYTES:
            self._errors.record(StoreFailure(f"store: {key} has {len(data)} bytes, above {MAX_BLOB_BYTES}: not stored"))
            return
        self._blobs[key] = data
        self._note()

    def claim(self) -> None:
        """Makes a commit, even if nothing waits."""
        self._note()

    def queued(self) -> int:
        return self._queued

    def has_written(self, write: int) -> bool:
        return self._written >= write

    def _note(self) -> None:
        self._queued += 1
        self._work.set()

    def is_own(self, head: Head) -> bool:
        """Returns True if no other process has written: it is the head of the last commit, or of the one whose outcome
        is not known."""
        begun = self._commit
        return head == self.head or (begun is not None and head == Head(self.head.revision + 1, begun.commit_id))

    async def run(self) -> None:
        """Writes what waits until it is cancelled."""
        backoff = Backoff(RETRY_SECONDS, random.random)
        while True:
            await self._work.wait()
            await self._active.wait()  # the last wait: what comes while the process is suspended waits, too
            try:
                await self._write_commit()
                backoff.reset()
            except (ExclusionLost, StoreConflict) as failure:
                self._errors.record(failure)
                self._on_lost(failure)
            except StoreFailure as failure:
                self._errors.record(failure)
                await asyncio.sleep(backoff.pause())

    async def write(self) -> None:
        """Tries once to write what waits, the commit whose outcome is not known first. Raises StoreFailure."""
        while self._queued > self._written:
            await self._write_commit()

    async def _write_commit(self) -> None:
        """Tries once to write the commit whose outcome is not known, or else what waits. Raises StoreFailure."""
        if self._queued > self._written:
            commit = self._commit or self._begin()
            given = commit.writes, self.head.revision, commit.commit_id
            revision = await self._thread.call(self._store.commit, *given)
            self.head, self._written, self._commit = Head(revision, commit.commit_id), commit.last, None
            self._errors.clear()
            self._note_progress()
        if self._queued == self._written:
            self._work.clear()

    def _note_progress(self) -> None:
        self._progress.set()
        self._progress = asyncio.Event()

    def stop_waiting(self) -> None:
        """Is told that the process stops: whoever waits in `wait_until_written`, now or later, is told so."""
        self._stopping = True
        self._note_progress()

    def _begin(self) -> _Commit:
        writes: list[Write] = list(self._profiles.values())
        writes += map(AppendEvent, self._events)
        writes += [SetState(key, value) for key, value in self._states.items()]
        writes += [PutBlob(key, data) for key, data in self._blobs.items()]
        for waiting in (self._profiles, self._events, self._states, self._blobs):
            waiting.clear()
        self._commit = _Commit(secrets.token_hex(16), writes, self._queued)
        return self._commit

    async def wait_until_written(self, seconds: float) -> bool:
        """Returns once all that is queued now is written, at the latest after `seconds`; False in that case. Raises
        NotActiveError if the process stops before that.
        """
        last = self._queued
        try:
            async with asyncio.timeout(seconds):
                while self._written < last:
                    if self._stopping:
                        raise NotActiveError(STOPPING)
                    await self._progress.wait()
        except TimeoutError:
            return False
        return True
