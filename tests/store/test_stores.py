"""All stores do the same; the SQLite one survives its file's ends, the Valkey one its server's."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Event
from pathlib import Path
from urllib.parse import quote

import pytest
from tests.support import valkey
from tests.support.valkey import Valkey

from hemostat.store import valkey as valkey_module
from hemostat.store.factory import open_store
from hemostat.store.memory import MemoryStore
from hemostat.store.protocol import MAX_EVENTS, LeaseLost, Store, StoreAccessDenied, StoredProfile, StoreFailure
from hemostat.store.sqlite import SqliteStore
from hemostat.store.valkey import LeaseAnswer, ValkeyStore

KINDS = ["memory", "sqlite", "valkey"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    with valkey.running(tmp_path_factory.mktemp("valkey")) as one:
        yield one


@pytest.fixture
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of a store that is empty; `request.param` is its kind."""
    if request.param == "memory":
        return "memory://"
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/h.db"
    return shared(request.getfixturevalue("server"), tmp_path)


def shared(server: Valkey, tmp_path: Path) -> str:
    """A deployment's part of the server."""
    return f"{server.url}?prefix={quote(f'{tmp_path}:')}"


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    store = open_store(url)
    yield store
    store.close()


each_store = pytest.mark.parametrize("url", KINDS, indirect=True)
each_shared_store = pytest.mark.parametrize("url", KINDS[1:], indirect=True)


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
def test_blobs_are_replaced_whole(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(valkey_module, "CHUNK_BYTES", 1000)
    assert store.get_blob("learner") is None
    for size in (0, 1, 1000, 2500, 10_000, 3):
        data = os.urandom(size)
        store.put_blob("learner", data)
        store.put_blob("other", b"x")
        assert store.get_blob("learner") == data
        assert store.get_blob("other") == b"x"


@each_shared_store
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


def test_what_an_interrupted_write_leaves_on_the_server_expires(
    pair: tuple[ValkeyStore, ValkeyStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = pair
    monkeypatch.setattr(valkey_module, "UNFINISHED_BLOB_SECONDS", 0.2)
    first.acquire_lease(0.01)
    first.put_blob("learner", b"old", as_leader=True)
    time.sleep(0.05)
    assert second.acquire_lease(10.0).leads
    before = first._client.dbsize()
    with pytest.raises(LeaseLost):
        first.put_blob("learner", b"new" * 1000, as_leader=True)
    assert second.get_blob("learner") == b"old"
    while first._client.dbsize() > before:
        time.sleep(0.05)
    second.put_blob("learner", b"newer", as_leader=True)
    assert first.get_blob("learner") == b"newer"
    assert first._client.dbsize() == before


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


@each_shared_store
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


@each_shared_store
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


# --- Valkey ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(server: Valkey, tmp_path: Path) -> Iterator[tuple[ValkeyStore, ValkeyStore]]:
    """Two replicas of one deployment."""
    stores = ValkeyStore(shared(server, tmp_path)), ValkeyStore(shared(server, tmp_path))
    yield stores
    for store in stores:
        store.close()


def test_one_at_a_time_has_the_lease(pair: tuple[ValkeyStore, ValkeyStore]) -> None:
    first, second = pair
    assert first.acquire_lease(30) == LeaseAnswer(True, "", 0)
    assert first.acquire_lease(30) == LeaseAnswer(True, first.replica, 0), "nobody else led in between"
    assert second.acquire_lease(30) == LeaseAnswer(False, first.replica, 0)
    second.release_lease()
    assert first.acquire_lease(0.05).leads
    time.sleep(0.1)
    assert second.acquire_lease(30) == LeaseAnswer(True, first.replica, 0), "it has to read what the other one did"
    assert second.acquire_lease(30) == LeaseAnswer(True, second.replica, 0)
    assert not first.acquire_lease(30).leads
    second.release_lease()
    assert first.acquire_lease(30) == LeaseAnswer(True, second.replica, 0)


def test_who_has_lost_the_lease_writes_nothing(pair: tuple[ValkeyStore, ValkeyStore]) -> None:
    first, second = pair
    first.acquire_lease(30)
    first.as_leader.set_state("serving", "a")
    first.as_leader.raise_state("tests", 3)
    first.release_lease()
    second.acquire_lease(30)
    writes: list[Callable[[], None]] = [
        lambda: first.as_leader.set_state("serving", "b"),
        lambda: first.as_leader.set_state("serving", None),
        lambda: first.as_leader.raise_state("tests", 4),
        lambda: first.as_leader.put_profile(StoredProfile("a", b"", 0.0)),
        lambda: first.as_leader.delete_profile("kept"),
        lambda: first.as_leader.append_event({}),
    ]
    first.put_profile(StoredProfile("kept", b"", 0.0))
    for write in writes:
        with pytest.raises(LeaseLost, match="another replica leads"):
            write()
    assert (second.get_state("serving"), second.get_state("tests")) == ("a", "3")
    assert (list(second.versions()), second.events(9)) == (["kept"], [])
    second.as_leader.set_state("serving", None)
    assert first.get_state("serving") is None


def test_every_write_changes_the_revision(pair: tuple[ValkeyStore, ValkeyStore]) -> None:
    first, second = pair
    first.acquire_lease(30)
    writes: list[Callable[[], None]] = [
        lambda: first.put_profile(StoredProfile("a", b"1", 1.0)),
        lambda: first.append_event({}),
        lambda: first.as_leader.set_state("serving", "x"),
        lambda: first.as_leader.set_state("serving", None),
        lambda: first.as_leader.raise_state("tests", 4),
        lambda: first.delete_profile("a"),
    ]
    for n, write in enumerate(writes):
        assert second.acquire_lease(30).revision == n
        write()
    assert second.acquire_lease(30).revision == len(writes)


def test_orders_are_taken_once_and_answered(pair: tuple[ValkeyStore, ValkeyStore]) -> None:
    first, second = pair
    assert first.take_commands() == []
    second.send_command("1", "promote")
    second.send_command("2", "pin")
    assert first.take_commands() == [("1", "promote"), ("2", "pin")]
    assert first.take_commands() == []
    assert second.take_reply("1") is None
    first.send_reply("1", "done")
    assert second.take_reply("1") == "done"
    assert second.take_reply("1") is None


def test_deployments_on_one_server_are_apart(server: Valkey, tmp_path: Path) -> None:
    one = ValkeyStore(shared(server, tmp_path / "one"))
    other = ValkeyStore(shared(server, tmp_path / "other"))
    one.put_profile(StoredProfile("a", b"1", 1.0))
    one.set_state("serving", "a")
    assert one.acquire_lease(30).leads
    assert other.acquire_lease(30).leads
    assert (other.profiles(), other.get_state("serving")) == ([], None)
    one.close()
    other.close()


def test_a_server_that_crashes_is_a_failure_and_has_everything_when_it_is_back(tmp_path: Path) -> None:
    with valkey.running(tmp_path / "data") as server:
        store = ValkeyStore(server.url)
        store.put_profile(StoredProfile("a", b"1", 1.0))
        store.set_state("serving", "a")
        server.kill()
        with pytest.raises(StoreFailure, match=f"127.0.0.1:{server.port}"):
            store.get_state("serving")
        server.start()
        assert store.get_state("serving") == "a"
        assert store.get_profile("a") == StoredProfile("a", b"1", 1.0)
        # In between nothing was asked: the connection is opened again, and nobody notices.
        server.kill()
        server.start()
        store.set_state("serving", "b")
        assert store.get_state("serving") == "b"
        store.close()


def test_a_server_that_hangs_is_a_failure_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hemostat.store.valkey.RESPONSE_SECONDS", 0.3)
    with valkey.running(tmp_path / "data") as server:
        store = ValkeyStore(server.url)
        store.set_state("serving", "a")
        server.freeze()
        with pytest.raises(StoreFailure):
            store.get_state("serving")
        server.thaw()
        assert store.get_state("serving") == "a"
        store.close()


@pytest.mark.parametrize("given", ["", ":wrong@", "somebody:secret@"])
def test_a_wrong_password_is_said_in_a_line_that_does_not_show_it(given: str, tmp_path: Path) -> None:
    with valkey.running(tmp_path / "data", "secret") as server:
        store = ValkeyStore(f"redis://{given}127.0.0.1:{server.port}/0")
        with pytest.raises(StoreAccessDenied, match=r"store\.url") as raised:
            store.get_state("serving")
        said = str(raised.value)
        assert "\n" not in said
        assert "wrong@" not in said
        assert "secret@" not in said
        right = ValkeyStore(server.url)
        right.set_state("serving", "a")
        assert right.get_state("serving") == "a"
        store.close()
        right.close()


def test_a_damaged_value_is_a_store_failure(pair: tuple[ValkeyStore, ValkeyStore]) -> None:
    store, _ = pair
    store.append_event({})
    store._client.lset(store._key("events"), 0, "no json")
    with pytest.raises(StoreFailure):
        store.events(1)
    store._client.set(store._key("state"), "a string, no hash")
    with pytest.raises(StoreFailure, match="WRONGTYPE"):
        store.get_state("serving")


def test_what_runs_there_is_told(pair: tuple[ValkeyStore, ValkeyStore]) -> None:
    kind, policy = pair[0].probe()
    assert kind.split()[0] in {"valkey", "redis"}
    assert kind.split()[1][0].isdigit()
    assert policy == "", "there is no limit, so nothing is evicted"


@pytest.mark.parametrize("scheme", ["redis", "rediss", "valkey", "valkeys"])
def test_every_name_of_a_server_is_known(scheme: str) -> None:
    store = open_store(f"{scheme}://user:p%40ss@h/2")
    assert isinstance(store, ValkeyStore)
    connection = store._client.connection_pool.make_connection()
    assert (connection.host, connection.port, connection.db, connection.username) == ("h", 6379, 2, "user")
    assert type(connection).__name__ == ("SSLConnection" if scheme in {"rediss", "valkeys"} else "Connection")


@pytest.mark.parametrize(
    "url",
    [
        *("redis://", "redis:///0", "redis://h:0", "redis://h:x", "redis://h/name", "redis://h?no_such_option=1"),
        "redis://h?password=secret",
        # What an unescaped character of the password makes of the address, in the first one of a server "user".
        *("redis://user:123/4#secret@h", "redis://:pa/secret@h", "redis://:secret#x@h", "redis://u:p?x=secret@h"),
        *("sqlite://", "sqlite:///", "sqlite://host/x", "nonsense", "", "http://user:secret@h"),
    ],
)
def test_bad_url_names_the_key(url: str) -> None:
    with pytest.raises(StoreFailure, match=r"store\.url") as raised:
        open_store(url)
    assert "secret" not in str(raised.value)


def test_without_the_client_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "redis", None)
    with pytest.raises(StoreFailure, match=r"hemostat\[valkey\]"):
        open_store("redis://h")
