"""The PostgreSQL store: its session ends, its server is away, restored or old, its address is wrong or a pooler's."""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg
import pytest
from tests.support import postgres
from tests.support.certificates import certificate
from tests.support.cut import cut
from tests.support.postgres import ESCAPED, PASSWORD, Postgres

from hemostat.store import postgres as store_module
from hemostat.store import postgres_session as session_module
from hemostat.store.postgres import PostgresStore
from hemostat.store.postgres_session import PostgresSession
from hemostat.store.protocol import (
    SCHEMA,
    VERIFY_SECONDS,
    AppendEvent,
    ExclusionLost,
    Head,
    SetState,
    Snapshot,
    StoreAccessDenied,
    StoreConflict,
    StoreFailure,
    StoreIncompatible,
    StoreUnreachable,
)

Opener = Callable[[str], PostgresStore]


@pytest.fixture
def server() -> Postgres:
    return postgres.shared()


@pytest.fixture
def database(server: Postgres) -> str:
    return server.new_database()


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> list[PostgresSession]:
    """The sessions that stores begin, in order."""
    begun: list[PostgresSession] = []

    def begin(*given: Any) -> PostgresSession:
        begun.append(PostgresSession(*given))
        return begun[-1]

    monkeypatch.setattr(store_module, "PostgresSession", begin)
    return begun


@pytest.fixture
def opened(sessions: list[PostgresSession]) -> Iterator[Opener]:
    """A store at an address. What was opened is closed."""
    stores: list[PostgresStore] = []

    def open_at(url: str) -> PostgresStore:
        stores.append(PostgresStore(url))
        return stores[-1]

    yield open_at
    for each in stores:
        each.close()


@pytest.fixture
def store(server: Postgres, database: str, opened: Opener) -> PostgresStore:
    """Owned, at revision 1."""
    made = opened(server.url(database))
    assert made.acquire()
    made.commit([SetState("a", "1")], 0, "1")
    return made


def end_sessions(server: Postgres, database: str) -> None:
    query = f"SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = '{database}'"
    assert all(ended for (ended,) in server.execute(query))


# Its session


def test_an_owner_finds_out_before_another_one_can_own_it() -> None:
    assert VERIFY_SECONDS + session_module.EXCHANGE_SECONDS < session_module.IDLE_SECONDS
    assert session_module.STATEMENT_SECONDS < session_module.EXCHANGE_SECONDS


def test_an_owner_without_its_session_writes_nothing(
    server: Postgres, database: str, store: PostgresStore, opened: Opener
) -> None:
    end_sessions(server, database)
    other = opened(server.url(database))
    assert other.acquire()
    with pytest.raises(ExclusionLost, match="terminating connection due to administrator command"):
        store.verify()
    for call in (store.verify, lambda: store.commit([], 1, "2")):
        with pytest.raises(ExclusionLost, match="does not own it"):
            call()
    assert not store.acquire()
    assert store.head() == Head(1, "1")
    other.commit([SetState("a", "other")], 1, "2")
    other.close()
    assert store.acquire()
    with pytest.raises(StoreConflict):
        store.commit([SetState("a", "2")], 1, "x")


def test_a_lock_that_was_released_in_its_session_is_noticed_in_the_commit(
    server: Postgres, database: str, store: PostgresStore, sessions: list[PostgresSession], opened: Opener
) -> None:
    """As a pooler does that gives the session to somebody else, and resets it."""
    sessions[-1].run("DISCARD ALL")
    other = opened(server.url(database))
    assert other.acquire()
    with pytest.raises(ExclusionLost, match="does not hold the lock"):
        store.commit([SetState("a", "2")], 1, "2")
    assert other.read() == Snapshot(Head(1, "1"), {"a": "1"})


@pytest.mark.parametrize("executed", [False, True])
def test_a_commit_whose_answer_was_lost_happens_once(
    server: Postgres, database: str, opened: Opener, executed: bool
) -> None:
    writes = [AppendEvent({"n": 1}), SetState("a", "1")]
    with cut(server.port) as line:
        store = opened(server.url(database, port=str(line.port)))
        assert store.acquire()
        line.arm(b"COMMIT", executed=executed)
        with pytest.raises(ExclusionLost, match="closed the connection"):
            store.commit(writes, 0, "1")
        while not store.acquire():
            pass  # the server has not noticed yet that the former session has ended
        assert store.head() == (Head(1, "1") if executed else Head())
        assert store.commit(writes, 0, "1") == 1
        assert store.read() == Snapshot(Head(1, "1"), {"a": "1"}, [{"n": 1}])


