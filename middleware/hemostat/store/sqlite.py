"""A store in one SQLite file."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from hemostat.store import protocol
from hemostat.store.protocol import StoredProfile, StoreFailure

T = TypeVar("T")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS profiles (version TEXT PRIMARY KEY, data BLOB NOT NULL, created REAL NOT NULL);
CREATE TABLE IF NOT EXISTS events (id INTEGER PRIMARY KEY AUTOINCREMENT, body TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS state (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS blobs (key TEXT PRIMARY KEY, data BLOB NOT NULL);
"""


class SqliteStore:
    """Implements `protocol.Store`. Each call opens a connection, so that a deleted or replaced file is noticed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        if not path.parent.is_dir():
            raise StoreFailure(f"store.url: the folder {path.parent} does not exist; make it or name another")
        self._run(lambda c: None)

    def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        with self._lock:
            try:
                connection = sqlite3.connect(self._path, timeout=5.0)
            except sqlite3.Error as error:
                raise StoreFailure(f"store {self._path}: {error}") from error
            try:
                with connection:
                    connection.executescript(_SCHEMA)
                    return work(connection)
            except (sqlite3.Error, ValueError) as error:  # ValueError: a damaged event is not JSON
                raise StoreFailure(f"store {self._path}: {error}") from error
            finally:
                connection.close()

    def put_profile(self, profile: StoredProfile) -> None:
        row = (profile.version, profile.data, profile.created)
        self._run(lambda c: c.execute("INSERT OR REPLACE INTO profiles VALUES (?, ?, ?)", row))

    def get_profile(self, version: str) -> StoredProfile | None:
        query = "SELECT version, data, created FROM profiles WHERE version = ?"
        row = self._run(lambda c: c.execute(query, (version,)).fetchone())
        return StoredProfile(*row) if row else None

    def profiles(self) -> list[StoredProfile]:
        query = "SELECT version, data, created FROM profiles ORDER BY created DESC"
        return [StoredProfile(*row) for row in self._run(lambda c: c.execute(query).fetchall())]

    def delete_profile(self, version: str) -> None:
        query = (
            "DELETE FROM profiles WHERE version = ? "
            "AND NOT EXISTS (SELECT 1 FROM state WHERE instr(value, profiles.version) > 0)"
        )
        self._run(lambda c: c.execute(query, (version,)))

    def append_event(self, event: dict[str, Any]) -> None:
        def work(c: sqlite3.Connection) -> None:
            c.execute("INSERT INTO events (body) VALUES (?)", (json.dumps(event),))
            c.execute("DELETE FROM events WHERE id <= (SELECT MAX(id) FROM events) - ?", (protocol.MAX_EVENTS,))

        self._run(work)

    def events(self, limit: int) -> list[dict[str, Any]]:
        query = "SELECT body FROM events ORDER BY id DESC LIMIT ?"
        return self._run(lambda c: [json.loads(body) for (body,) in c.execute(query, (limit,))])

    def set_state(self, key: str, value: str | None) -> None:
        if value is None:
            self._run(lambda c: c.execute("DELETE FROM state WHERE key = ?", (key,)))
        else:
            self._run(lambda c: c.execute("INSERT OR REPLACE INTO state VALUES (?, ?)", (key, value)))

    def raise_state(self, key: str, value: int) -> None:
        query = (
            "INSERT INTO state VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET "
            "value = CAST(MAX(CAST(value AS INTEGER), CAST(excluded.value AS INTEGER)) AS TEXT)"
        )
        self._run(lambda c: c.execute(query, (key, str(value))))

    def put_blob(self, key: str, data: bytes) -> None:
        if len(data) > protocol.MAX_BLOB_BYTES:
            raise StoreFailure(f"store {self._path}: {key} has {len(data)} bytes, above {protocol.MAX_BLOB_BYTES}")
        self._run(lambda c: c.execute("INSERT OR REPLACE INTO blobs VALUES (?, ?)", (key, data)))

    def get_blob(self, key: str) -> bytes | None:
        row = self._run(lambda c: c.execute("SELECT data FROM blobs WHERE key = ?", (key,)).fetchone())
        return bytes(row[0]) if row else None

    def get_state(self, key: str) -> str | None:
        row = self._run(lambda c: c.execute("SELECT value FROM state WHERE key = ?", (key,)).fetchone())
        return str(row[0]) if row else None

    def add_state(self, key: str, value: str) -> str:
        def work(c: sqlite3.Connection) -> str:
            c.execute("INSERT OR IGNORE INTO state VALUES (?, ?)", (key, value))
            return str(c.execute("SELECT value FROM state WHERE key = ?", (key,)).fetchone()[0])

        return self._run(work)

    def close(self) -> None:
        return
