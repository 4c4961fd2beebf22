"""A store in a PostgreSQL database. Several processes may have its address; one of them owns it.

Who owns it holds an advisory lock, named by the table `hemostat_head`, in the one session in which it also writes. The
server releases the lock when the session ends, and only then: no transaction of that session can follow. Each commit
verifies in its own transaction that its session holds the lock, so that a pooler, which would give each transaction
another session, cannot let two processes write.

A session ends within IDLE_SECONDS after its process or host is gone, by settings that the session itself carries. A
process that lives but has lost its server finds out before that: it verifies every VERIFY_SECONDS, and an exchange that
takes EXCHANGE_SECONDS ends the session. So LEASE_SECONDS, VERIFY_SECONDS + EXCHANGE_SECONDS, are < IDLE_SECONDS.
Whatever else keeps a process from verifying in time, LEASE_SECONDS after it has sent the last statement that was
answered it does not count as the owner any more (`owned_until`).

Advisory locks are not replicated: docs/postgresql.md says what a failover to a replica can lose.
"""

from __future__ import annotations

import contextlib
import json
import math
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from hemostat.config.store_url import postgres_parameters
from hemostat.store import postgres_session, protocol
from hemostat.store.postgres_session import PostgresSession, session_settings
from hemostat.store.protocol import (
    SCHEMA,
    AppendEvent,
    BlobKey,
    DeleteProfile,
    ExclusionLost,
    Head,
    PutBlob,
    PutProfile,
    SetState,
    Snapshot,
    StoreAccessDenied,
    StoredProfile,
    StoreFailure,
    StoreIncompatible,
    StoreUnreachable,
    Write,
    has_happened,
    require_schema,
)
from hemostat_calibration.messages import in_words, shown_address

LEASE_SECONDS = protocol.VERIFY_SECONDS + postgres_session.EXCHANGE_SECONDS
"""The seconds, counted from when an answered statement was sent, for which the session, and with it the lock, was
certainly there."""
CHUNK_BYTES = 4 * 1024 * 1024
"""The size of one chunk of a blob: each chunk is an exchange of its own."""

_TABLES = (
    "hemostat_head (schema integer NOT NULL, revision bigint NOT NULL, commit_id text NOT NULL)",
    "hemostat_states (key text PRIMARY KEY, value text NOT NULL)",
    "hemostat_events (id bigint PRIMARY KEY, body text NOT NULL)",
    "hemostat_profiles (version text PRIMARY KEY, data bytea NOT NULL, created double precision NOT NULL)",
    "hemostat_blobs (key text, part integer, data bytea NOT NULL, PRIMARY KEY (key, part))",
)
_IS_NEW = "SELECT to_regclass('hemostat_head') IS NULL"
_LOCK_CLASS = 0x48454D4F
"""The upper half of the lock's number. The lower one is the number of the table `hemostat_head`, so that tables that
were restored in place of these have another lock."""
_TRY_LOCK = f"SELECT pg_try_advisory_lock(({_LOCK_CLASS}::bigint << 32) | to_regclass('hemostat_head')::oid::bigint)"
"""The statement that tries to take the lock; it gives NULL if there is no such table."""
_OWNS = f"""SELECT EXISTS (
    SELECT FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid() AND objsubid = 1
    AND classid = {_LOCK_CLASS} AND objid = to_regclass('hemostat_head')::oid
    AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))"""  # noqa: S608  of constants

_DURABLE = "SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'"
"""A commit that was answered is on the disk. Where more than that is set, it stays."""

_REFUSALS = ("authentication failed", "no password supplied", "no pg_hba.conf entry", "does not exist", "denied for")
"""The parts of what the server says when it does not begin a session for this user and database."""
_POOLER = (
    "a pooler (such as pgbouncer) is between, which may give each transaction another session, where the lock is not "
    "held: name the PostgreSQL server itself in store.url"
)
_READ_ONLY = (
    "the server is read-only: it is a replica (name the primary in store.url, or all of them with commas between), or "
    "default_transaction_read_only is on for this user or database (set it off)"
)
"""The replica may become the primary: this is tried again."""
_GRANTS = "its user has to own the database, or the schema and the tables hemostat_… in it (docs/postgresql.md)"