def test_two_processes_that_begin_at_once(server: Postgres, database: str, opened: Opener) -> None:
    """Both make the tables."""
    stores = [opened(server.url(database)) for _ in range(4)]
    all_started, owns = threading.Barrier(len(stores)), []

    def acquire(postgres_store: PostgresStore) -> None:
        all_started.wait()
        owns.append(postgres_store.acquire())

    threads = [threading.Thread(target=acquire, args=(each,)) for each in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(owns) == [False, False, False, True]


def test_a_commit_is_on_the_disk_also_where_the_user_turned_that_off(
    server: Postgres, database: str, sessions: list[PostgresSession], opened: Opener
) -> None:
    for asked, is_set in (("off", "on"), ("remote_apply", "remote_apply")):
        server.execute(f"ALTER DATABASE {database} SET synchronous_commit = {asked}")
        store = opened(server.url(database))
        store.acquire()
        assert sessions[-1].one("SHOW synchronous_commit") == is_set
        store.close()


# Its server


@pytest.fixture
def unsteady(server: Postgres) -> Iterator[Postgres]:
    """The server, which the test may kill and freeze."""
    yield server
    server.kill()
    server.start()


def test_an_owner_continues_after_its_server_was_killed_and_stopped(unsteady: Postgres, store: PostgresStore) -> None:
    revision = 1
    for end in (unsteady.kill, unsteady.stop):
        revision = store.commit([AppendEvent({"n": revision})], revision, str(revision))
        end()
        with pytest.raises(ExclusionLost):
            store.verify()
        with pytest.raises(StoreUnreachable, match=r"Connection refused$"):
            store.acquire()
        unsteady.start()
        assert store.acquire()
        assert store.head() == Head(revision, str(revision - 1))
    assert store.commit([], revision, "x") == 4
    assert store.read().events == [{"n": 2}, {"n": 1}]


def test_a_failover_that_lost_commits_is_noticed(unsteady: Postgres, store: PostgresStore) -> None:
    unsteady.save()
    with pytest.raises(ExclusionLost):
        store.verify()
    assert store.acquire()
    store.commit([SetState("a", "2")], 1, "2")
    unsteady.fail_over()
    with pytest.raises(ExclusionLost):
        store.verify()
    assert store.acquire()
    assert store.head() == Head(1, "1")
    with pytest.raises(StoreConflict, match="revision 1, not 2"):
        store.commit([SetState("a", "3")], 2, "3")
    assert store.read().states == {"a": "1"}


def test_a_server_that_does_not_answer_ends_the_session(
    unsteady: Postgres, store: PostgresStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "EXCHANGE_SECONDS", 0.2)
    unsteady.freeze()
    with pytest.raises(ExclusionLost, match=r"no answer within 0\.2 s"):
        store.commit([SetState("a", "2")], 1, "2")
    unsteady.thaw()
    monkeypatch.undo()
    while not store.acquire():
        pass
    assert store.head() == Head(1, "1")


def test_a_commit_that_waits_for_a_replica_ends_the_session_and_may_happen_later(
    unsteady: Postgres, store: PostgresStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replicas(setting: str) -> None:
        unsteady.execute(f"ALTER SYSTEM SET synchronous_standby_names = '{setting}'")
        unsteady.execute("SELECT pg_reload_conf()")

    replicas("absent")
    monkeypatch.setattr(session_module, "EXCHANGE_SECONDS", 0.5)
    done = [1]

    def commit_for_ever() -> None:
        while True:  # until the server has read its settings
            done.append(store.commit([SetState("a", str(done[-1]))], done[-1], str(done[-1] + 1)))

    with pytest.raises(ExclusionLost, match=r"no answer within 0\.5 s"):
        commit_for_ever()
    monkeypatch.undo()
    revision = done[-1]
    assert store.head() == Head(revision, str(revision))
    assert not store.acquire(), "its former session waits, and holds the lock"
    replicas("")
    while not store.acquire():
        pass
    assert store.head() == Head(revision + 1, str(revision + 1))
    assert store.commit([SetState("a", "never")], revision, str(revision + 1)) == revision + 1
    assert store.read().states == {"a": str(revision)}


def test_tables_that_were_made_anew_have_another_owner(
    server: Postgres, database: str, store: PostgresStore, opened: Opener
) -> None:
    """As by a backup that is restored while a process owns the store."""
    tables = "hemostat_head, hemostat_states, hemostat_events, hemostat_profiles, hemostat_blobs"
    server.execute(f"DROP TABLE {tables}", database)
    other = opened(server.url(database))
    assert other.acquire()
    for call in (store.verify, lambda: store.commit([], 1, "2")):
        with pytest.raises(ExclusionLost):
            call()
    assert other.read() == Snapshot()


def test_a_locked_table_is_written_later(
    server: Postgres, database: str, store: PostgresStore, sessions: list[PostgresSession]
) -> None:
    sessions[-1].run("SET lock_timeout = 50")
    with server.superuser(database) as other, other.transaction():
        other.execute("LOCK TABLE hemostat_states")
        with pytest.raises(StoreFailure, match="lock timeout") as failed:
            store.commit([SetState("a", "2")], 1, "2")
        assert type(failed.value) is StoreFailure
        store.verify()
    assert store.commit([SetState("a", "2")], 1, "2") == 2


# Its address and rights, one line each


def failure(call: Callable[[], object], kind: type[StoreFailure]) -> str:
    """What it says: one line without the password."""
    with pytest.raises(kind) as failed:
        call()
    text = str(failed.value)
    assert type(failed.value) is kind
    assert "\n" not in text
    assert PASSWORD not in text
    assert ESCAPED not in text
    return text


def test_what_the_server_refuses_is_one_line(server: Postgres, database: str, opened: Opener) -> None:
    refused = {
        server.url("absent"): 'database "absent" does not exist',
        server.url(database, user="absent"): 'password authentication failed for user "absent"',
        server.url(database, password="wr0ng"): 'password authentication failed for user "hemostat"',
    }
    for url, text in refused.items():
        for call in (opened(url).acquire, opened(url).read, opened(url).probe):
            result = failure(call, StoreAccessDenied)
            assert result.startswith(f"store postgresql://***@127.0.0.1:{server.port}…: ")
            assert result.endswith(text)
            assert "wr0ng" not in result
    url = server.url(database, port="1")
    assert failure(opened(url).acquire, StoreUnreachable).endswith("Connection refused")
    tls = f"{server.url(database)}?sslmode=verify-full&sslrootcert=system"
    assert "SSL" in failure(opened(tls).acquire, StoreUnreachable)


def test_a_replica_is_refused_until_it_is_the_primary(unsteady: Postgres, store: PostgresStore, opened: Opener) -> None:
    unsteady.stop()
    unsteady.set_standby()
    unsteady.start()
    with pytest.raises(ExclusionLost):
        store.verify()
    for call in (store.acquire, store.head, store.read, store.probe):
        assert "the server is read-only: it is a replica (name the primary" in failure(call, StoreUnreachable)
    unsteady.execute("SELECT pg_promote()")
    assert store.acquire()
    assert store.commit([SetState("a", "2")], 1, "2") == 2


def test_a_user_that_may_only_read_is_refused(server: Postgres, database: str, opened: Opener) -> None:
    server.execute(f"ALTER DATABASE {database} SET default_transaction_read_only = on")
    store = opened(server.url(database))
    for call in (store.acquire, store.read, store.probe):
        assert "default_transaction_read_only is on for this user or database" in failure(call, StoreUnreachable)


def test_tls_is_as_the_address_asks(unsteady: Postgres, database: str, opened: Opener, tmp_path: Path) -> None:
    made, other = certificate(tmp_path / "ours"), certificate(tmp_path / "others")
    unsteady.stop()
    unsteady.set_certificate(made.cert, made.key)
    unsteady.start(ssl="on")
    url = f"{unsteady.url(database)}?sslmode=verify-full&sslrootcert="
    store = opened(f"{url}{made.cert}")
    assert store.acquire()
    store.commit([SetState("a", "1")], 0, "1")
    assert "certificate verify failed" in failure(opened(f"{url}{other.cert}").acquire, StoreUnreachable)


def test_a_user_without_rights_gets_a_message_which_ones_it_needs(
    server: Postgres, database: str, opened: Opener
) -> None:
    """The schema `public` of a database of somebody else, then the tables of somebody else."""
    url = server.url(server.new_database("postgres"))
    for call in (opened(url).acquire, opened(url).probe):
        result = failure(call, StoreAccessDenied)
        assert "permission denied for schema public; its user has to own the database" in result
    server.execute("CREATE TABLE hemostat_head (schema integer, revision bigint, commit_id text)", database)
    for call in (opened(server.url(database)).read, opened(server.url(database)).probe):
        assert "permission denied for table hemostat_head; its user" in failure(call, StoreAccessDenied)


def test_a_user_that_may_only_read_and_write_the_tables(
    server: Postgres, database: str, store: PostgresStore, opened: Opener
) -> None:
    store.close()
    server.execute(f"CREATE ROLE {database} LOGIN PASSWORD '{PASSWORD}'")
    other = opened(server.url(database, user=database))
    assert "hemostat_head" in failure(other.probe, StoreAccessDenied)
    server.execute(f"GRANT SELECT, INSERT, DELETE ON ALL TABLES IN SCHEMA public TO {database}", database)
    other.probe()
    assert other.acquire()
    assert other.commit([SetState("a", "2"), AppendEvent({"n": 1})], 1, "2") == 2


def test_a_store_of_another_version_is_one_line(
    server: Postgres, database: str, store: PostgresStore, opened: Opener
) -> None:
    server.execute(f"UPDATE hemostat_head SET schema = {SCHEMA + 1}", database)
    other = opened(server.url(database))
    for call in (other.read, other.head, other.probe, lambda: store.commit([], 1, "2")):
        assert f"schema {SCHEMA + 1}, written by a newer hemostat" in failure(call, StoreIncompatible)
    server.execute("ALTER TABLE hemostat_head DROP COLUMN schema", database)
    assert "not a store of this version" in failure(other.read, StoreIncompatible)


def test_a_probe_changes_nothing_beside_an_owner(
    server: Postgres, database: str, store: PostgresStore, opened: Opener
) -> None:
    assert opened(server.url(database)).probe().startswith("PostgreSQL ")
    store.commit([SetState("a", "2")], 1, "2")
    new = server.new_database()
    opened(server.url(new)).probe()
    assert server.execute("SELECT to_regclass('hemostat_head')", new) == [(None,)]


def test_several_hosts_of_which_one_answers(server: Postgres, database: str, opened: Opener) -> None:
    url = server.url(database).replace(f"{server.host}:{server.port}", f"127.0.0.1:1,127.0.0.1:{server.port}")
    assert opened(url).acquire()


def test_each_schema_of_a_database_is_a_store(server: Postgres, database: str, opened: Opener) -> None:
    owners = []
    for name in ("one", "two"):
        server.execute(f"CREATE SCHEMA {name} AUTHORIZATION {postgres.USER}", database)
        owners.append(opened(f"{server.url(database)}?options={quote(f'-c search_path={name}')}"))
        assert owners[-1].acquire()
        owners[-1].commit([SetState("name", name)], 0, name)
    assert [owner.read().states["name"] for owner in owners] == ["one", "two"]


@pytest.mark.parametrize("settings", [{}, {"ignore_startup_parameters": "options"}])
def test_a_pooler_is_refused(server: Postgres, database: str, opened: Opener, settings: dict[str, str]) -> None:
    with postgres.pooler(server, **settings) as address:
        store = opened(f"{address}/{database}")
        for call in (store.acquire, store.read, store.probe):
            assert "a pooler (such as pgbouncer) is between" in failure(call, StoreIncompatible)


@pytest.mark.parametrize("error", [psycopg.OperationalError("the connection is lost"), OSError(24, "no descriptors")])
def test_whichever_statement_of_a_first_start_fails_it_is_a_failure_of_the_store(
    server: Postgres, opened: Opener, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`left` counts down to the statement that fails; where none is left that could, the test ends."""
    run, left = session_module.PostgresSession.run, 0

    def failing(session: session_module.PostgresSession, statement: str, *values: object) -> object:
        nonlocal left
        left -= 1
        if left == 0:
            raise error
        return run(session, statement, *values)

    monkeypatch.setattr(session_module.PostgresSession, "run", failing)
    for number in itertools.count(1):
        store = opened(server.url(server.new_database()))
        left = number
        with contextlib.suppress(StoreFailure):  # and nothing else
            assert store.acquire()
            assert store.read() == Snapshot()
            store.commit([SetState("a", "1"), AppendEvent({"n": 1})], 0, "first")
            store.verify()
            assert store.head() == Head(1, "first")
        store.close()
        if left > 0:
            break
    assert number > 15


def test_the_time_for_which_it_is_certainly_the_owner(server: Postgres, opened: Opener) -> None:
    url = server.url(server.new_database())
    store = opened(url)
    assert store.owned_until == -math.inf
    before = time.monotonic()
    assert store.acquire()
    first = store.owned_until
    assert before < first - store_module.LEASE_SECONDS <= time.monotonic()
    store.verify()
    assert store.owned_until > first, "an answer renews it"
    other = opened(url)
    assert not other.acquire()
    assert other.owned_until == -math.inf
    assert store_module.LEASE_SECONDS < session_module.IDLE_SECONDS, "the server frees the lock only after it"
