"""From `store.url` to a store."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote

from hemostat.config.store_url import split_store_url
from hemostat.store.errors import StoreErrorLog
from hemostat.store.memory import MemoryStore
from hemostat.store.protocol import Store, StoreFailure
from hemostat.store.sqlite import SqliteStore
from hemostat_calibration.messages import shown_address


def open_store(url: str) -> Store:
    """`memory://`, `sqlite:///relative/path` or `sqlite:////absolute/path`.

    StoreFailure when the address is invalid, or the file cannot be opened.
    """
    try:
        parts = split_store_url(url)
    except ValueError as error:
        raise StoreFailure(f"store.url: {error}") from None
    if parts.scheme == "memory":
        return MemoryStore()
    if parts.scheme == "sqlite":
        return SqliteStore(Path(unquote(parts.path[1:])))
    raise StoreFailure(f"store.url: {shown_address(url)} cannot be opened by this version")


def open_store_or_memory(url: str) -> tuple[Store, StoreErrorLog]:
    """The store and the log of its errors; a store in memory where the configured one cannot be opened."""
    try:
        store = open_store(url)
    except StoreFailure as failure:
        errors = StoreErrorLog()
        errors.record(StoreFailure(f"{failure}; using a store in memory: nothing will survive a restart"))
        errors.not_opened = errors.last_message
        return MemoryStore(), errors
    return store, StoreErrorLog()
