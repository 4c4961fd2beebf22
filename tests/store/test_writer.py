"""What waits to be written reaches the store exactly once, whatever becomes of the calls."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.faulty_store import Fault, FaultyStore
from tests.support.loops import looping
from tests.support.waiting import HANG_SECONDS, until

from hemostat.store import writer as writer_module
from hemostat.store.errors import StoreErrorLog
from hemostat.store.memory import MemoryStore
from hemostat.store.protocol import (
    MAX_EVENTS,
    Head,
    NotActiveError,
    Store,
    StoreConflict,
    StoredProfile,
    StoreFailure,
    Write,
)
from hemostat.store.thread import StoreThread
from hemostat.store.writer import StoreWriter


class Writing:
    """A writer of a store, and what it says of losses."""

    def __init__(self, store: Store | None = None) -> None:
        self.store = FaultyStore(store or MemoryStore())
        self.errors = StoreErrorLog()
        self.active = asyncio.Event()
        self.active.set()
        self.lost: list[StoreFailure] = []
        self.writer = StoreWriter(self.store, StoreThread(), self.errors, self.active, self._lose)

    def _lose(self, failure: StoreFailure) -> None:
        self.lost.append(failure)
        self.active.clear()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "RETRY_SECONDS", (0.001,))


async def test_what_waits_is_one_commit_of_the_newest_values() -> None:
    writing = Writing()
    writer = writing.writer
    writer.put_profile(StoredProfile("a", b"1", 1.0))
    writer.put_profile(StoredProfile("b", b"2", 2.0))
    writer.delete_profile("a")
    for n in range(3):
        writer.append_event({"n": n})
        writer.set_state("tests", str(n))
        writer.put_blob("learner", b"%d" % n)
    writer.set_state("mode", "auto")
    writer.set_state("tests", "3")
    writer.set_state("gone", None)
    await writer.write()
    result = writing.store.read()
    assert (result.head.revision, result.head) == (1, writer.head)
    assert result.states == {"tests": "3", "mode": "auto"}
    assert [event["n"] for event in result.events] == [2, 1, 0]
    assert result.profiles == [StoredProfile("b", b"2", 2.0)]
    assert result.blobs == {"learner": b"2"}
    await writer.write()
    assert writing.store.head().revision == 1, "nothing waits, and nothing is written"


async def test_each_commit_happens_once_and_in_order() -> None:
    """Every fault but a lost session, at every commit; the store is read after each."""
    for faults in ([fault] * times for fault in list(Fault)[1:5] for times in (1, 3)):
        writing = Writing()
        async with looping(writing.writer.run()):
            for n in range(3):
                writing.store.faults = list(faults)
                writing.writer.append_event({"n": n})
                writing.writer.set_state("n", str(n))
                assert await writing.writer.wait_until_written(30.0)
                writing.store.execute_late()
                writing.store.faults = []
                result = writing.store.read()
                assert [event["n"] for event in result.events] == list(reversed(range(n + 1))), faults
                assert result.states == {"n": str(n)}
        assert writing.lost == []


@given(steps=st.lists(st.sampled_from([*Fault][1:5]) | st.booleans(), max_size=30))
async def test_any_order_of_faults_writes_and_late_calls(steps: list[Fault | bool]) -> None:
    """A fault is one of the next call; True queues an event, False executes what is late."""
    writing, queued = Writing(), 0
    for step in steps:
        if isinstance(step, Fault):
            writing.store.faults.append(step)
        elif step:
            writing.writer.append_event({"n": queued})
            queued += 1
        else:
            writing.store.execute_late()
        try:
            await writing.writer.write()
        except StoreConflict:
            raise
        except StoreFailure:
            pass
        events = [event["n"] for event in writing.store.store.read().events]
        assert events == list(range(len(events)))[::-1]
    writing.store.faults = []
    await writing.writer.write()
    writing.store.execute_late()
    assert [event["n"] for event in writing.store.read().events] == list(range(queued))[::-1]


async def test_what_is_queued_meanwhile_is_the_next_commit() -> None:
    started, go_on = threading.Event(), threading.Event()

    class Slow(MemoryStore):
        def commit(self, writes: Sequence[Write], expected: int, commit_id: str) -> int:
            started.set()
            assert go_on.wait(30.0)
            return super().commit(writes, expected, commit_id)

    writing = Writing(Slow())
    async with looping(writing.writer.run()):
        writing.writer.set_state("a", "1")
        await until(started.is_set)
        writing.writer.set_state("a", "2")
        assert not await writing.writer.wait_until_written(0.01)
        assert writing.writer.is_own(Head(0, ""))
        go_on.set()
        assert await writing.writer.wait_until_written(30.0)
    assert writing.store.read().states == {"a": "2"}
    assert writing.store.head().revision == 2


async def test_a_store_that_is_away_costs_bounded_memory_and_one_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "hemostat.store")
    writing = Writing()
    writing.store.faults = [Fault.BEFORE] * 5
    async with looping(writing.writer.run()):
        for n in range(MAX_EVENTS + 3):
            writing.writer.append_event({"n": n})
            writing.writer.set_state("n", str(n))
        assert await writing.writer.wait_until_written(30.0)
    events = writing.store.read().events
    assert (len(events), events[0], events[-1]) == (MAX_EVENTS, {"n": MAX_EVENTS + 2}, {"n": 3})
    assert writing.errors.count == 5
    assert [record.message for record in caplog.records if record.name == "hemostat.store"] == [
        "store: it does not answer",
        "the store answers again",
    ]


async def test_nothing_is_written_where_another_process_owns_the_store() -> None:
    writing = Writing()
    writing.writer.set_state("a", "1")
    await writing.writer.write()
    writing.store.store.commit([], 1, "another process's")
    async with looping(writing.writer.run()):
        writing.writer.set_state("a", "2")
        await until(lambda: writing.lost)
        writing.writer.set_state("a", "3")
        assert not await writing.writer.wait_until_written(0.01)
    assert writing.store.read().states == {"a": "1"}
    assert not writing.writer.is_own(writing.store.head())


async def test_after_a_lost_session_the_same_commit_is_made() -> None:
    for fault in (Fault.BEFORE, Fault.AFTER, Fault.LATE):
        writing = Writing()
        writing.store.faults = [fault, Fault.LOST]
        async with looping(writing.writer.run()):
            writing.writer.append_event({"n": 1})
            await until(lambda writing=writing: writing.lost)
            assert writing.writer.is_own(writing.store.store.head())
            writing.active.set()
            assert await writing.writer.wait_until_written(30.0)
            writing.store.execute_late()
        assert writing.store.read().events == [{"n": 1}]


async def test_bytes_that_no_store_keeps_are_not_tried_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "MAX_BLOB_BYTES", 10)
    writing = Writing()
    writing.writer.put_blob("learner", b"x" * 11)
    writing.writer.put_blob("other", b"x" * 10)
    await writing.writer.write()
    assert writing.store.read().blobs == {"other": b"x" * 10}
    assert (writing.errors.count, "11 bytes" in writing.errors.last_message) == (1, False)


async def test_who_waits_when_the_process_stops_is_told_so() -> None:
    writing = Writing()
    writing.writer.set_state("a", "1")
    waiting = asyncio.create_task(writing.writer.wait_until_written(HANG_SECONDS))
    await asyncio.sleep(0)
    writing.writer.stop_waiting()
    with pytest.raises(NotActiveError, match="look at the state in a moment"):
        await waiting
    with pytest.raises(NotActiveError):
        await writing.writer.wait_until_written(HANG_SECONDS)
    await writing.writer.write()
    assert await writing.writer.wait_until_written(HANG_SECONDS), "what is written is written"
