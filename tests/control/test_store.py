"""Both stores do the same; the SQLite one survives its file's ends."""

from __future__ import annotations

import multiprocessing
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


def test_a_number_only_grows(store: Store) -> None:
    for value, kept in ((3, "3"), (10, "10"), (9, "10"), (11, "11")):
        store.raise_state("tests", value)
        assert store.get_state("tests") == kept


def test_a_profile_that_a_state_names_stays(store: Store) -> None:
    version = "a" * 32
    store.put_profile(StoredProfile(version, b"1", 1.0))
    store.set_state("serving", f'{{"selected": ["{version}", 3]}}')
    store.delete_profile(version)
    assert store.get_profile(version) is not None
    store.set_state("serving", None)
    store.delete_profile(version)
    assert store.get_profile(version) is None


def _write(path: str, which: int) -> None:
    store = SqliteStore(Path(path))
    for n in range(40):
        store.put_profile(StoredProfile(f"{which}-{n}", bytes(1000), float(n)))
        store.append_event({"which": which, "n": n})
        store.raise_state("tests", 10 * n + which)
        store.set_state(f"serving-{which}", str(n))
        assert len(store.events(5)) <= 5


def test_two_processes_share_one_file(tmp_path: Path) -> None:
    """Two middlewares with one store: every write of both is there, and what only grows has the largest of both."""
    path = tmp_path / "h.db"
    store = SqliteStore(path)
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write, args=(str(path), which)) for which in (1, 2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    assert len(store.profiles()) == 80
    events = store.events(200)
    assert sorted((e["which"], e["n"]) for e in events) == [(which, n) for which in (1, 2) for n in range(40)]
    assert store.get_state("tests") == "392"
    assert [store.get_state(f"serving-{which}") for which in (1, 2)] == ["39", "39"]


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