class PostgresStore:
    """Implements `protocol.Store`. The server is not contacted before the first call."""

    def __init__(self, url: str) -> None:
        try:
            given = postgres_parameters(url)
        except ValueError as error:
            raise StoreFailure(f"store.url: {error}") from None
        import psycopg  # noqa: PLC0415  an optional extra

        self._psycopg = psycopg
        self._shown = shown_address(url)
        self._given = session_settings(given)
        self._calls = threading.Lock()
        self._session: PostgresSession | None = None
        self._owns = False
        """It is True if the session holds the lock, as far as this process knows."""

    @property
    def owned_until(self) -> float:
        session = self._session
        return session.answered + LEASE_SECONDS if self._owns and session is not None else -math.inf

    def acquire(self) -> bool:
        with self._calls:
            if not self._owns:
                held = self._try_lock()
                if held is None:
                    with self._transaction("READ WRITE") as session:
                        _create_tables(session)
                    held = self._try_lock()
                self._owns = bool(held)
            return self._owns

    def _try_lock(self) -> bool | None:
        """Tries to take the lock, and returns True if it did. Returns None if there are no tables yet."""
        with self._translated() as session:
            held: bool | None = session.one(_TRY_LOCK)
            return held

    def verify(self) -> None:
        with self._calls:
            self._require_owner()
            with self._translated() as session:
                self._require_lock(session)

    def head(self) -> Head:
        with self._calls, self._translated() as session:
            return self._head(session)

    def read(self) -> Snapshot:
        with self._calls, self._transaction("ISOLATION LEVEL REPEATABLE READ, READ ONLY") as session:
            head = self._head(session)
            if head.revision == 0:
                return Snapshot()
            states = dict(session.rows("SELECT key, value FROM hemostat_states"))
            events = [json.loads(body) for (body,) in session.rows("SELECT body FROM hemostat_events ORDER BY id DESC")]
            versions = session.rows("SELECT version FROM hemostat_profiles ORDER BY created DESC")
            profile = "SELECT version, data, created FROM hemostat_profiles WHERE version = %s"
            profiles = [StoredProfile(*session.rows(profile, version)[0]) for (version,) in versions]
            blobs: dict[BlobKey, bytearray] = {}
            chunk = "SELECT data FROM hemostat_blobs WHERE key = %s AND part = %s"
            for key, part in session.rows("SELECT key, part FROM hemostat_blobs ORDER BY key, part"):
                blobs.setdefault(key, bytearray()).extend(session.one(chunk, key, part))
            return Snapshot(head, states, events, profiles, {key: bytes(data) for key, data in blobs.items()})

    def commit(self, writes: Sequence[Write], expected: int, commit_id: str) -> int:
        with self._calls:
            self._require_owner()
            with self._transaction("READ WRITE") as session:
                self._require_lock(session)
                if not has_happened(self._head(session), expected, commit_id, self._shown):
                    for write in writes:
                        _execute(session, write)
                    _append(session, [write.event for write in writes if isinstance(write, AppendEvent)])
                    session.run("DELETE FROM hemostat_head")
                    session.run("INSERT INTO hemostat_head VALUES (%s, %s, %s)", SCHEMA, expected + 1, commit_id)
            return expected + 1

    def probe(self) -> str:
        """Tries all that the owner does, also while another process is the owner, and undoes it. Returns the server's
        name and version.
        """
        with self._calls, self._transaction("READ WRITE", keep=False) as session:
            self._head(session)
            _create_tables(session)
            for name in (table.partition(" ")[0] for table in _TABLES):
                session.run(f"INSERT INTO {name} SELECT * FROM {name} WHERE false")  # noqa: S608  a constant
                session.run(f"DELETE FROM {name} WHERE false")  # noqa: S608  the same
            return f"PostgreSQL {session.version}"

    def close(self) -> None:
        with self._calls:
            if self._owns and self._session is not None:
                with contextlib.suppress(self._psycopg.Error, OSError, RuntimeError):
                    self._session.run(
                        "SELECT pg_advisory_unlock_all()"
                    )  # the server would notice the end a moment later
            self._disconnect()

    def _require_owner(self) -> None:
        if not self._owns:
            raise ExclusionLost(f"store {self._shown}: this process does not own it")

    def _require_lock(self, session: PostgresSession) -> None:
        if not session.one(_OWNS):
            self._disconnect()
            raise ExclusionLost(f"store {self._shown}: the session does not hold the lock, or the tables were replaced")

    def _head(self, session: PostgresSession) -> Head:
        """Raises StoreIncompatible."""
        if session.one(_IS_NEW):
            return Head()
        rows = session.rows("SELECT schema, revision, commit_id FROM hemostat_head")
        if not rows:
            return Head()
        schema, revision, commit_id = rows[0]
        require_schema(schema, self._shown)
        return Head(revision, commit_id, schema)

    @contextlib.contextmanager
    def _transaction(self, mode: str, *, keep: bool = True) -> Iterator[PostgresSession]:
        """Makes a transaction, which is committed at the end; undone after an exception, or where it is not to be kept.
        Raises StoreFailure."""
        with self._translated() as session:
            session.run(f"BEGIN {mode}")
            yield session
            session.run("COMMIT" if keep else "ROLLBACK")

    @contextlib.contextmanager
    def _translated(self) -> Iterator[PostgresSession]:
        """Gives the session, which is begun if there is none. What fails in it is undone, and raised as
        StoreFailure."""
        owned = self._owns
        try:
            yield self._connect()
        # ValueError, TypeError: what is stored is damaged, or cannot be stored. OSError, RuntimeError: no file
        # descriptor, or no thread, is free.
        except (self._psycopg.Error, ValueError, TypeError, OSError, RuntimeError) as error:
            text = self._in_words(error)
            if self._undo():
                raise self._failure(error, text) from error
            raise (ExclusionLost if owned else StoreUnreachable)(f"store {self._shown}: {text}") from error
        except BaseException:
            self._undo()
            raise

    def _undo(self) -> bool:
        """Undoes the transaction, and returns True if the session goes on."""
        try:
            if self._session is not None:
                self._session.undo()
                return True
        except self._psycopg.Error:
            self._disconnect()
        return False

    def _in_words(self, error: Exception) -> str:
        if self._session is not None and self._session.timed_out:
            return f"no answer within {postgres_session.EXCHANGE_SECONDS:g} s"
        text = getattr(getattr(error, "diag", None), "message_primary", None)
        return text or in_words(error).removeprefix("connection failed: ").partition(" Is the server running")[0]

    def _failure(self, error: Exception, text: str) -> StoreFailure:
        """Returns the failure for a statement that was refused in a session that goes on."""
        state = getattr(error, "sqlstate", None)
        if state in {"42501", "3F000"}:  # insufficient_privilege, invalid_schema_name
            return StoreAccessDenied(f"store {self._shown}: {text}; {_GRANTS}")
        if state in {"42P01", "42703"}:  # undefined_table, undefined_column
            return StoreIncompatible(f"store {self._shown}: not a store of this version of hemostat ({text})")
        return StoreFailure(f"store {self._shown}: {text}")

    def _connect(self) -> PostgresSession:
        if self._session is None:
            try:
                self._session = PostgresSession(self._psycopg, self._given)
            except self._psycopg.Error as error:
                raise self._refusal(self._in_words(error)) from error
            if self._session.one("SELECT pg_backend_pid()") != self._session.backend:
                self._disconnect()
                raise StoreIncompatible(f"store {self._shown}: {_POOLER}")
            self._session.run(_DURABLE)
        return self._session

    def _refusal(self, text: str) -> StoreFailure:
        """Returns the failure for a session that did not begin. The server's words are all there is: libpq has no
        code.
        """
        if "unsupported startup parameter" in text:
            return StoreIncompatible(f"store {self._shown}: {_POOLER}")
        if "unrecognized configuration parameter" in text:
            return StoreIncompatible(f"store {self._shown}: PostgreSQL 14 or newer is needed ({text})")
        if "session is read-only" in text:
            return StoreUnreachable(f"store {self._shown}: {_READ_ONLY}")
        if any(refusal in text for refusal in _REFUSALS):
            return StoreAccessDenied(f"store {self._shown}: {text}")
        return StoreUnreachable(f"store {self._shown}: {text}")

    def _disconnect(self) -> None:
        """Ends the session: what was not committed is undone, and the lock is released."""
        self._owns = False
        if self._session is not None:
            self._session.close()
            self._session = None


