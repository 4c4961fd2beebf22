"""The salt is made once, and kept in the store."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
from tests.support import control

from hemostat.config.schema import Settings
from hemostat.ipc.framing import read_frame
from hemostat.store.errors import StoreErrorLog
from hemostat.store.factory import open_store
from hemostat.store.memory import MemoryStore
from hemostat.store.protocol import Store, StoreUnreachable
from hemostat.store.salt import SALT_BYTES, SALT_KEY, Salt


def salt(store: Store, changes: list[int] | None = None) -> Salt:
    return Salt(store, StoreErrorLog(), lambda: None if changes is None else changes.append(1))


async def test_restarts_have_the_same_salt(url: str) -> None:
    values = set()
    for _ in range(3):
        one = salt(open_store(url))
        assert await one.synchronize()
        assert len(one.value) == SALT_BYTES
        values.add(one.value)
    assert len(values) == 1
    assert open_store(url).get_state(SALT_KEY) == values.pop().hex()


def test_of_many_that_begin_at_once_one_salt_remains(url: str) -> None:
    def begin(n: int) -> str:
        return open_store(url).add_state(SALT_KEY, f"{n:02x}" * SALT_BYTES)

    open_store(url).get_state(SALT_KEY)
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(begin, range(16)))) == 1


async def test_stores_in_memory_differ() -> None:
    first, second = salt(MemoryStore()), salt(MemoryStore())
    assert await first.synchronize()
    assert await second.synchronize()
    assert first.value != second.value


class UnreachableStore(MemoryStore):
    reachable = False

    def add_state(self, key: str, value: str) -> str:
        if not self.reachable:
            raise StoreUnreachable("away")
        return super().add_state(key, value)


async def test_a_store_that_was_away_gives_its_salt_later_and_a_line_says_what_follows(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store, changes = UnreachableStore(), list[int]()
    store.set_state(SALT_KEY, "ab" * SALT_BYTES)
    one = salt(store, changes)
    temporary = one.value
    assert not await one.synchronize()
    assert (one.value, changes) == (temporary, [])
    store.reachable = True
    with caplog.at_level(logging.WARNING):
        assert await one.synchronize()
    assert (one.value.hex(), changes) == ("ab" * SALT_BYTES, [1])
    assert "conversations of before count as new" in caplog.text
    assert one.value.hex() not in caplog.text


async def test_an_emptied_store_gets_the_salt_in_force_again(url: str) -> None:
    store = open_store(url)
    one = salt(store)
    await one.synchronize()
    before = one.value
    store.set_state(SALT_KEY, None)
    assert await one.synchronize()
    assert one.value == before
    assert store.get_state(SALT_KEY) == before.hex()


@pytest.mark.parametrize("damaged", ["", "zz", "ab", "ab" * 33])
async def test_a_damaged_salt_is_replaced(damaged: str, url: str) -> None:
    store = open_store(url)
    store.set_state(SALT_KEY, damaged)
    one = salt(store)
    assert await one.synchronize()
    assert store.get_state(SALT_KEY) == one.value.hex()


async def test_relays_get_it_with_their_policy(tmp_path: Path) -> None:
    made: Settings = control.settings(store={"url": f"sqlite:///{tmp_path}/h.db"})
    policies = []
    for n in range(2):
        folder = tmp_path / str(n)
        await asyncio.to_thread(folder.mkdir)
        async with control.control(folder, made) as one:
            one.policy.publish()
            reader, writer = await asyncio.open_unix_connection(folder / "control.sock")
            policy = msgspec.msgpack.decode(await read_frame(reader))
            writer.close()
            policies.append(policy["salt"])
    assert policies[0] == policies[1]
    assert len(policies[0]) == SALT_BYTES
