"""A store in one SQLite file, on a local disk.

Who owns it holds `flock` on a second file, `<file>.lock`, until the process ends. The database itself is never
opened by anything but SQLite: closing any other descriptor of it would drop the locks that SQLite holds. It is a plain
database with a write-ahead log, so that backups and `hemostat check` may read it at any time.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from hemostat.store import protocol
from hemostat.store.protocol import (
    SCHEMA,
    AppendEvent,
    DeleteProfile,
    ExclusionLost,
    Head,
    PutBlob,
    PutProfile,
    SetState,
    Snapshot,
    StoreConflict,
    StoredProfile,
    StoreFailure,
    StoreIncompatible,
    Write,
    has_happened,
    require_schema,
)

BUSY_SECONDS = 5.0
"""The time for which another process may lock the database before a call fails."""

_TABLES = (
    "CREATE TABLE IF NOT EXISTS head (schema INTEGER NOT NULL, revision INTEGER NOT NULL, commit_id TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS profiles (version TEXT PRIMARY KEY, data BLOB NOT NULL, created REAL NOT NULL)",
    "CREATE TABLE IF NOT EXISTS events (id INTEGER PRIMARY KEY AUTOINCREMENT, body TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS state (key TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS blobs (key TEXT PRIMARY KEY, data BLOB NOT NULL)",
)


class SqliteStore:
    """Implements `protocol.Store`. Each call opens a connection of its own, so that it sees the file that is there."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._calls = threading.Lock()
        self._file: tuple[int, int] | None = None
        """The device and inode of the database that the last call has read or written; None if there was none."""
        self._lock: int | None = None
        """The descriptor of the lock's file, while this process owns the store."""

    @property
    def owned_until(self) -> float:
        """The kernel releases the lock with the process."""
        return math.inf

    def acquire(self) -> bool:
        with self._calls:
            if self._lock is not None:
                return True
            self._require_folder()
            path = f"{self._path}.lock"
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except OSError as error:
                raise StoreFailure(f"store {path}: {error.strerror}") from error
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                return False
            except OSError as error:  # the file system has no locks
                os.close(descriptor)
                raise StoreFailure(f"store {path}: {error.strerror}; the store needs a local disk") from error
            self._lock = descriptor
            return True

    def verify(self) -> None:
        with self._calls:
            self._require_owner()
            self._require_same_file()

    def head(self) -> Head:
        with self._calls:
            if not self._exists():
                return Head()
            with self._transaction("BEGIN") as connection:
                return self._head(connection)

    def read(self) -> Snapshot:
        with self._calls:
            if not self._exists():
                return Snapshot()
            with self._transaction("BEGIN") as connection:
                head = self._head(connection)
                if head.revision == 0:
                    return Snapshot()
                events = connection.execute("SELECT body FROM events ORDER BY id DESC")
                profiles = connection.execute("SELECT version, data, created FROM profiles ORDER BY created DESC")
                return Snapshot(
                    head,
                    dict(connection.execute("SELECT key, value FROM state")),
                    [json.loads(body) for (body,) in events],
                    [StoredProfile(*row) for row in profiles],
                    dict(connection.execute("SELECT key, data FROM blobs")),
                )

    def commit(self, writes: Sequence[Write], expected: int, commit_id: str) -> int:
        with self._calls:
            self._require_owner()
            if self._file is not None:
                self._require_same_file()
            with self._transaction("BEGIN IMMEDIATE") as connection:
                head = self._head(connection)
                if has_happened(head, expected, commit_id, str(self._path)):
                    return head.revision
                if head.revision == 0:
                    for table in _TABLES:
                        connection.execute(table)
                for write in writes:
                    _execute(connection, write)
                connection.execute("DELETE FROM head")
                connection.execute("INSERT INTO head VALUES (?, ?, ?)", (SCHEMA, expected + 1, commit_id))
            self._require_same_file()
            return expected + 1

    def close(self) -> None:
        with self._calls:
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def _require_folder(self) -> None:
        """Raises StoreFailure if the folder is missing. Then nothing is known of the file: a volume may be missing."""
        try:
            exists = self._path.parent.is_dir()
        except OSError as error:  # a folder above it that this user may not enter
            raise StoreFailure(f"store {self._path}: {error.strerror}") from error
        if not exists:
            raise StoreFailure(f"store.url: the folder {self._path.parent} does not exist; make it or name another")

    def _require_owner(self) -> None:
        if self._lock is None:
            raise ExclusionLost(f"store {self._path}: this process does not own it")

    def _require_same_file(self) -> None:
        """Raises an error unless the file is the same. A volume that is missing for a while is a failure, and no
        conflict."""
        self._require_folder()
        if self._inode() != self._file:
            raise StoreConflict(f"store {self._path}: the file was replaced or deleted")

    def _exists(self) -> bool:
        """Returns True if there is a file to read."""
        self._require_folder()
        self._file = self._inode()
        return self._file is not None

    def _inode(self) -> tuple[int, int] | None:
        try:
            result = self._path.stat()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreFailure(f"store {self._path}: {error.strerror}") from error
        return result.st_dev, result.st_ino

    def _head(self, connection: sqlite3.Connection) -> Head:
        """Returns the head. Raises StoreIncompatible if another version has written the store."""
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not tables:
            return Head()
        if "head" not in tables:
            raise StoreIncompatible(
                f"store {self._path}: it is not a store of this version of hemostat; name another in store.url"
            )
        row = connection.execute("SELECT schema, revision, commit_id FROM head").fetchone()
        require_schema(row[0], str(self._path))
        return Head(row[1], row[2], row[0])

    @contextlib.contextmanager
    def _transaction(self, begin: str) -> Iterator[sqlite3.Connection]:
        """Yields the connection in a transaction, which is committed at the end, or undone after an exception. Raises
        StoreFailure."""
        try:
            connection = sqlite3.connect(self._path, timeout=BUSY_SECONDS, isolation_level=None)
            with contextlib.closing(connection):
                if self._lock is not None:
                    connection.execute("PRAGMA journal_mode = WAL")
                    connection.execute("PRAGMA synchronous = FULL")
                connection.execute(begin)
                self._file = self._inode()
                yield connection
                connection.execute("COMMIT")
        except (sqlite3.Error, ValueError, TypeError) as error:  # ValueError, TypeError: what is stored is damaged
            raise StoreFailure(f"store {self._path}: {error}") from error


def _execute(connection: sqlite3.Connection, write: Write) -> None:
    match write:
        case PutProfile(profile):
            row = (profile.version, profile.data, profile.created)
            connection.execute("INSERT OR REPLACE INTO profiles VALUES (?, ?, ?)", row)
        case DeleteProfile(version):
            connection.execute("DELETE FROM profiles WHERE version = ?", (version,))
        case AppendEvent(event):
            connection.execute("INSERT INTO events (body) VALUES (?)", (json.dumps(event),))
            oldest = "DELETE FROM events WHERE id <= (SELECT MAX(id) FROM events) - ?"
            connection.execute(oldest, (protocol.MAX_EVENTS,))
        case SetState(key, None):
            connection.execute("DELETE FROM state WHERE key = ?", (key,))
        case SetState(key, value):
            connection.execute("INSERT OR REPLACE INTO state VALUES (?, ?)", (key, value))
        case PutBlob(key, data):
            connection.execute("INSERT OR REPLACE INTO blobs VALUES (?, ?)", (key, data))
