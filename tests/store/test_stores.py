"""All stores do the same; the SQLite one survives its file's ends."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time
from collections.abc import Iterator
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from hemostat.store.factory import open_store
from hemostat.store.memory import MemoryStore
from hemostat.store.protocol import MAX_EVENTS, Store, StoredProfile, StoreFailure
from hemostat.store.sqlite import SqliteStore

KINDS = ["memory", "sqlite"]


@pytest.fixture
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of a store that is empty; `request.param` is its kind."""
    if request.param == "memory":
        return "memory://"
    return f"sqlite:///{tmp_path}/h.db"


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    store = open_store(url)
    yield store
    store.close()


each_store = pytest.mark.parametrize("url", KINDS, indirect=True)
each_kept_store = pytest.mark.parametrize("url", KINDS[1:], indirect=True)


@each_store
def test_profiles_events_and_state(store: Store) -> None:
    assert store.get_profile("a") is None
    assert store.profiles() == store.events(5) == []
    store.put_profile(StoredProfile("a", b"1", 1.0))
    store.put_profile(StoredProfile("b", b"2", 2.0))
    store.put_profile(StoredProfile("a", b"1", 3.0))
    assert [p.version for p in store.profiles()] == ["a", "b"]
    store.delete_profile("a")
    assert store.get_profile("a") is None
    assert store.get_profile("b") == StoredProfile("b", b"2", 2.0)
    for n in range(5):
        store.append_event({"n": n, "why": "κ\n\x00", "evidence": {"lower": 0.1, "none": None}})
    assert [e["n"] for e in store.events(3)] == [4, 3, 2]
    assert store.events(1) == [{"n": 4, "why": "κ\n\x00", "evidence": {"lower": 0.1, "none": None}}]
    assert store.get_state("serving") is None
    store.set_state("serving", "b")
    assert store.get_state("serving") == "b"
    store.set_state("serving", None)
    assert store.get_state("serving") is None


@each_store
def test_a_number_only_grows(store: Store) -> None:
    for value, kept in ((3, "3"), (10, "10"), (9, "10"), (11, "11"), (2**40, str(2**40))):
        store.raise_state("tests", value)
        assert store.get_state("tests") == kept


@each_store
def test_a_profile_that_a_state_names_stays(store: Store) -> None:
    version = "a" * 32
    store.put_profile(StoredProfile(version, b"1", 1.0))
    store.set_state("serving", f'{{"selected": ["{version}", 3]}}')
    store.delete_profile(version)
    assert store.get_profile(version) is not None
    store.set_state("serving", None)
    store.delete_profile(version)
    assert store.get_profile(version) is None
    assert store.profiles() == []


@each_store
def test_a_large_profile_comes_back_whole(store: Store) -> None:
    data = os.urandom(1 << 20) * 16
    store.put_profile(StoredProfile("large", data, 1234567.875))
    assert store.get_profile("large") == StoredProfile("large", data, 1234567.875)


@each_store
def test_blobs_are_replaced_whole(store: Store) -> None:
    assert store.get_blob("learner") is None
    for size in (0, 1, 1000, 2500, 10_000, 3):
        data = os.urandom(size)
        store.put_blob("learner", data)
        store.put_blob("other", b"x")
        assert store.get_blob("learner") == data
        assert store.get_blob("other") == b"x"


@each_kept_store
def test_a_killed_write_leaves_the_old_blob(url: str) -> None:
    store = open_store(url)
    old = os.urandom(1000)
    store.put_blob("learner", old)
    context = multiprocessing.get_context("spawn")
    for pause in (0.01, 0.05):
        written = context.Event()
        process = context.Process(target=write_blobs, args=(url, written))
        process.start()
        assert written.wait(120)
        time.sleep(pause)
        process.kill()
        process.join()
        found = store.get_blob("learner")
        assert found is not None
        assert len(found) == 20_000_000
        assert found == found[:1] * len(found)
        store.put_blob("learner", old)


def write_blobs(url: str, written: Event) -> None:
    store = open_store(url)
    for n in itertools.count():
        store.put_blob("learner", bytes([n % 256]) * 20_000_000)
        written.set()


@each_store
def test_events_are_bounded(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    if isinstance(store, MemoryStore):
        for n in range(MAX_EVENTS + 10):
            store.append_event({"n": n})
        assert len(store.events(2 * MAX_EVENTS)) == MAX_EVENTS
        return
    monkeypatch.setattr("hemostat.store.protocol.MAX_EVENTS", 5)
    for n in range(8):
        store.append_event({"n": n})
    assert [e["n"] for e in store.events(100)] == [7, 6, 5, 4, 3]


@each_kept_store
def test_it_keeps_across_reopening(url: str) -> None:
    open_store(url).put_profile(StoredProfile("a", b"1", 1.0))
    assert open_store(url).get_profile("a") == StoredProfile("a", b"1", 1.0)


def _write(url: str, which: int) -> None:
    store = open_store(url)
    for n in range(40):
        store.put_profile(StoredProfile(f"{which}-{n}", bytes(1000), float(n)))
        store.append_event({"which": which, "n": n})
        store.raise_state("tests", 10 * n + which)
        store.set_state(f"serving-{which}", str(n))
        assert len(store.events(5)) <= 5


@each_kept_store
def test_two_processes_share_it(url: str) -> None:
    """Two middlewares with one store: every write of both is there, and what only grows has the largest of both."""
    store = open_store(url)
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write, args=(url, which)) for which in (1, 2)]
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


# --- SQLite ---------------------------------------------------------------------------------------------------------


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


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreFailure, match="nowhere"):
        open_store(f"sqlite:///{tmp_path}/nowhere/h.db")


@pytest.mark.parametrize(
    "url",
    [
        *("redis://h", "redis://:secret@h", "redis://[secret@h"),
        *("sqlite://", "sqlite:///", "sqlite://host/x", "nonsense", "", "http://user:secret@h"),
    ],
)
def test_bad_url_names_the_key(url: str) -> None:
    with pytest.raises(StoreFailure, match=r"store\.url") as raised:
        open_store(url)
    assert "secret" not in str(raised.value)
