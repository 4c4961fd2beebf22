"""Makes the store that `store.url` names."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote

from hemostat.config.store_url import split_store_url
from hemostat.store.memory import MemoryStore
from hemostat.store.postgres import PostgresStore
from hemostat.store.protocol import Store, StoreFailure
from hemostat.store.sqlite import SqliteStore


def open_store(url: str) -> Store:
    """Returns the store for `memory://`, `sqlite:///relative/path`, `sqlite:////absolute/path` or
    `postgresql://user:password@host/database`. Nothing is opened before the first call.

    Raises StoreFailure if the address is invalid.
    """
    try:
        parts = split_store_url(url)
    except ValueError as error:
        raise StoreFailure(f"store.url: {error}") from None
    if parts.scheme == "memory":
        return MemoryStore()
    if parts.scheme == "sqlite":
        return SqliteStore(Path(unquote(parts.path[1:])))
    return PostgresStore(url)
