"""Where profiles, decisions and a little state live: in memory, in one SQLite file, or in a Valkey (Redis) server.

A store that fails raises StoreFailure and nothing else; the control process counts it and goes on with what it holds in
memory (rule 1).

Replicas of one deployment share a Valkey. One of them at a time has the lease: it alone proposes, tests, promotes and
takes back, so that alpha is spent once, and the others serve what the store says (see `replica`). What decides is
written under the lease: the server refuses it from whoever has lost that.

Two middlewares may share one SQLite file, too, but know nothing of each other. Profiles (named by their digest) and
decisions add up; of what serves, and of the mode, the last word of either stands, and is taken up by whichever starts
next. Each tests on its own, so that each has its own alpha; after a restart the larger count of tests holds.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit, urlunsplit

from hemostat_calibration.errors import HemostatError
from hemostat_calibration.profiles.profile import CalibrationProfile

T = TypeVar("T")

MAX_EVENTS = 10_000
"""Oldest decisions are forgotten above this many."""


SERVER_SCHEMES = {"redis": "redis", "rediss": "rediss", "valkey": "redis", "valkeys": "rediss"}
"""Of `store.url`, for a server -> what the client library calls it; rediss and valkeys are TLS."""
PREFIX = "hemostat:"
CONNECT_WITHIN = 2.0
ANSWER_WITHIN = 5.0
"""Seconds; each write and read waits this long at most, in a thread of its own."""
ORDERS_AT_MOST = 100
REPLY_KEPT = 60.0
"""Seconds that the answer to an order waits for whoever gave it."""


class StoreFailure(HemostatError):
    """The store could not be read or written."""


class StoreAway(StoreFailure):
    """The server does not answer; it may later."""


class StoreRefused(StoreFailure):
    """The server does not let us in: the configuration is wrong, and waiting does not help."""


class LeaseLost(StoreFailure):
    """A write of a replica that led, when another one has led since: nothing was written."""


@dataclass(frozen=True, slots=True)
class StoredProfile:
    """A profile's bytes with when it was put, in seconds since the epoch. read: what they hold, if it was read."""

    version: str
    data: bytes
    created: float
    read: CalibrationProfile | None = None


class Store(Protocol):
    """Small and synchronous; the shell calls it off the event loop."""

    def put_profile(self, profile: StoredProfile) -> None: ...

    def get_profile(self, version: str) -> StoredProfile | None: ...

    def profiles(self) -> list[StoredProfile]:
        """Newest first."""

    def delete_profile(self, version: str) -> None:
        """Nothing happens while a state names it: it serves, here or in another middleware with the same store."""

    def append_event(self, event: dict[str, Any]) -> None: ...

    def events(self, limit: int) -> list[dict[str, Any]]:
        """Newest first."""

    def set_state(self, key: str, value: str | None) -> None: ...

    def raise_state(self, key: str, value: int) -> None:
        """Set to `value` a number that only grows: a larger one, of another middleware with the same store, stays."""

    def get_state(self, key: str) -> str | None: ...

    def close(self) -> None: ...


class MemoryStore:
    """Gone with the process."""

    def __init__(self) -> None:
        self._profiles: dict[str, StoredProfile] = {}
        self._events: deque[dict[str, Any]] = deque(maxlen=MAX_EVENTS)
        self._state: dict[str, str] = {}

    def put_profile(self, profile: StoredProfile) -> None:
        self._profiles[profile.version] = profile

    def get_profile(self, version: str) -> StoredProfile | None:
        return self._profiles.get(version)

    def profiles(self) -> list[StoredProfile]:
        return sorted(self._profiles.values(), key=lambda p: p.created, reverse=True)

    def delete_profile(self, version: str) -> None:
        if not any(version in value for value in self._state.values()):
            self._profiles.pop(version, None)

    def append_event(self, event: dict[str, Any]) -> None:
        self._events.append(event)

    def events(self, limit: int) -> list[dict[str, Any]]:
        return list(self._events)[: -limit - 1 : -1]

    def set_state(self, key: str, value: str | None) -> None:
        if value is None:
            self._state.pop(key, None)
        else:
            self._state[key] = value

    def raise_state(self, key: str, value: int) -> None:
        self._state[key] = str(max(value, int(self._state.get(key, 0))))

    def get_state(self, key: str) -> str | None:
        return self._state.get(key)

    def close(self) -> None:
        return