def _create_tables(session: PostgresSession) -> None:
    """Creates the tables that are missing, in a transaction. One process does so at a time: of two that create a table,
    one would fail.
    """
    session.run(f"SELECT pg_advisory_xact_lock({_LOCK_CLASS}::bigint << 32)")
    if session.one(_IS_NEW):
        for table in _TABLES:
            session.run(f"CREATE TABLE IF NOT EXISTS {table}")  # the server's cache may be of before the lock


def _execute(session: PostgresSession, write: Write) -> None:
    match write:
        case PutProfile(profile):
            session.run("DELETE FROM hemostat_profiles WHERE version = %s", profile.version)
            row = (profile.version, profile.data, profile.created)
            session.run("INSERT INTO hemostat_profiles VALUES (%s, %s, %s)", *row)
        case DeleteProfile(version):
            session.run("DELETE FROM hemostat_profiles WHERE version = %s", version)
        case AppendEvent():
            pass  # all of a commit at once, see `_append`
        case SetState(key, value):
            session.run("DELETE FROM hemostat_states WHERE key = %s", key)
            if value is not None:
                session.run("INSERT INTO hemostat_states VALUES (%s, %s)", key, value)
        case PutBlob(key, data):
            session.run("DELETE FROM hemostat_blobs WHERE key = %s", key)
            for part, start in enumerate(range(0, max(1, len(data)), CHUNK_BYTES)):
                chunk = data[start : start + CHUNK_BYTES]
                session.run("INSERT INTO hemostat_blobs VALUES (%s, %s, %s)", key, part, chunk)


def _append(session: PostgresSession, events: Sequence[dict[str, Any]]) -> None:
    if events:
        last = session.one("SELECT coalesce(max(id), 0) FROM hemostat_events")
        bodies = [json.dumps(event) for event in events]
        query = "INSERT INTO hemostat_events SELECT %s + n, body FROM unnest(%s::text[]) WITH ORDINALITY AS e (body, n)"
        session.run(query, last, bodies)
        session.run("DELETE FROM hemostat_events WHERE id <= %s", last + len(events) - protocol.MAX_EVENTS)
