"""Where profiles, decisions and a little state live: in memory, or in one SQLite file.

A store that fails raises StoreFailure and nothing else; the control process counts it and goes on with what it holds in
memory (rule 1).

Two middlewares may share one SQLite file. Profiles (named by their digest) and decisions add up; of what serves, and of
the mode, the last word of either stands, and is taken up by whichever starts next: a running one never follows the
other. Each tests on its own, so that each has its own alpha; after a restart the larger count of tests holds.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

from hemostat_calibration.errors import HemostatError

T = TypeVar("T")

MAX_EVENTS = 10_000
"""Oldest decisions are forgotten above this many."""


class StoreFailure(HemostatError):
    """The store could not be read or written."""


@dataclass(frozen=True, slots=True)
class StoredProfile:
    """A profile's bytes with when it was put, in seconds since the epoch."""

    version: str
    data: bytes
    created: float


class Store(Protocol):
    """Small and synchronous; the shell calls it off the event loop."""

    def put_profile(self, profile: StoredProfile) -> None: ...

    def get_profile(self, version: str) -> StoredProfile | None: ...

    def profiles(self) -> list[StoredProfile]:
        """Newest first."""

    def delete_profile(self, version: str) -> None:
        """Nothing happens while a state names it: it serves, here or in another middleware with the same store."""

    def append_event(self, event: dict[str, Any]) -> None: ...

    def events(self, limit: int) -> list[dict[str, Any]]:
        """Newest first."""

    def set_state(self, key: str, value: str | None) -> None: ...

    def raise_state(self, key: str, value: int) -> None:
        """Set to `value` a number that only grows: a larger one, of another middleware with the same store, stays."""

    def get_state(self, key: str) -> str | None: ...

    def close(self) -> None: ...


class MemoryStore:
    """Gone with the process."""

    def __init__(self) -> None:
        self._profiles: dict[str, StoredProfile] = {}
        self._events: deque[dict[str, Any]] = deque(maxlen=MAX_EVENTS)
        self._state: dict[str, str] = {}

    def put_profile(self, profile: StoredProfile) -> None:
        self._profiles[profile.version] = profile

    def get_profile(self, version: str) -> StoredProfile | None:
        return self._profiles.get(version)

    def profiles(self) -> list[StoredProfile]:
        return sorted(self._profiles.values(), key=lambda p: p.created, reverse=True)

    def delete_profile(self, version: str) -> None:
        if not any(version in value for value in self._state.values()):
            self._profiles.pop(version, None)

    def append_event(self, event: dict[str, Any]) -> None:
        self._events.append(event)

    def events(self, limit: int) -> list[dict[str, Any]]:
        return list(self._events)[: -limit - 1 : -1]

    def set_state(self, key: str, value: str | None) -> None:
        if value is None:
            self._state.pop(key, None)
        else:
            self._state[key] = value

    def raise_state(self, key: str, value: int) -> None:
        self._state[key] = str(max(value, int(self._state.get(key, 0))))

    def get_state(self, key: str) -> str | None:
        return self._state.get(key)

    def close(self) -> None:
        return


_SCHEMA = """
CREATE TABLE IF NOT EXISTS profiles (version TEXT PRIMARY KEY, data BLOB NOT NULL, created REAL NOT NULL);
CREATE TABLE IF NOT EXISTS events (id INTEGER PRIMARY KEY AUTOINCREMENT, body TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS state (key TEXT PRIMARY KEY, value TEXT NOT NULL);
"""


class SqliteStore:
    """One file. Each call opens its own connection: a file that went away or came back is noticed at once."""

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
            except (sqlite3.Error, ValueError) as error:  # ValueError: a damaged event is no JSON
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
            c.execute("DELETE FROM events WHERE id <= (SELECT MAX(id) FROM events) - ?", (MAX_EVENTS,))

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

    def get_state(self, key: str) -> str | None:
        row = self._run(lambda c: c.execute("SELECT value FROM state WHERE key = ?", (key,)).fetchone())
        return str(row[0]) if row else None

    def close(self) -> None:
        return


def open_store(url: str) -> Store:
    """`memory://`, or `sqlite:///relative/path` and `sqlite:////absolute/path`."""
    parts = urlsplit(url)
    if parts.scheme == "memory":
        return MemoryStore()
    if parts.scheme == "sqlite" and not parts.netloc and parts.path not in ("", "/"):
        return SqliteStore(Path(unquote(parts.path[1:])))
    raise StoreFailure(f"store.url: {url!r} is neither memory:// nor sqlite:///path")
