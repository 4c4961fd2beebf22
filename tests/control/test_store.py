"""Both stores do the same; the SQLite one survives its file's ends."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hemostat.store import MAX_EVENTS, MemoryStore, SqliteStore, Store, StoredProfile, StoreFailure, open_store


@pytest.fixture(params=["memory", "sqlite"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return open_store("memory://" if request.param == "memory" else f"sqlite:///{tmp_path}/h.db")


def test_profiles_events_and_state(store: Store) -> None:
    assert store.get_profile("a") is None
    store.put_profile(StoredProfile("a", b"1", 1.0))
    store.put_profile(StoredProfile("b", b"2", 2.0))
    store.put_profile(StoredProfile("a", b"1", 3.0))
    assert [p.version for p in store.profiles()] == ["a", "b"]
    store.delete_profile("a")
    assert store.get_profile("a") is None
    assert store.get_profile("b") == StoredProfile("b", b"2", 2.0)
    for n in range(5):
        store.append_event({"n": n})
    assert [e["n"] for e in store.events(3)] == [4, 3, 2]
    assert store.get_state("serving") is None
    store.set_state("serving", "b")
    assert store.get_state("serving") == "b"
    store.set_state("serving", None)
    assert store.get_state("serving") is None


def test_sqlite_keeps_across_reopening(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/h.db"
    open_store(url).put_profile(StoredProfile("a", b"1", 1.0))
    assert open_store(url).get_profile("a") == StoredProfile("a", b"1", 1.0)


def test_sqlite_file_deleted_while_running_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "h.db"
    store = SqliteStore(path)
    store.set_state("k", "v")
    path.unlink()
    assert store.get_state("k") is None
    store.set_state("k", "w")
    assert store.get_state("k") == "w"


def test_sqlite_file_that_is_no_database_is_a_store_failure(tmp_path: Path) -> None:
    path = tmp_path / "h.db"
    store = SqliteStore(path)
    path.write_bytes(os.urandom(4096))
    with pytest.raises(StoreFailure, match=r"h\.db"):
        store.set_state("k", "v")


@pytest.mark.parametrize("url", ["redis://x", "sqlite://", "sqlite:///", "sqlite://host/x", "nonsense", ""])
def test_bad_url_names_the_key(url: str) -> None:
    with pytest.raises(StoreFailure, match=r"store\.url"):
        open_store(url)


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreFailure, match="nowhere"):
        open_store(f"sqlite:///{tmp_path}/nowhere/h.db")


def test_memory_events_are_bounded() -> None:
    store = MemoryStore()
    for n in range(MAX_EVENTS + 10):
        store.append_event({"n": n})
    assert len(store.events(2 * MAX_EVENTS)) == MAX_EVENTS
