"""A store in a Valkey or Redis server, which several replicas may share.

Replicas of one deployment share one server. One of them at a time has the lease and leads: it alone proposes, tests,
promotes and rolls back, so that alpha is spent once; the others serve what the store says (see `replica`). What the
leader decides is written under the lease: the server refuses the write of a replica that has lost it.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from hemostat.config.store_url import MISSING_EXTRA, UNKNOWN_OPTION, server_address
from hemostat.store import protocol
from hemostat.store.protocol import (
    MAX_ENTRIES,
    LeaseAnswer,
    LeaseLost,
    StoreAccessDenied,
    StoredProfile,
    StoreFailure,
    StoreUnreachable,
    StoreWrites,
)
from hemostat.store.valkey_stream import ValkeyStream
from hemostat_calibration.messages import shown_address

CONNECT_SECONDS = 2.0
RESPONSE_SECONDS = 5.0
"""Longest wait of one read or write; each runs in a thread."""
MAX_COMMANDS = 100
"""Commands for the leader that wait in the store; the oldest are deleted beyond that."""
CHUNK_BYTES = 8 * 1024 * 1024
"""Of a blob, written and read at a time: each has to pass within RESPONSE_SECONDS."""
UNFINISHED_BLOB_SECONDS = 600.0
"""After this time the server deletes the chunks of a blob whose write was interrupted."""
REPLY_SECONDS = 60.0
"""How long commands and replies to them stay in the store."""


_WRITE = """
if ARGV[1] ~= '' and redis.call('GET', KEYS[2]) ~= ARGV[1] then return 0 end
redis.call('INCR', KEYS[1])
"""
"""KEYS: revision, last leader, then what is written to. ARGV[1]: the replica that must have led last, '' for any."""
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
    # ARGV: replica, the number of states to set, their names and values, names of states to delete.
    "set": _WRITE
    + """
local last = 2 + 2 * tonumber(ARGV[2])
for i = 3, last, 2 do redis.call('HSET', KEYS[3], ARGV[i], ARGV[i + 1]) end
for i = last + 1, #ARGV do redis.call('HDEL', KEYS[3], ARGV[i]) end
return 1""",
    "raise": _WRITE
    + """
local held = tonumber(redis.call('HGET', KEYS[3], ARGV[2]) or 0)
if tonumber(ARGV[3]) > held then held = tonumber(ARGV[3]) end
redis.call('HSET', KEYS[3], ARGV[2], string.format('%.0f', held))
return 1""",
    # KEYS[3]: the hash that names the key of a blob's chunks. KEYS[4]: the key of the new chunks. The revision stays as
    # it is: followers do not read blobs.
    "blob": """
if ARGV[1] ~= '' and redis.call('GET', KEYS[2]) ~= ARGV[1] then return 0 end
if redis.call('LLEN', KEYS[4]) ~= tonumber(ARGV[3]) then return -1 end
local before = redis.call('HGET', KEYS[3], 'chunks')
redis.call('PERSIST', KEYS[4])
redis.call('HSET', KEYS[3], 'chunks', KEYS[4], 'bytes', ARGV[2])
if before and before ~= KEYS[4] then redis.call('UNLINK', before) end
return 1""",
    # Returns the value that the state has now.
    "add": """
if redis.call('HSETNX', KEYS[3], ARGV[1], ARGV[2]) == 1 then redis.call('INCR', KEYS[1]) end
return redis.call('HGET', KEYS[3], ARGV[1])""",
    # KEYS[3]: the lease. ARGV: replica, milliseconds. Returns whether it leads, the last leader, the revision.
    "acquire": """
