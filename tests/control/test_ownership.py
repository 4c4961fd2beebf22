"""Which control process decides: over two real stores on one file, with every call failing in turn."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support import postgres
from tests.support.faulty_store import Fault, FaultyStore
from tests.support.loops import looping
from tests.support.stores import KEPT, Opener, opener
from tests.support.waiting import until

from hemostat.control import ownership
from hemostat.control.ownership import Ownership, OwnershipState, Superseded
from hemostat.store import writer
from hemostat.store.errors import StoreErrorLog
from hemostat.store.memory import MemoryStore
from hemostat.store.postgres import PostgresStore
from hemostat.store.protocol import NotActiveError, Snapshot, Store, StoreIncompatible


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
    process.ownership.on_move = lambda: seen.append(process.state)
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


# --- in time ---------------------------------------------------------------------------------------------------------


class LeasedStore(FaultyStore):
    """It is certain for 7 s after each answer; `verify` waits for `answers`."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.now = self.until = 0.0
        self.answers = threading.Event()
        self.answers.set()

    @property
    def owned_until(self) -> float:
        return self.until

    def acquire(self) -> bool:
        self.until = self.now + 7.0
        return super().acquire()

    def verify(self) -> None:
        self.calls.append("verify begins")
        self.answers.wait()
        super().verify()
        self.until = self.now + 7.0


async def test_it_suspends_by_the_clock_while_the_store_does_not_answer() -> None:
    store = LeasedStore(MemoryStore())
    states: list[OwnershipState] = []
    owner = Ownership(store, StoreErrorLog(), clock=lambda: store.now)
    await owner.begin()
    owner.activate()
    owner.on_move = lambda: states.append(owner.state)
    store.answers.clear()
    async with looping(owner.watch()):
        await until(lambda: "verify begins" in store.calls)
        store.now = 6.9
        await asyncio.sleep(0.05)
        assert not states
        store.now = 7.0
        await until(lambda: states)
        assert states == [OwnershipState.SUSPENDED], "nobody had to ask, and the thread still waits"
        with pytest.raises(NotActiveError, match="not active: store: it could not be verified in time"):
            owner.require_active()
        store.answers.set()
        await until(lambda: owner.active)


async def test_after_a_pause_of_the_whole_process_it_does_not_say_that_it_is_active() -> None:
    """This is what happens after SIGSTOP and SIGCONT: the first one that asks is told so."""
    store = LeasedStore(MemoryStore())
    owner = Ownership(store, StoreErrorLog(), clock=lambda: store.now)
    await owner.begin()
    owner.activate()
    assert owner.active
    store.now = 60.0
    assert (owner.active, owner.state) == (False, OwnershipState.SUSPENDED)


async def test_it_suspends_while_all_threads_of_asyncio_are_blocked(tmp_path: Path) -> None:
    """PostgreSQL has ended the session, and so freed the lock."""
    server = postgres.shared()
    database = server.new_database()
    store = PostgresStore(server.url(database))
    owner = Ownership(store, StoreErrorLog())
    await owner.begin()
    owner.activate()
    release = threading.Event()
    loop = asyncio.get_running_loop()
    blocked = [loop.run_in_executor(None, release.wait) for _ in range(64)]
    try:
        async with looping(owner.watch()):
            server.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{database}'")
            states: list[OwnershipState] = []
            owner.on_move = lambda: states.append(owner.state)
            await until(lambda: states)
            assert states[0] == OwnershipState.SUSPENDED
            await until(lambda: owner.active)
    finally:
        release.set()
        await asyncio.gather(*blocked)
        await owner.close()


async def test_a_store_that_does_not_answer_does_not_keep_the_process_from_closing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ownership, "CLOSE_SECONDS", 0.05)
    store = LeasedStore(MemoryStore())
    owner = Ownership(store, StoreErrorLog(), clock=lambda: store.now)
    await owner.begin()
    store.answers.clear()
    verifying = asyncio.create_task(owner.verify())
    await until(lambda: "verify begins" in store.calls)
    await owner.close()
    store.answers.set()
    await verifying
