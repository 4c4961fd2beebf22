"""A stream in a Valkey or Redis server, from all replicas to the one that leads.

One consumer group, `leader`, whose consumers are the replicas: an entry that a leader has taken stays in the group's
list of pending entries until it is removed, so that the next leader finds it. Only the replica that led last is given
entries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from hemostat.store.protocol import StreamEntry

_TAKE = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return {} end
redis.pcall('XGROUP', 'CREATE', KEYS[2], 'leader', '0', 'MKSTREAM')
local found = redis.call('XREADGROUP', 'GROUP', 'leader', ARGV[1], 'COUNT', ARGV[2], 'STREAMS', KEYS[2], '>')
return found and found[1][2] or {}"""
"""KEYS: last leader, stream. ARGV: replica, number of entries. The group is there already but for the first time, and
where the server has lost its data."""
_TAKE_AGAIN = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return {'0-0', {}} end
redis.pcall('XGROUP', 'CREATE', KEYS[2], 'leader', '0', 'MKSTREAM')
return redis.call('XAUTOCLAIM', KEYS[2], 'leader', ARGV[1], '0', ARGV[3], 'COUNT', ARGV[2])"""
"""The same, ARGV[3]: where to begin. Returns where to go on, and entries."""
_END = b"0-0"


class ValkeyStream:
    """Implements `protocol.Stream`.

    connected: the client within, its exceptions translated. key: of the stream. leader: the key that names the replica
    that led last. replica: this one.
    """

    def __init__(
        self,
        connected: Callable[[], AbstractContextManager[Any]],
        key: str,
        leader: str,
        replica: str,
        max_entries: int,
    ) -> None:
        """max_entries: beyond about that many the server deletes the oldest."""
        self._max_entries = max_entries
        self._connected = connected
        self._key = key
        self._leader = leader
        self._replica = replica

    def append(self, entry: StreamEntry) -> None:
        fields = {"sender": entry.sender, "first": entry.first, "items": entry.items, "data": entry.data}
        with self._connected() as client:
            client.xadd(self._key, fields, maxlen=self._max_entries, approximate=True)

    def take(self, count: int) -> list[StreamEntry]:
        return [_read(*found) for found in self._run(_TAKE, count)]

    def take_again(self, count: int, cursor: str = "") -> tuple[list[StreamEntry], str]:
        following, found = self._run(_TAKE_AGAIN, count, cursor or "0-0")[:2]
        # A deleted entry is null, or has no fields, in the answers of older servers.
        entries = [_read(*one) for one in found if one and one[1]]
        return entries, "" if following == _END else following.decode()

    def remove(self, entries: Sequence[str]) -> None:
        if entries:
            with self._connected() as client, client.pipeline(transaction=True) as batch:
                batch.xack(self._key, "leader", *entries)
                batch.xdel(self._key, *entries)
                batch.execute()

    def length(self) -> int:
        with self._connected() as client:
            return int(client.xlen(self._key))

    def _run(self, script: str, *more: str | int) -> Any:
        with self._connected() as client:
            return client.eval(script, 2, self._leader, self._key, self._replica, *more)


def _read(entry: bytes, fields: list[bytes]) -> StreamEntry:
    """An empty one where it is not an entry of ours."""
    named = dict(zip(fields[::2], fields[1::2], strict=False))
    try:
        sender, numbers = named[b"sender"].decode(), (int(named[b"first"]), int(named[b"items"]))
        return StreamEntry(sender, *numbers, named[b"data"], entry.decode())
    except (KeyError, ValueError):
        return StreamEntry("", 0, 0, b"", entry.decode())