local revision = tonumber(redis.call('GET', KEYS[1]) or 0)
local before = redis.call('GET', KEYS[2]) or ''
local holder = redis.call('GET', KEYS[3])
if holder and holder ~= ARGV[1] then return {0, before, revision} end
redis.call('SET', KEYS[3], ARGV[1], 'PX', ARGV[2])
redis.call('SET', KEYS[2], ARGV[1])
return {1, before, revision}""",
    "release": "if redis.call('GET', KEYS[3]) == ARGV[1] then redis.call('DEL', KEYS[3]) end return 1",
}


class ValkeyStore:
    """Implements `protocol.SharedStore`. The server is not contacted before the first call.

    replica: this replica's own name, random.
    as_leader: writes under the lease; LeaseLost when another replica has led since.
    """

    def __init__(self, url: str) -> None:
        try:
            import redis  # noqa: PLC0415  an optional extra
            from redis.backoff import NoBackoff  # noqa: PLC0415
            from redis.retry import Retry  # noqa: PLC0415
        except ImportError:
            raise StoreFailure(f"store.url: {MISSING_EXTRA}") from None
        self._redis = redis
        try:
            address, self._prefix = server_address(url)
        except ValueError as error:
            raise StoreFailure(f"store.url: {error}") from None
        self._shown_url = shown_address(url)
        self.replica = secrets.token_hex(8)
        self.as_leader: StoreWrites = _LeaderWrites(self)
        try:
            self._client = redis.Redis.from_url(
                address,
                socket_connect_timeout=CONNECT_SECONDS,
                socket_timeout=RESPONSE_SECONDS,
                socket_keepalive=True,
                protocol=2,  # protocol 3 begins with a command that a server without the password rejects as misuse
                # One retry reopens a connection that the server has closed meanwhile; other retries are the caller's.
                retry=Retry(NoBackoff(), 1, (redis.ConnectionError,)),
                retry_on_error=[],
            )
            self._client.connection_pool.make_connection()
        except (ValueError, TypeError, redis.RedisError):  # their texts may have a part of the address
            raise StoreFailure(f"store.url: {self._shown_url}: {UNKNOWN_OPTION}") from None
        self._scripts = {name: self._client.register_script(text) for name, text in _SCRIPTS.items()}

    @contextmanager
    def translated(self) -> Iterator[Any]:
        """The client, its exceptions translated to StoreFailure."""
        try:
            yield self._client
        except StoreFailure:
            raise
        except (self._redis.AuthenticationError, self._redis.exceptions.NoPermissionError) as error:
            reason = str(error).rstrip(".")
            raise StoreAccessDenied(f"store.url: {self._shown_url} refuses user or password ({reason})") from None
        except (self._redis.ConnectionError, self._redis.TimeoutError, OSError) as error:
            raise StoreUnreachable(f"store {self._shown_url}: {error}") from None
        except (self._redis.RedisError, ValueError) as error:  # ValueError: a damaged event is not JSON
            raise StoreFailure(f"store {self._shown_url}: {error}") from None

    def _key(self, name: str) -> str:
        return self._prefix + name

    def _run(self, script: str, keys: tuple[str, ...], *args: str | int | bytes) -> Any:
        with self.translated():
            return self._scripts[script](keys=[self._key(key) for key in ("revision", "leader", *keys)], args=args)

    def _write(self, script: str, keys: tuple[str, ...], as_leader: bool, *args: str | int | bytes) -> None:
        if not self._run(script, keys, self.replica if as_leader else "", *args):
            raise LeaseLost(f"store {self._shown_url}: another replica leads")

    # --- writes ----------------------------------------------------------------------------------------------------

    def put_profile(self, profile: StoredProfile, *, as_leader: bool = False) -> None:
        keys = ("profiles", f"profile:{profile.version}")
        self._write("put", keys, as_leader, profile.version, profile.data, repr(profile.created))

    def delete_profile(self, version: str, *, as_leader: bool = False) -> None:
        self._write("delete", ("profiles", f"profile:{version}", "state"), as_leader, version)

    def append_event(self, event: dict[str, Any], *, as_leader: bool = False) -> None:
        self._write("event", ("events",), as_leader, json.dumps(event), protocol.MAX_EVENTS)

    def set_state(self, key: str, value: str | None, *, as_leader: bool = False) -> None:
        self.set_states({key: value}, as_leader=as_leader)

    def set_states(self, values: Mapping[str, str | None], *, as_leader: bool = False) -> None:
        pairs = [part for key, value in values.items() if value is not None for part in (key, value)]
        deleted = [key for key, value in values.items() if value is None]
        self._write("set", ("state",), as_leader, len(pairs) // 2, *pairs, *deleted)

    def raise_state(self, key: str, value: int, *, as_leader: bool = False) -> None:
        self._write("raise", ("state",), as_leader, key, value)

    def put_blob(self, key: str, data: bytes, *, as_leader: bool = False) -> None:
        """In chunks, under a new name that takes the old one's place at the end. The chunks of an interrupted write
        expire."""
        if len(data) > protocol.MAX_BLOB_BYTES:
            raise StoreFailure(f"store {self._shown_url}: {key} has {len(data)} bytes: too many")
        chunks = f"blob:{key}:{secrets.token_hex(8)}"
        count = 0
        for first in range(0, max(len(data), 1), CHUNK_BYTES):
            with self.translated() as client, client.pipeline(transaction=True) as batch:
                batch.rpush(self._key(chunks), data[first : first + CHUNK_BYTES])
                batch.pexpire(self._key(chunks), int(1000 * UNFINISHED_BLOB_SECONDS))
                batch.execute()
            count += 1
        replica = self.replica if as_leader else ""
        written = self._run("blob", (f"blob:{key}", chunks), replica, len(data), count)
        if written == 0:
            raise LeaseLost(f"store {self._shown_url}: another replica leads")
        if written != 1:
            raise StoreFailure(f"store {self._shown_url}: part of {key} was lost while it was written")

    # --- reads -----------------------------------------------------------------------------------------------------

    def get_profile(self, version: str) -> StoredProfile | None:
        with self.translated() as client:
            data, created = client.hmget(self._key(f"profile:{version}"), ["data", "created"])
            return None if data is None or created is None else StoredProfile(version, data, float(created))

    def get_blob(self, key: str) -> bytes | None:
        with self.translated() as client:
            chunks, size = client.hmget(self._key(f"blob:{key}"), ["chunks", "bytes"])
            if chunks is None or size is None:
                return None
            parts: list[bytes] = []
            while part := client.lindex(chunks, len(parts)):
                parts.append(part)
        data = b"".join(parts)
        if len(data) != int(size):
            raise StoreFailure(f"store {self._shown_url}: {key} is incomplete, or was replaced while it was read")
        return data

    def versions(self) -> dict[str, float]:
        """Version -> Unix seconds at which it was stored; newest first."""
        with self.translated() as client:
            rows = client.zrevrange(self._key("profiles"), 0, -1, withscores=True)
            return {version.decode(): created for version, created in rows}

    def profiles(self) -> list[StoredProfile]:
        found = (self.get_profile(version) for version in self.versions())
        return [profile for profile in found if profile is not None]

    def events(self, limit: int) -> list[dict[str, Any]]:
        with self.translated() as client:
            return [json.loads(body) for body in client.lrange(self._key("events"), 0, limit - 1)]

    def get_state(self, key: str) -> str | None:
        with self.translated() as client:
            value = client.hget(self._key("state"), key)
            return None if value is None else value.decode()

    def add_state(self, key: str, value: str) -> str:
        return str(self._run("add", ("state",), key, value).decode())

    @property
    def shared(self) -> ValkeyStore:
        return self

    def close(self) -> None:
        self._client.close()

    # --- several replicas: the lease, and commands for the leader ----------------------------------------------------

    def acquire_lease(self, seconds: float) -> LeaseAnswer:
        """Take or prolong the lease for `seconds`, unless another replica holds it."""
        leads, previous, revision = self._run("acquire", ("lease",), self.replica, int(1000 * seconds))
        return LeaseAnswer(bool(leads), previous.decode(), revision)

    def release_lease(self) -> None:
        """Give the lease up, where this replica holds it, so that another replica can lead before it expires."""
        self._run("release", ("lease",), self.replica)

    def send_command(self, name: str, command: str) -> None:
        """Add a command for whichever replica leads. name: identifies the reply."""
        with self.translated() as client, client.pipeline(transaction=True) as batch:
            batch.rpush(self._key("orders"), json.dumps([name, command]))
            batch.ltrim(self._key("orders"), -MAX_COMMANDS, -1)
            batch.pexpire(self._key("orders"), int(1000 * REPLY_SECONDS))
            batch.execute()

    def take_commands(self) -> list[tuple[str, str]]:
        """Remove and return the waiting commands: (name, command), oldest first."""
        with self.translated() as client, client.pipeline(transaction=True) as batch:
            batch.lrange(self._key("orders"), 0, -1)
            batch.delete(self._key("orders"))
            return [(name, command) for name, command in map(json.loads, batch.execute()[0])]

    def send_reply(self, name: str, reply: str) -> None:
        with self.translated() as client:
            client.set(self._key(f"reply:{name}"), reply, px=int(1000 * REPLY_SECONDS))

    def take_reply(self, name: str) -> str | None:
        """Remove and return the reply to a command; None while there is none."""
        with self.translated() as client:
            reply = client.getdel(self._key(f"reply:{name}"))
            return None if reply is None else reply.decode()

    def stream(self, name: str, max_entries: int = MAX_ENTRIES) -> ValkeyStream:
        key = self._key(f"stream:{name}")
        return ValkeyStream(self.translated, key, self._key("leader"), self.replica, max_entries)

    def publish(self, report: str, seconds: float) -> None:
        with self.translated() as client, client.pipeline(transaction=True) as batch:
            name = self._key(f"replica:{self.replica}")
            batch.set(name, report, px=int(1000 * seconds))
            batch.sadd(self._key("replicas"), self.replica)
            batch.execute()

    def published(self) -> dict[str, str]:
        with self.translated() as client:
            names = sorted(client.smembers(self._key("replicas")))
            found = client.mget([self._key(f"replica:{name.decode()}") for name in names]) if names else []
            expired = [name for name, report in zip(names, found, strict=True) if report is None]
            if expired:
                client.srem(self._key("replicas"), *expired)
            return {n.decode(): report.decode() for n, report in zip(names, found, strict=True) if report is not None}

    # --- hemostat check --------------------------------------------------------------------------------------------

    def probe(self) -> tuple[str, str]:
        """Write, read and run a script as `hemostat serve` does. Returns the server's name with its version, and its
        eviction policy; each "" where unknown."""
        name = f"probe:{self.replica}"
        with self.translated() as client:
            client.set(self._key(name), self.replica, px=10_000)
            if client.getdel(self._key(name)) != self.replica.encode():
                raise StoreFailure(f"store {self._shown_url}: what was read differs from what was written")
        self.release_lease()
        with self.translated() as client:
            try:
                info = client.info("server") | client.info("memory")
            except self._redis.ResponseError:
                return "", ""
        kind = info.get("server_name") or "redis"
        number = info.get(f"{kind}_version") or info.get("redis_version", "")
        return f"{kind} {number}", str(info.get("maxmemory_policy", "")) if info.get("maxmemory") else ""


class _LeaderWrites:
    """Implements `protocol.StoreWrites`: as the leader."""

    def __init__(self, store: ValkeyStore) -> None:
        self._store = store

    def put_profile(self, profile: StoredProfile) -> None:
        self._store.put_profile(profile, as_leader=True)

    def delete_profile(self, version: str) -> None:
        self._store.delete_profile(version, as_leader=True)

    def append_event(self, event: dict[str, Any]) -> None:
        self._store.append_event(event, as_leader=True)

    def set_state(self, key: str, value: str | None) -> None:
        self._store.set_state(key, value, as_leader=True)

    def set_states(self, values: Mapping[str, str | None]) -> None:
        self._store.set_states(values, as_leader=True)

    def raise_state(self, key: str, value: int) -> None:
        self._store.raise_state(key, value, as_leader=True)

    def put_blob(self, key: str, data: bytes) -> None:
        self._store.put_blob(key, data, as_leader=True)
