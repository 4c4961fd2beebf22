"""Where the stores under test are: each kind opens as many of the same store as a test asks for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.support import postgres

from hemostat.store.new_memory import MemoryStore
from hemostat.store.new_sqlite import SqliteStore
from hemostat.store.postgres import PostgresStore
from hemostat.store.protocol import ExclusiveStore

Opener = Callable[[], ExclusiveStore]
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
