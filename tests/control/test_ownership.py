"""Which control process decides: over two real stores on one file, with every call failing in turn."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.faulty_store import Fault, FaultyStore
from tests.support.loops import looping
from tests.support.stores import KEPT, Opener, opener
from tests.support.waiting import until

from hemostat.control import ownership
from hemostat.control.ownership import Ownership, OwnershipState, Superseded
from hemostat.store import writer
from hemostat.store.errors import StoreErrorLog
from hemostat.store.protocol import Snapshot, StoreIncompatible


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "VERIFY_SECONDS", 0.01)
    for module in (ownership, writer):
        monkeypatch.setattr(module, "RETRY_SECONDS", (0.001,))


class Owner:
    """What one control process has of it."""

    def __init__(self, open_one: Opener) -> None:
        self.store = FaultyStore(open_one())
        self.errors = StoreErrorLog()
        self.ownership = Ownership(self.store, self.errors)
        self.writer = self.ownership.writer

    @property
    def state(self) -> OwnershipState:
        return self.ownership.state

    async def begin(self) -> Snapshot:
        result = await self.ownership.begin()
        self.ownership.activate()
        return result

    async def write(self, value: str) -> None:
        self.writer.set_state("a", value)
        await self.writer.write()


@pytest.fixture(params=KEPT)
def open_one(request: pytest.FixtureRequest, tmp_path: Path) -> Opener:
    return opener(request.param, tmp_path)


@pytest.fixture
def process(open_one: Opener) -> Iterator[Owner]:
    owner = Owner(open_one)
    yield owner
    owner.store.close()


@pytest.fixture
def other(open_one: Opener) -> Iterator[Owner]:
    owner = Owner(open_one)
    yield owner
    owner.store.close()


async def test_a_new_store_is_owned_and_written(process: Owner) -> None:
    assert process.state == OwnershipState.STANDBY
    assert await process.begin() == Snapshot()
    assert (process.state, process.ownership.why) == (OwnershipState.ACTIVE, "")
    await process.write("1")
    assert process.store.read().states == {"a": "1"}


async def test_the_other_waits_and_takes_over_what_was_written(process: Owner, other: Owner) -> None:
    await process.begin()
    waiting = asyncio.create_task(other.ownership.begin())
    await other.ownership.settled.wait()
    assert (other.state, other.ownership.why) == (OwnershipState.STANDBY, "another process owns the store")
    await process.write("1")
    assert not waiting.done()
    process.store.close()
    assert (await waiting).states == {"a": "1"}
    assert other.state == OwnershipState.READING
    assert not other.ownership.active
    other.ownership.activate()
    await other.write("2")


@pytest.mark.parametrize("fault", [Fault.BEFORE, Fault.AFTER, Fault.LATE])
@pytest.mark.parametrize("call", ["acquire", "read"])
async def test_a_call_that_fails_at_the_start_is_repeated(
    process: Owner, other: Owner, fault: Fault, call: str
) -> None:
    await process.begin()
    await process.write("kept")
    process.store.close()
    other.store.faults = [Fault.NONE] * (call == "read") + [fault]
    result = await other.begin()
    assert result.states == {"a": "kept"}, "what cannot be read does not count as absent"
    assert other.errors.count == 1
    await other.write("2")
    assert other.store.head().revision == 2


async def test_while_reading_fails_nothing_is_decided_and_the_reason_is_shown(process: Owner) -> None:
    process.store.faults = [Fault.NONE, *[Fault.BEFORE] * 100_000]
    async with looping(process.writer.run()):
        reading = asyncio.create_task(process.ownership.begin())
        process.writer.set_state("a", "must not be written")
        await until(lambda: process.store.calls.count("read") > 5)
        assert (process.state, process.ownership.active, process.ownership.knows) == (
            OwnershipState.READING,
            False,
            False,
        )
        assert process.ownership.why == "what is stored is not known: store: it does not answer"
        assert "commit" not in process.store.calls
        process.store.faults.clear()
        await reading


async def test_a_store_that_was_lost_while_it_is_read_is_acquired_again(process: Owner) -> None:
    process.store.faults = [Fault.NONE, Fault.LOST]
    await process.begin()
    assert process.store.calls == ["acquire", "read", "acquire", "read"]


async def test_a_store_of_a_newer_version_ends_the_process(process: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Snapshot:
        raise StoreIncompatible("store: schema 9")

    monkeypatch.setattr(process.store.store, "read", refuse)
    with pytest.raises(StoreIncompatible):
        await process.begin()


@pytest.mark.parametrize("lost_at", ["verify", "commit"])
async def test_it_continues_after_a_lost_session_where_nobody_else_wrote(process: Owner, lost_at: str) -> None:
    await process.begin()
    await process.write("1")
    process.store.faults = [Fault.LOST, Fault.BEFORE, Fault.AFTER, Fault.BEFORE]
    if lost_at == "commit":
        process.writer.set_state("a", "2")
    seen = []
    moved = process.ownership._move
    process.ownership._move = lambda *args: (moved(*args), seen.append(process.state))[0]  # type: ignore[method-assign]
    async with looping(process.writer.run(), process.ownership.watch()):
        await until(lambda: len(seen) == 2)
        assert seen == [OwnershipState.SUSPENDED, OwnershipState.ACTIVE]
        process.writer.set_state("b", "3")
        assert await process.writer.wait_until_written(30.0)
    assert process.store.read().states == {"a": "2" if lost_at == "commit" else "1", "b": "3"}


async def test_the_process_ends_where_another_one_wrote(process: Owner, other: Owner) -> None:
    await process.begin()
    await process.write("1")
    process.store.store.close()  # as a server that has ended its session
    await other.begin()
    process.writer.set_state("a", "former")
    writing = asyncio.create_task(process.writer.run())
    watching = asyncio.create_task(process.ownership.watch())
    await until(lambda: process.state is OwnershipState.SUSPENDED)
    assert not process.ownership.active
    assert process.ownership.knows
    assert not watching.done(), "nobody has written yet"
    await other.write("2")
    with pytest.raises(Superseded, match="another process has written to the store: the store is at revision 2"):
        await watching
    assert process.state == OwnershipState.ENDED
    writing.cancel()
    assert other.store.read().states == {"a": "2"}


async def test_a_write_that_fails_leaves_it_active(process: Owner) -> None:
    await process.begin()
    async with looping(process.writer.run(), process.ownership.watch()):
        process.store.faults = [Fault.BEFORE, Fault.AFTER] * 20
        process.writer.set_state("a", "1")
        assert await process.writer.wait_until_written(30.0)
        assert process.ownership.active
    assert process.errors.count


def test_no_other_moves_exist() -> None:
    """READING is left for STANDBY alone, and an ended process begins nothing."""
    moves = {(state, next_state) for (state, _), next_state in ownership._NEXT.items()}
    state = OwnershipState
    assert moves == {
        (state.STANDBY, state.READING),
        (state.READING, state.ACTIVE),
        (state.READING, state.STANDBY),
        (state.ACTIVE, state.SUSPENDED),
        (state.SUSPENDED, state.ACTIVE),
        (state.SUSPENDED, state.ENDED),
    }