_SCHEMA = """
CREATE TABLE IF NOT EXISTS profiles (version TEXT PRIMARY KEY, data BLOB NOT NULL, created REAL NOT NULL);
CREATE TABLE IF NOT EXISTS events (id INTEGER PRIMARY KEY AUTOINCREMENT, body TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS state (key TEXT PRIMARY KEY, value TEXT NOT NULL);
"""


class SqliteStore:
    """One file. Each call opens its own connection: a file that went away or came back is noticed at once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        if not path.parent.is_dir():
            raise StoreFailure(f"store.url: the folder {path.parent} does not exist; make it or name another")
        self._run(lambda c: None)

    def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        with self._lock:
            try:
                connection = sqlite3.connect(self._path, timeout=5.0)
            except sqlite3.Error as error:
                raise StoreFailure(f"store {self._path}: {error}") from error
            try:
                with connection:
                    connection.executescript(_SCHEMA)
                    return work(connection)
            except (sqlite3.Error, ValueError) as error:  # ValueError: a damaged event is no JSON
                raise StoreFailure(f"store {self._path}: {error}") from error
            finally:
                connection.close()

    def put_profile(self, profile: StoredProfile) -> None:
        row = (profile.version, profile.data, profile.created)
        self._run(lambda c: c.execute("INSERT OR REPLACE INTO profiles VALUES (?, ?, ?)", row))

    def get_profile(self, version: str) -> StoredProfile | None:
        query = "SELECT version, data, created FROM profiles WHERE version = ?"
        row = self._run(lambda c: c.execute(query, (version,)).fetchone())
        return StoredProfile(*row) if row else None

    def profiles(self) -> list[StoredProfile]:
        query = "SELECT version, data, created FROM profiles ORDER BY created DESC"
        return [StoredProfile(*row) for row in self._run(lambda c: c.execute(query).fetchall())]

    def delete_profile(self, version: str) -> None:
        query = (
            "DELETE FROM profiles WHERE version = ? "
            "AND NOT EXISTS (SELECT 1 FROM state WHERE instr(value, profiles.version) > 0)"
        )
        self._run(lambda c: c.execute(query, (version,)))

    def append_event(self, event: dict[str, Any]) -> None:
        def work(c: sqlite3.Connection) -> None:
            c.execute("INSERT INTO events (body) VALUES (?)", (json.dumps(event),))
            c.execute("DELETE FROM events WHERE id <= (SELECT MAX(id) FROM events) - ?", (MAX_EVENTS,))

        self._run(work)

    def events(self, limit: int) -> list[dict[str, Any]]:
        query = "SELECT body FROM events ORDER BY id DESC LIMIT ?"
        return self._run(lambda c: [json.loads(body) for (body,) in c.execute(query, (limit,))])

    def set_state(self, key: str, value: str | None) -> None:
        if value is None:
            self._run(lambda c: c.execute("DELETE FROM state WHERE key = ?", (key,)))
        else:
            self._run(lambda c: c.execute("INSERT OR REPLACE INTO state VALUES (?, ?)", (key, value)))

    def raise_state(self, key: str, value: int) -> None:
        query = (
            "INSERT INTO state VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET "
            "value = CAST(MAX(CAST(value AS INTEGER), CAST(excluded.value AS INTEGER)) AS TEXT)"
        )
        self._run(lambda c: c.execute(query, (key, str(value))))

    def get_state(self, key: str) -> str | None:
        row = self._run(lambda c: c.execute("SELECT value FROM state WHERE key = ?", (key,)).fetchone())
        return str(row[0]) if row else None

    def close(self) -> None:
        return


@dataclass(frozen=True, slots=True)
class Standing:
    """What the server answers to a replica that would lead.

    before: the replica that led before this one (itself, where nobody did in between), "" where the server knows of
    none: it is new, or has lost its data.
    revision: changes with every write.
    """

    leads: bool
    before: str
    revision: int


_WRITE = """
if ARGV[1] ~= '' and redis.call('GET', KEYS[2]) ~= ARGV[1] then return 0 end
redis.call('INCR', KEYS[1])
"""
"""KEYS: revision, who led last, what is written to. ARGV[1]: who must have led last, '' for whoever."""
_SCRIPTS = {
    "put": _WRITE
    + """
