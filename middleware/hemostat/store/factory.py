"""From `store.url` to a store."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote

from hemostat.config.store_url import split_store_url
from hemostat.store.errors import StoreErrorLog
from hemostat.store.memory import MemoryStore
from hemostat.store.protocol import Store, StoreFailure
from hemostat.store.sqlite import SqliteStore
from hemostat.store.valkey import ValkeyStore


def open_store(url: str) -> Store:
    """`memory://`, `sqlite:///relative/path`, `sqlite:////absolute/path`, or a server:
    `redis://[user:password@]host[:port][/database][?prefix=…]`; `rediss` for TLS, `valkey` and `valkeys` for the same.

    StoreFailure when the address is invalid, the file cannot be opened, or the client library is missing. A server
    is not contacted before the first call.
    """
    try:
        parts = split_store_url(url)
    except ValueError as error:
        raise StoreFailure(f"store.url: {error}") from None
    if parts.scheme == "memory":
        return MemoryStore()
    if parts.scheme == "sqlite":
        return SqliteStore(Path(unquote(parts.path[1:])))
    return ValkeyStore(url)


def open_store_or_memory(url: str) -> tuple[Store, StoreErrorLog]:
    """The store and the log of its errors; a store in memory where the configured one cannot be opened."""
    try:
        store = open_store(url)
    except StoreFailure as failure:
        errors = StoreErrorLog(log_repeats=False)
        errors.record(StoreFailure(f"{failure}; using a store in memory: nothing will survive a restart"))
        errors.not_opened = errors.last_message
        return MemoryStore(), errors
    # Attempts to reach a server are repeated for as long as it is away, each with the same message.
    return store, StoreErrorLog(log_repeats=store.shared is None)
