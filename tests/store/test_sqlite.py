"""The SQLite store: its file is replaced, locked, full, damaged, or of another version."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from hemostat.store import sqlite as sqlite_module
from hemostat.store.protocol import (
    SCHEMA,
    Head,
    SetState,
    Snapshot,
    StoreConflict,
    StoreFailure,
    StoreIncompatible,
)
from hemostat.store.sqlite import SqliteStore


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "hemostat.db"


@pytest.fixture
def store(path: Path) -> Iterator[SqliteStore]:
    store = SqliteStore(path)
    assert store.acquire()
    store.commit([SetState("a", "1")], 0, "1")
    yield store
    store.close()


def test_reading_makes_no_file(path: Path) -> None:
    assert SqliteStore(path).read() == Snapshot()
    assert SqliteStore(path).head() == Head()
    assert list(path.parent.iterdir()) == []


def test_a_folder_that_does_not_exist_is_unknown_and_not_empty(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "absent" / "h.db")
    for call in (store.acquire, store.read, store.head):
        with pytest.raises(StoreFailure, match=r"folder .*/absent does not exist; make it"):
            call()
    (tmp_path / "absent").mkdir()
    assert store.acquire()
    assert store.read() == Snapshot()
    store.close()


def test_a_file_that_was_deleted_or_replaced_is_not_written(store: SqliteStore, path: Path) -> None:
    store.verify()
    backup = SqliteStore(path.with_name("backup.db"))
    assert backup.acquire()
    backup.commit([SetState("a", "0")], 0, "0")
    backup.close()
    store.commit([SetState("a", "2")], 1, "2")
    os.replace(path.with_name("backup.db"), path)
    for _ in range(2):
        with pytest.raises(StoreConflict):
            store.commit([SetState("a", "3")], 2, "3")
    assert store.head() == Head(1, "0")
    assert store.read().states == {"a": "0"}
    path.unlink()
    with pytest.raises(StoreConflict, match="replaced or deleted"):
        store.verify()
    assert store.head() == Head()
    with pytest.raises(StoreConflict):
        store.commit([SetState("a", "3")], 2, "3")


def test_a_locked_file_is_written_later(store: SqliteStore, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.close()
    monkeypatch.setattr(sqlite_module, "BUSY_SECONDS", 0.01)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    assert store.acquire()
    with pytest.raises(StoreFailure, match="locked"):
        store.commit([SetState("a", "2")], 1, "2")
    other.close()
    assert store.commit([SetState("a", "2")], 1, "2") == 2
    assert store.read().states == {"a": "2"}


def test_a_backup_while_it_is_written(store: SqliteStore, path: Path) -> None:
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN")
    assert other.execute("SELECT value FROM state").fetchall() == [("1",)]
    store.commit([SetState("a", "2")], 1, "2")
    assert other.execute("SELECT value FROM state").fetchall() == [("1",)]
    other.close()


def test_a_store_of_another_version_is_one_line(store: SqliteStore, path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE head SET schema = ?", (SCHEMA + 1,))
    connection.close()
    for call in (store.read, store.head, lambda: store.commit([], 1, "2")):
        with pytest.raises(StoreIncompatible, match=f"schema {SCHEMA + 1}, written by a newer hemostat.*name another"):
            call()


def test_another_database_is_one_line(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE state (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
    connection.close()
    store = SqliteStore(path)
    assert store.acquire()
    with pytest.raises(StoreIncompatible, match="not a store of this version"):
        store.commit([], 0, "1")
    store.close()


def test_a_damaged_file_is_unknown_and_not_empty(store: SqliteStore, path: Path) -> None:
    store.close()
    intact = path.with_name("intact.db")
    shutil.copy(path, intact)
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(StoreFailure, match="not a database"):
        store.read()
    os.replace(intact, path)
    assert store.read().states == {"a": "1"}
    store.close()
