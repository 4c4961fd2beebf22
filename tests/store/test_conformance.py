"""What each store does, whatever it is kept in: owned by one process, read as a whole, written commit by commit."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.stores import KEPT, KINDS, Opener, opener

from hemostat.store.protocol import (
    MAX_EVENTS,
    AppendEvent,
    DeleteProfile,
    ExclusionLost,
    Head,
    PutBlob,
    PutProfile,
    SetState,
    Snapshot,
    Store,
    StoreConflict,
    StoredProfile,
    StoreFailure,
)


@pytest.fixture
def open_one(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Opener]:
    """Of a new store; `request.param` is its kind. What was opened is closed."""
    opened: list[Store] = []
    open_another = opener(request.param, tmp_path)

    def open_one() -> Store:
        opened.append(open_another())
        return opened[-1]

    yield open_one
    for store in opened:
        store.close()


@pytest.fixture
def store(open_one: Opener) -> Store:
    """Owned, and empty."""
    store = open_one()
    assert store.acquire()
    return store


each_store = pytest.mark.parametrize("open_one", KINDS, indirect=True)
each_kept_store = pytest.mark.parametrize("open_one", KEPT, indirect=True)


@each_store
def test_a_new_store_holds_nothing(store: Store) -> None:
    assert store.read() == Snapshot()
    assert store.head() == Head(0, "")
    store.verify()


@each_store
def test_a_commit_is_read_back_whole(store: Store) -> None:
    event = {"n": 1, "why": "κ\n\x00", "evidence": {"lower": 0.1, "none": None}}
    old, new = StoredProfile("a", b"\x001", 1.5), StoredProfile("b", b"2", 2.0)
    writes = [
        PutProfile(old),
        PutProfile(new),
        AppendEvent(event),
        AppendEvent({"n": 2}),
        SetState("kinds", "κ"),
        SetState("mode", ""),
        PutBlob("learner", b"\x00learned"),
        PutBlob("empty", b""),
    ]
    assert store.commit(writes, 0, "first") == 1
    assert store.read() == Snapshot(
        Head(1, "first"),
        {"kinds": "κ", "mode": ""},
        [{"n": 2}, event],
        [new, old],
        {"learner": b"\x00learned", "empty": b""},
    )


@each_store
def test_later_writes_of_a_commit_replace_earlier_ones(store: Store) -> None:
    store.commit([SetState("a", "1"), SetState("b", "1"), PutProfile(StoredProfile("p", b"1", 1.0))], 0, "1")
    writes = [
        SetState("a", "2"),
        SetState("b", None),
        SetState("absent", None),
        DeleteProfile("p"),
        DeleteProfile("absent"),
        PutProfile(StoredProfile("q", b"1", 1.0)),
        PutProfile(StoredProfile("q", b"2", 2.0)),
        PutBlob("blob", b"1"),
        PutBlob("blob", b"2"),
    ]
    store.commit(writes, 1, "2")
    result = store.read()
    assert result.states == {"a": "2"}
    assert result.profiles == [StoredProfile("q", b"2", 2.0)]
    assert result.blobs == {"blob": b"2"}


@each_store
def test_a_commit_without_writes_counts(store: Store) -> None:
    assert store.commit([], 0, "1") == 1
    assert store.head() == Head(1, "1")


@each_store
def test_the_newest_events_are_kept(store: Store) -> None:
    store.commit([AppendEvent({"n": n}) for n in range(MAX_EVENTS - 1)], 0, "1")
    store.commit([AppendEvent({"n": n}) for n in range(MAX_EVENTS - 1, MAX_EVENTS + 3)], 1, "2")
    events = store.read().events
    assert len(events) == MAX_EVENTS
    assert (events[0], events[-1]) == ({"n": MAX_EVENTS + 2}, {"n": 3})


@each_store
def test_a_large_blob_comes_back_whole(store: Store) -> None:
    data = os.urandom(1 << 20) * 16
    store.commit([PutBlob("large", data)], 0, "1")
    assert store.read().blobs["large"] == data


@each_store
def test_a_commit_that_is_repeated_happens_once(store: Store) -> None:
    store.commit([AppendEvent({"n": 1})], 0, "1")
    for _ in range(2):
        assert store.commit([AppendEvent({"n": 2})], 1, "2") == 2
    assert store.head() == Head(2, "2")
    assert store.read().events == [{"n": 2}, {"n": 1}]


@each_store
def test_a_commit_that_was_delayed_beyond_a_later_one_is_refused(store: Store) -> None:
    store.commit([SetState("a", "1")], 0, "1")
    store.commit([SetState("a", "2")], 1, "2")
    with pytest.raises(StoreConflict):
        store.commit([SetState("a", "1")], 0, "1")
    assert store.read() == Snapshot(Head(2, "2"), {"a": "2"})


@each_store
@pytest.mark.parametrize("expected", [0, 2, 7])
def test_a_commit_on_another_revision_is_refused(store: Store, expected: int) -> None:
    store.commit([SetState("a", "1")], 0, "1")
    with pytest.raises(StoreConflict):
        store.commit([SetState("a", "2")], expected, "x")
    assert store.read() == Snapshot(Head(1, "1"), {"a": "1"})
    assert store.commit([SetState("a", "2")], 1, "2") == 2


@each_store
def test_a_write_that_cannot_be_made_undoes_its_commit(store: Store) -> None:
    store.commit([SetState("a", "1")], 0, "1")
    unusable = AppendEvent({"n": object()})
    if store.__class__.__name__ != "MemoryStore":
        with pytest.raises(StoreFailure):
            store.commit([SetState("a", "2"), unusable], 1, "2")
    assert store.head() == Head(1, "1")
    assert store.read().states == {"a": "1"}
    assert store.commit([SetState("a", "3")], 1, "3") == 2


@each_kept_store
def test_what_was_committed_outlasts_its_owner(open_one: Opener) -> None:
    first = open_one()
    assert first.acquire()
    first.commit([SetState("a", "1")], 0, "1")
    first.close()
    second = open_one()
    assert second.acquire()
    assert second.read().states == {"a": "1"}
    assert second.commit([SetState("a", "2")], 1, "2") == 2


@each_kept_store
def test_one_owns_it_and_the_other_may_read(open_one: Opener) -> None:
    owner, other = open_one(), open_one()
    assert owner.acquire()
    assert owner.acquire()
    assert not other.acquire()
    assert other.read() == Snapshot()
    owner.commit([SetState("a", "1")], 0, "1")
    assert other.read().states == {"a": "1"}
    assert other.head() == Head(1, "1")
    with pytest.raises(ExclusionLost):
        other.commit([SetState("a", "2")], 1, "2")
    with pytest.raises(ExclusionLost):
        other.verify()
    owner.commit([SetState("a", "3")], 1, "3")
    owner.close()
    assert other.acquire()
    assert other.commit([SetState("a", "4")], 2, "4") == 3


@each_kept_store
def test_a_former_owner_writes_nothing(open_one: Opener) -> None:
    former, owner = open_one(), open_one()
    assert former.acquire()
    former.commit([SetState("a", "1")], 0, "1")
    former.close()
    assert owner.acquire()
    owner.commit([SetState("a", "2")], 1, "2")
    with pytest.raises(StoreFailure):
        former.commit([SetState("a", "1")], 1, "x")
    assert owner.read().states == {"a": "2"}
    owner.close()
    assert former.acquire()
    with pytest.raises(StoreConflict):
        former.commit([SetState("a", "1")], 1, "x")
    assert former.head() == Head(2, "2")


def test_a_killed_process_owns_nothing(tmp_path: Path) -> None:
    path = tmp_path / "hemostat.db"
    program = f"""
from pathlib import Path
from hemostat.store.sqlite import SqliteStore
store = SqliteStore(Path({str(path)!r}))
print(store.acquire(), flush=True)
input()
"""
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"True\n"
        store = opener("sqlite", tmp_path)()
        assert not store.acquire()
        process.kill()
        process.wait()
    assert store.acquire()
    store.close()
