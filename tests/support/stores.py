"""Where the stores under test are: each kind opens as many of the same store as a test asks for."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.support import postgres

from hemostat.store.factory import open_store
from hemostat.store.memory import MemoryStore
from hemostat.store.postgres import PostgresStore
from hemostat.store.protocol import (
    AppendEvent,
    DeleteProfile,
    PutBlob,
    PutProfile,
    SetState,
    Snapshot,
    Store,
    StoredProfile,
    Write,
)
from hemostat.store.sqlite import SqliteStore

Opener = Callable[[], Store]
"""Opens the same store once more, as another process does. A store in memory has one process: it is the same object."""

KEPT = ("sqlite", "postgres")
"""Kinds of stores that outlast their process."""
KINDS = ("memory", *KEPT)


def opener(kind: str, folder: Path) -> Opener:
    """Of a new store. Skips the test where its server is not installed."""
    if kind == "postgres":
        server = postgres.shared()
        url = server.url(server.new_database())
        return lambda: PostgresStore(url)
    if kind == "memory":
        store = MemoryStore()
        return lambda: store
    return lambda: SqliteStore(folder / "hemostat.db")


def stored(url: str) -> Snapshot:
    """What a store holds, as another process sees it."""
    store = open_store(url)
    try:
        return store.read()
    finally:
        store.close()


def put(url: str, *writes: Write) -> None:
    """Write to a store that no process owns."""
    store = open_store(url)
    assert store.acquire()
    store.commit(writes, store.head().revision, f"put {store.head().revision}")
    store.close()


class DirectWrites:
    """Implements `protocol.StoreWrites`: each call is a commit of its own."""

    def __init__(self, store: Store | None = None) -> None:
        self.store = store or MemoryStore()
        assert self.store.acquire()
        self._numbers = itertools.count()

    def commit(self, *writes: Write) -> None:
        self.store.commit(writes, self.store.head().revision, f"{id(self)} {next(self._numbers)}")

    def put_profile(self, profile: StoredProfile) -> None:
        self.commit(PutProfile(profile))

    def delete_profile(self, version: str) -> None:
        self.commit(DeleteProfile(version))

    def append_event(self, event: dict[str, Any]) -> None:
        self.commit(AppendEvent(event))

    def set_state(self, key: str, value: str | None) -> None:
        self.commit(SetState(key, value))

    def put_blob(self, key: str, data: bytes) -> None:
        self.commit(PutBlob(key, data))

    def queued(self) -> int:
        return 0

    def has_written(self, write: int) -> bool:
        return True

    # --- what is stored --------------------------------------------------------------------------------------------

    def read(self) -> Snapshot:
        return self.store.read()

    def get_state(self, key: str) -> str | None:
        return self.read().states.get(key)

    def get_profile(self, version: str) -> StoredProfile | None:
        return next((profile for profile in self.profiles() if profile.version == version), None)

    def profiles(self) -> Sequence[StoredProfile]:
        return self.read().profiles

    def events(self, limit: int) -> list[dict[str, Any]]:
        """Newest first."""
        return list(self.read().events[:limit])

    def get_blob(self, key: str) -> bytes | None:
        return self.read().blobs.get(key)


class LateWrites(DirectWrites):
    """Writes states only, and only while the store is not `away`; `lose` is what a kill does."""

    def __init__(self) -> None:
        super().__init__()
        self.states: dict[str, str | None] = {}
        self.away = False
        self._unwritten: dict[str, str | None] = {}
        self._queued = self._written = 0

    def set_state(self, key: str, value: str | None) -> None:
        self._unwritten[key] = value
        self._queued += 1
        if not self.away:
            self.write()

    def write(self) -> None:
        """The store is back."""
        self.away = False
        self.states |= self._unwritten
        self._unwritten.clear()
        self._written = self._queued

    def lose(self) -> None:
        """All that was not written is lost."""
        self._unwritten.clear()
        self.write()

    def queued(self) -> int:
        return self._queued

    def has_written(self, write: int) -> bool:
        return self._written >= write
