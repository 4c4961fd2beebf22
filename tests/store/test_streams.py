"""Units from all replicas to the leader, through a stream in a real Valkey: each counted once, whatever fails."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.support import valkey
from tests.support.replicas import store_url
from tests.support.valkey import Valkey

from hemostat.control.evidence import outbox as outbox_module
from hemostat.control.evidence.inbox import Inbox
from hemostat.control.evidence.outbox import Outbox
from hemostat.control.evidence.positions import MAX_SENDERS, Positions
from hemostat.store import valkey_stream
from hemostat.store.lease import Lease
from hemostat.store.protocol import MAX_ENTRIES, StoreFailure, StoreUnreachable, StreamEntry
from hemostat.store.valkey import ValkeyStore


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    with valkey.running(tmp_path_factory.mktemp("valkey")) as one:
        yield one


class End:
    """A replica's end of the stream. What it has counted and its positions are kept in the store together, by `save`.

    counted: numbers.
    """

    def __init__(self, server: Valkey, prefix: Path, max_entries: int = MAX_ENTRIES) -> None:
        self.store = ValkeyStore(store_url(server.url, f"{prefix}:"))
        self.lease = Lease(shared=True)
        self.positions = Positions()
        self.counted: list[int] = []
        self.failures: list[StoreFailure] = []
        stream = self.store.stream("units", max_entries)
        self.outbox = Outbox(stream, self.store.replica, self.failures.append)
        self.inbox = Inbox(
            stream,
            self.lease,
            use=self.use,
            persisted=lambda: Positions.of(self.store.get_state("positions")),
            on_failure=self.failures.append,
        )
        self.stream: Any = stream

    def use(self, entry: StreamEntry) -> None:
        units = enumerate(msgspec.msgpack.decode(entry.data), entry.first)
        self.counted += [unit for number, unit in units if self.positions.advance(entry.sender, number)]

    def add(self, *numbers: int) -> None:
        for number in numbers:
            self.outbox.add(msgspec.msgpack.encode(number))

    async def send(self, *numbers: int) -> None:
        self.add(*numbers)
        await self.outbox.send()

    def lead(self) -> None:
        """Take over from whoever led, and go on from what that one has saved."""
        self.store._client.delete(self.store._key("lease"))
        assert self.store.acquire_lease(60.0).leads
        self.lease.lose()
        self.positions.restore(self.store.get_state("positions"))
        self.counted = msgspec.json.decode(self.store.get_state("counted") or "[]")
        self.lease.grant(float("inf"))

    def save(self) -> None:
        counted = msgspec.json.encode(self.counted).decode()
        self.store.as_leader.set_states({"counted": counted, "positions": self.positions.save()})


async def test_units_of_all_are_counted_in_the_order_of_each(shared_server: Valkey, tmp_path: Path) -> None:
    leader, follower, third = (End(shared_server, tmp_path) for _ in range(3))
    leader.lead()
    await follower.send(1, 2)
    await third.send(10)
    await follower.send(3)
    await leader.inbox.take()
    assert leader.counted == [1, 2, 10, 3]
    assert follower.outbox.sent + third.outbox.sent == 4
    assert follower.outbox.waiting == 0
    assert await leader.inbox.take() == 0


async def test_a_batch_that_was_sent_twice_counts_once(
    shared_server: Valkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leader, follower = End(shared_server, tmp_path), End(shared_server, tmp_path)
    leader.lead()
    append = follower.stream.append

    def lose_the_answer(entry: StreamEntry) -> None:
        append(entry)
        raise StoreUnreachable("the connection broke after the write")

    monkeypatch.setattr(follower.stream, "append", lose_the_answer)
    with pytest.raises(StoreUnreachable):
        await follower.send(1, 2)
    assert follower.outbox.waiting == 2
    monkeypatch.setattr(follower.stream, "append", append)
    await follower.send(3)
    await leader.inbox.take()
    assert leader.counted == [1, 2, 3]
    assert leader.positions.repeated == 2


async def test_entries_whose_answer_is_lost_are_taken_again(
    shared_server: Valkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leader, follower = End(shared_server, tmp_path), End(shared_server, tmp_path)
    leader.lead()
    await follower.send(1)
    await leader.inbox.take()
    await follower.send(2)
    take = leader.stream.take

    def lose_the_answer(count: int) -> list[StreamEntry]:
        take(count)
        raise StoreUnreachable("the connection broke after the read")

    monkeypatch.setattr(leader.stream, "take", lose_the_answer)
    with pytest.raises(StoreUnreachable):
        await leader.inbox.take()
    monkeypatch.setattr(leader.stream, "take", take)
    await follower.send(3)
    await leader.inbox.take()
    assert leader.counted == [1, 2, 3]


@pytest.mark.parametrize(("saved", "removed"), [(False, False), (True, False), (True, True)])
async def test_a_new_leader_counts_what_the_old_one_had_not_saved(
    saved: bool, removed: bool, shared_server: Valkey, tmp_path: Path
) -> None:
    old, new, follower = (End(shared_server, tmp_path) for _ in range(3))
    old.lead()
    await follower.send(1, 2)
    await old.inbox.take()
    old.save()
    await follower.send(3)
    await old.inbox.take()
    if saved:
        old.save()
    if removed:
        await old.inbox.remove()
        assert old.stream.length() == 0
    await follower.send(4)
    new.lead()
    await new.inbox.take()
    assert new.counted == [1, 2, 3, 4]
    assert new.positions.lost == 0


async def test_who_does_not_lead_any_more_is_given_nothing(shared_server: Valkey, tmp_path: Path) -> None:
    old, new, follower = (End(shared_server, tmp_path) for _ in range(3))
    old.lead()
    await follower.send(1)
    new.lead()
    assert old.lease.leads, "it has not noticed"
    await old.inbox.take()
    assert old.counted == []
    await new.inbox.take()
    assert new.counted == [1]


async def test_what_is_taken_while_another_comes_to_lead_is_left_to_that_one(
    shared_server: Valkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new, follower = (End(shared_server, tmp_path) for _ in range(3))
    old.lead()
    await follower.send(1)
    take = old.stream.take

    def slowly(count: int) -> list[StreamEntry]:
        found: list[StreamEntry] = take(count)
        old.lease.lose()
        new.lead()
        return found

    monkeypatch.setattr(old.stream, "take", slowly)
    await old.inbox.take()
    assert old.counted == []
    await new.inbox.take()
    assert new.counted == [1]


async def test_an_entry_is_removed_once_the_store_has_what_it_went_into(shared_server: Valkey, tmp_path: Path) -> None:
    leader, follower = End(shared_server, tmp_path), End(shared_server, tmp_path)
    leader.lead()
    await follower.send(1)
    await leader.inbox.take()
    await leader.inbox.remove()
    assert leader.stream.length() == 1
    leader.save()
    await follower.send(2)
    await leader.inbox.take()
    await leader.inbox.remove()
    assert leader.stream.length() == 1, "the second one is not saved yet"


async def test_an_entry_whose_removal_failed_is_removed_later(
    shared_server: Valkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leader, follower = End(shared_server, tmp_path), End(shared_server, tmp_path)
    leader.lead()
    await follower.send(1)
    await leader.inbox.take()
    leader.save()
    remove = leader.stream.remove

    def fail(entries: list[str]) -> None:
        raise StoreUnreachable("the server was killed")

    monkeypatch.setattr(leader.stream, "remove", fail)
    with pytest.raises(StoreUnreachable):
        await leader.inbox.remove()
    monkeypatch.setattr(leader.stream, "remove", remove)
    await leader.inbox.remove()
    assert leader.stream.length() == 0


async def test_a_full_outbox_drops_the_oldest_and_says_so(
    shared_server: Valkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox_module, "MAX_UNITS", 3)
    leader, follower = End(shared_server, tmp_path), End(shared_server, tmp_path)
    leader.lead()
    follower.add(1, 2, 3, 4, 5)
    assert (follower.outbox.waiting, follower.outbox.dropped) == (3, 2)
    await follower.send()
    await leader.inbox.take()
    assert leader.counted == [3, 4, 5]
    assert leader.positions.lost == 0, "counted where they were dropped"


async def test_what_the_stream_has_no_room_for_is_counted_as_lost(shared_server: Valkey, tmp_path: Path) -> None:
    # Approximate: whole nodes of 100 entries are deleted.
    leader, follower = End(shared_server, tmp_path, 1), End(shared_server, tmp_path, 1)
    leader.lead()
    for number in range(1, 251):
        await follower.send(number)
    while await leader.inbox.take():
        pass
    assert leader.counted == list(range(leader.counted[0], 251))
    assert leader.positions.lost == 250 - len(leader.counted) > 0


async def test_an_entry_of_something_else_is_left_out(shared_server: Valkey, tmp_path: Path) -> None:
    leader, follower = End(shared_server, tmp_path), End(shared_server, tmp_path)
    leader.lead()
    await follower.send(1)
    leader.store._client.xadd(leader.stream._key, {"sender": "x", "first": "many"})
    await follower.send(2)
    await leader.inbox.take()
    assert leader.counted == [1, 2]


async def test_a_store_that_lost_its_data_takes_units_again(tmp_path: Path) -> None:
    with valkey.running(tmp_path / "valkey", keeps=False) as server:
        leader, follower = End(server, tmp_path), End(server, tmp_path)
        leader.lead()
        await follower.send(1)
        await leader.inbox.take()
        server.kill()
        follower.add(2)
        with pytest.raises(StoreUnreachable):
            await follower.outbox.send()
        server.start()
        assert leader.store.acquire_lease(60.0).leads
        await follower.outbox.send()
        await leader.inbox.take()
        assert leader.counted == [1, 2]


async def test_the_loops_go_on_when_the_store_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_module, "RETRY_SECONDS", (0.05,))
    monkeypatch.setattr("hemostat.control.evidence.inbox.RETRY_SECONDS", (0.05,))
    with valkey.running(tmp_path / "valkey") as server:
        leader, follower = End(server, tmp_path), End(server, tmp_path)
        leader.lead()
        loops = [asyncio.create_task(follower.outbox.run()), asyncio.create_task(leader.inbox.run())]
        try:
            async with asyncio.timeout(60):
                follower.add(1)
                while leader.counted != [1]:
                    await asyncio.sleep(0.02)
                server.kill()
                follower.add(2)
                while not (leader.failures and follower.failures):
                    await asyncio.sleep(0.02)
                server.start()
                while leader.counted != [1, 2]:
                    await asyncio.sleep(0.02)
        finally:
            for loop in loops:
                loop.cancel()
            await asyncio.gather(*loops, return_exceptions=True)


def test_positions_are_bounded_and_survive_damage() -> None:
    positions = Positions()
    for n in range(MAX_SENDERS + 10):
        positions.advance(str(n), 1)
    assert len(msgspec.json.decode(positions.save())) == MAX_SENDERS
    for damaged in ("", "[]", '{"a": "b"}', "{"):
        positions.restore(damaged)
        assert positions.save() == "{}"


class Answers:
    """A client whose scripts all answer the same."""

    def __init__(self, answer: list[Any]) -> None:
        self.answer = answer

    def eval(self, *_: Any) -> list[Any]:
        return self.answer


@pytest.mark.parametrize("deleted", [None, [b"1-0", None]], ids=["Redis 6.2", "Valkey"])
def test_an_entry_that_was_deleted_is_left_out(deleted: Any) -> None:
    fields = [b"sender", b"a", b"first", b"1", b"items", b"1", b"data", b"x"]
    client = Answers([b"0-0", [deleted, [b"2-0", fields]]])
    stream = valkey_stream.ValkeyStream(lambda: nullcontext(client), "key", "leader", "replica", MAX_ENTRIES)
    assert stream.take_again(9) == ([StreamEntry("a", 1, 1, b"x", "2-0")], "")