redis.call('HSET', KEYS[4], 'data', ARGV[3], 'created', ARGV[4])
redis.call('ZADD', KEYS[3], ARGV[4], ARGV[2])
return 1""",
    "delete": _WRITE
    + """
for _, value in ipairs(redis.call('HVALS', KEYS[5])) do
  if string.find(value, ARGV[2], 1, true) then return 1 end
end
redis.call('ZREM', KEYS[3], ARGV[2])
redis.call('DEL', KEYS[4])
return 1""",
    "event": _WRITE
    + """
redis.call('LPUSH', KEYS[3], ARGV[2])
redis.call('LTRIM', KEYS[3], 0, ARGV[3] - 1)
return 1""",
    "set": _WRITE + "redis.call('HSET', KEYS[3], ARGV[2], ARGV[3]) return 1",
    "unset": _WRITE + "redis.call('HDEL', KEYS[3], ARGV[2]) return 1",
    "raise": _WRITE
    + """
local held = tonumber(redis.call('HGET', KEYS[3], ARGV[2]) or 0)
if tonumber(ARGV[3]) > held then held = tonumber(ARGV[3]) end
redis.call('HSET', KEYS[3], ARGV[2], string.format('%.0f', held))
return 1""",
    # KEYS[3]: the lease. ARGV: who, milliseconds.
    "lead": """
local revision = tonumber(redis.call('GET', KEYS[1]) or 0)
local before = redis.call('GET', KEYS[2]) or ''
local holder = redis.call('GET', KEYS[3])
if holder and holder ~= ARGV[1] then return {0, before, revision} end
redis.call('SET', KEYS[3], ARGV[1], 'PX', ARGV[2])
redis.call('SET', KEYS[2], ARGV[1])
return {1, before, revision}""",
    "resign": "if redis.call('GET', KEYS[3]) == ARGV[1] then redis.call('DEL', KEYS[3]) end return 1",
}


class ValkeyStore:
    """One server, which several replicas may share. It is not asked anything before the first call.

    who: this replica's name. leading: of a write, the replica does it as the one that leads; LeaseLost when another has
    led since.
    """

    def __init__(self, url: str) -> None:
        try:
            import redis  # noqa: PLC0415  an optional extra
            from redis.backoff import NoBackoff  # noqa: PLC0415
            from redis.retry import Retry  # noqa: PLC0415
        except ImportError:
            raise StoreFailure(MISSING_EXTRA) from None
        self._redis = redis
        parts = urlsplit(url)
        query = dict(parse_qsl(parts.query))
        if query.keys() & {"password", "username"}:
            raise StoreFailure("store.url: user and password stand before the host, like redis://user:password@host")
        self._prefix = query.pop("prefix", PREFIX)
        address = urlunsplit((SERVER_SCHEMES[parts.scheme], parts.netloc, parts.path, urlencode(query), ""))
        self._name = without_password(url)
        self.who = secrets.token_hex(8)
        try:
            self._client = redis.Redis.from_url(
                address,
                socket_connect_timeout=CONNECT_WITHIN,
                socket_timeout=ANSWER_WITHIN,
                socket_keepalive=True,
                protocol=2,  # its successor greets with a command that a server without the password calls misuse
                # A connection that the server has closed meanwhile is opened again, once; whatever else fails is ours.
                retry=Retry(NoBackoff(), 1, (redis.ConnectionError,)),
                retry_on_error=[],
            )
            self._client.connection_pool.make_connection()
        except (ValueError, TypeError, redis.RedisError) as error:
            raise StoreFailure(f"store.url: {self._name}: {error}") from None
        self._scripts = {name: self._client.register_script(text) for name, text in _SCRIPTS.items()}

    @contextmanager
    def _asking(self) -> Iterator[Any]:
        """The client; whatever it raises is a StoreFailure."""
        try:
            yield self._client
        except StoreFailure:
            raise
        except (self._redis.AuthenticationError, self._redis.exceptions.NoPermissionError) as error:
            said = str(error).rstrip(".")
            raise StoreRefused(f"store.url: {self._name} refuses user or password ({said})") from None
        except (self._redis.ConnectionError, self._redis.TimeoutError, OSError) as error:
            raise StoreAway(f"store {self._name}: {error}") from None
        except (self._redis.RedisError, ValueError) as error:  # ValueError: a damaged event is no JSON
            raise StoreFailure(f"store {self._name}: {error}") from None

    def _key(self, name: str) -> str:
        return self._prefix + name

    def _run(self, script: str, keys: tuple[str, ...], *args: str | int | bytes) -> Any:
        with self._asking():
            return self._scripts[script](keys=[self._key(key) for key in ("revision", "leader", *keys)], args=args)

    def _write(self, script: str, keys: tuple[str, ...], leading: bool, *args: str | int | bytes) -> None:
        if not self._run(script, keys, self.who if leading else "", *args):
            raise LeaseLost(f"store {self._name}: another replica leads")

    def put_profile(self, profile: StoredProfile, *, leading: bool = False) -> None:
        keys = ("profiles", f"profile:{profile.version}")
        self._write("put", keys, leading, profile.version, profile.data, repr(profile.created))

    def get_profile(self, version: str) -> StoredProfile | None:
        with self._asking() as client:
            data, created = client.hmget(self._key(f"profile:{version}"), ["data", "created"])
            return None if data is None or created is None else StoredProfile(version, data, float(created))

    def versions(self) -> dict[str, float]:
        """Of the profiles, with when they were put, newest first."""
        with self._asking() as client:
            rows = client.zrevrange(self._key("profiles"), 0, -1, withscores=True)
            return {version.decode(): created for version, created in rows}

    def profiles(self) -> list[StoredProfile]:
        found = (self.get_profile(version) for version in self.versions())
        return [profile for profile in found if profile is not None]

    def delete_profile(self, version: str, *, leading: bool = False) -> None:
        self._write("delete", ("profiles", f"profile:{version}", "state"), leading, version)

    def append_event(self, event: dict[str, Any], *, leading: bool = False) -> None:
        self._write("event", ("events",), leading, json.dumps(event), MAX_EVENTS)

    def events(self, limit: int) -> list[dict[str, Any]]:
        with self._asking() as client:
            return [json.loads(body) for body in client.lrange(self._key("events"), 0, limit - 1)]

    def set_state(self, key: str, value: str | None, *, leading: bool = False) -> None:
        if value is None:
            self._write("unset", ("state",), leading, key)
        else:
            self._write("set", ("state",), leading, key, value)

    def raise_state(self, key: str, value: int, *, leading: bool = False) -> None:
        self._write("raise", ("state",), leading, key, value)

    def get_state(self, key: str) -> str | None:
        with self._asking() as client:
            value = client.hget(self._key("state"), key)
            return None if value is None else value.decode()

    def close(self) -> None:
        self._client.close()

    # --- several replicas ------------------------------------------------------------------------------------------

    def lead(self, seconds: float) -> Standing:
        """Take the lease, or keep it, for so long; or learn that another replica has it."""
        leads, before, revision = self._run("lead", ("lease",), self.who, int(1000 * seconds))
        return Standing(bool(leads), before.decode(), revision)

    def resign(self) -> None:
        """Give the lease up, where this replica has it: another one need not wait for its end."""
        self._run("resign", ("lease",), self.who)

    def order(self, name: str, order: str) -> None:
        """Ask whoever leads for something; the oldest of too many orders are forgotten."""
        with self._asking() as client, client.pipeline(transaction=True) as batch:
            batch.rpush(self._key("orders"), json.dumps([name, order]))
            batch.ltrim(self._key("orders"), -ORDERS_AT_MOST, -1)
            batch.pexpire(self._key("orders"), int(1000 * REPLY_KEPT))
            batch.execute()

    def orders(self) -> list[tuple[str, str]]:
        """Take what was asked for: name and order, oldest first."""
        with self._asking() as client, client.pipeline(transaction=True) as batch:
            batch.lrange(self._key("orders"), 0, -1)
            batch.delete(self._key("orders"))
            return [(name, order) for name, order in map(json.loads, batch.execute()[0])]

    def reply(self, name: str, answer: str) -> None:
        with self._asking() as client:
            client.set(self._key(f"reply:{name}"), answer, px=int(1000 * REPLY_KEPT))

    def reply_to(self, name: str) -> str | None:
        with self._asking() as client:
            answer = client.getdel(self._key(f"reply:{name}"))
            return None if answer is None else answer.decode()

    # --- hemostat check --------------------------------------------------------------------------------------------

    def probe(self) -> tuple[str, str]:
        """Write, read and run a script as serving does. What runs there, and its eviction policy ("" if unknown)."""
        name = f"probe:{self.who}"
        with self._asking() as client:
            client.set(self._key(name), self.who, px=10_000)
            if client.getdel(self._key(name)) != self.who.encode():
                raise StoreFailure(f"store {self._name}: what was written is not what is read")
        self.resign()
        with self._asking() as client:
            try:
                info = client.info("server") | client.info("memory")
            except self._redis.ResponseError:
                return "", ""
        kind = info.get("server_name") or "redis"
        number = info.get(f"{kind}_version") or info.get("redis_version", "")
        return f"{kind} {number}", str(info.get("maxmemory_policy", "")) if info.get("maxmemory") else ""


MISSING_EXTRA = "store.url: needs the client of Valkey and Redis: pip install 'hemostat[valkey]'"


def without_password(url: str) -> str:
    """The address of a store as it may be shown."""
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    _, colon, password = user.partition(":")
    return url.replace(f"{colon}{password}{at}{host}", f":***@{host}", 1) if password else url


def open_store(url: str) -> Store:
    """`memory://`, `sqlite:///relative/path`, `sqlite:////absolute/path`, or a server:
    `redis://[user:password@]host[:port][/database][?prefix=…]`; `rediss` for TLS, `valkey` and `valkeys` for the same.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise StoreFailure(f"store.url: not an address ({error}); write it like redis://valkey:6379") from None
    if parts.scheme == "memory":
        return MemoryStore()
    if parts.scheme == "sqlite" and not parts.netloc and parts.path not in ("", "/"):
        return SqliteStore(Path(unquote(parts.path[1:])))
    if parts.scheme in SERVER_SCHEMES and parts.hostname and port != 0:
        if parts.path.strip("/") and not parts.path.strip("/").isdecimal():
            raise StoreFailure(f"store.url: {without_password(url)}: after the host stands the number of a database")
        return ValkeyStore(url)
    shown = without_password(url)
    raise StoreFailure(f"store.url: {shown!r} is none of memory://, sqlite:///path and redis://host:6379")
