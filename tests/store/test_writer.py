"""The queue of writes: what reaches the store, in which order, and what becomes of failures."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from typing import Any

import pytest
from tests.support.waiting import until

from hemostat.store import writer as writer_module
from hemostat.store.errors import StoreErrorLog
from hemostat.store.lease import Lease
from hemostat.store.memory import MemoryStore
from hemostat.store.protocol import StoredProfile, StoreFailure, StoreUnreachable
from hemostat.store.writer import MAX_QUEUED_WRITES, StoreWriter


class FailingStore(MemoryStore):
    """Raises the given failures, one for each write of an event, before it accepts them."""

    def __init__(self, *failures: StoreFailure) -> None:
        super().__init__()
        self.failures = list(failures)

    def append_event(self, event: dict[str, Any]) -> None:
        if self.failures:
            raise self.failures.pop(0)
        super().append_event(event)


def writer(store: MemoryStore, *, shared: bool = False) -> tuple[StoreWriter, StoreErrorLog, Lease]:
    errors, lease = StoreErrorLog(), Lease(shared=shared)
    return StoreWriter(store, lease, errors), errors, lease


async def test_every_kind_of_write_reaches_the_store() -> None:
    store = MemoryStore()
    one, errors, _ = writer(store)
    profile = StoredProfile("a", b"1", 1.0)
    for writes in (one.as_leader, one.as_replica):
        writes.put_profile(profile)
        writes.put_profile(StoredProfile("b", b"2", 2.0))
        writes.delete_profile("b")
        writes.append_event({"n": 1})
        writes.set_state("mode", "auto")
        writes.raise_state("tests", 3)
        writes.raise_state("tests", 2)
    await one.drain()
    assert store.profiles() == [profile]
    assert store.events(9) == [{"n": 1}] * 2
    assert (store.get_state("mode"), store.get_state("tests"), errors.count) == ("auto", "3", 0)


async def test_a_follower_writes_only_what_every_replica_writes() -> None:
    store = MemoryStore()
    one, _, lease = writer(store, shared=True)
    one.as_leader.append_event({"as": "leader"})
    one.as_replica.append_event({"as": "replica"})
    lease.grant(float("inf"))
    one.as_leader.append_event({"as": "leader now"})
    await one.drain()
    assert [event["as"] for event in store.events(9)] == ["leader now", "replica"]


async def test_an_unreachable_server_is_retried_and_another_failure_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "RETRY_SECONDS", (0.001,))
    store = FailingStore(StoreUnreachable("away"), StoreUnreachable("away"), StoreFailure("damaged"))
    one, errors, _ = writer(store)
    for n in range(2):
        one.as_leader.append_event({"n": n})
    one.as_leader.append_event({"n": 2})
    task = asyncio.create_task(one.run())
    await until(lambda: len(store.events(9)) == 2)
    await one.wait_until_written(5.0)
    assert [event["n"] for event in store.events(9)] == [2, 1], "the write with another failure is dropped, not retried"
    assert errors.count == 3
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_what_a_leader_queued_is_not_written_after_another_has_led() -> None:
    """Not even where it leads again: its write is of before what the other one decided."""
    store = MemoryStore()
    one, _, lease = writer(store, shared=True)
    lease.grant(float("inf"))
    for writes in (one.as_leader, one.as_replica):
        writes.append_event({"of": "before"})
        writes.set_states({"mode": "before"})
        writes.put_blob("learned", b"before")
    lease.lose()
    lease.grant(float("inf"))
    one.as_leader.set_states({"mode": "now", "serving": "now"})
    await one.drain()
    assert len(store.events(9)) == 1, "that of the replica"
    assert (store.get_state("mode"), store.get_state("serving")) == ("now", "now")
    assert not one._states
    assert not one._blobs


async def test_of_states_that_wait_together_the_newest_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore()
    one, _, _ = writer(store)
    written: list[dict[str, str | None]] = []
    monkeypatch.setattr(store, "set_states", lambda values: written.append(dict(values)))
    for n in range(5):
        one.as_leader.set_states({"a": str(n), "b": str(n)})
    await one.drain()
    assert written == [{"a": "4", "b": "4"}]


class LoopOnly(dict[Any, Any]):
    """What callers look at and change in several steps: only the event loop's thread may take from it."""

    def __init__(self) -> None:
        super().__init__()
        self.threads: set[int] = set()

    def pop(self, key: Any, *default: Any) -> Any:
        self.threads.add(threading.get_ident())
        return super().pop(key, *default)


async def test_what_waits_is_taken_on_the_event_loop_only() -> None:
    """In the thread it could be taken between two steps of a caller, and then nothing would ever be written again."""
    store = MemoryStore()
    one, _, _ = writer(store)
    one._states, one._blobs = states, blobs = LoopOnly(), LoopOnly()
    one.as_leader.set_states({"mode": "auto"})
    one.as_leader.put_blob("learned", b"1")
    await one.drain()
    assert (store.get_state("mode"), store.get_blob("learned")) == ("auto", b"1")
    assert states.threads | blobs.threads == {threading.get_ident()}


class OrderedStore(MemoryStore):
    """Notes the order of what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.order: list[Any] = []

    def put_profile(self, profile: StoredProfile) -> None:
        self.order.append(profile.version)

    def set_states(self, values: Mapping[str, str | None]) -> None:
        self.order.append(dict(values))


async def test_states_are_not_written_before_the_profile_that_they_name() -> None:
    store = OrderedStore()
    one, _, _ = writer(store)
    one.as_leader.set_states({"serving": "a", "alarm": "1"})
    one.as_leader.set_states({"serving": "b"})
    one.as_leader.put_profile(StoredProfile("c", b"", 1.0))
    one.as_leader.set_states({"serving": "c"})
    await one.drain()
    assert store.order == [{"serving": "b", "alarm": "1"}, "c", {"serving": "c"}]


async def test_writes_beyond_the_queue_are_counted() -> None:
    one, errors, _ = writer(MemoryStore())
    for n in range(MAX_QUEUED_WRITES + 2):
        one.as_leader.set_state("n", str(n))
    assert errors.count == 2


def test_a_repeated_message_is_logged_once_where_asked(caplog: pytest.LogCaptureFixture) -> None:
    errors = StoreErrorLog(log_repeats=False)
    for message in ("away", "away", "damaged"):
        errors.record(StoreFailure(message))
    errors.clear()
    errors.record(StoreFailure("damaged"))
    assert [record.message for record in caplog.records] == ["away", "damaged", "damaged"]
    assert errors.count == 4


class FailingBlobs(FailingStore):
    def put_blob(self, key: str, data: bytes) -> None:
        if self.failures:
            raise self.failures.pop(0)
        super().put_blob(key, data)


async def test_of_blobs_that_wait_only_the_newest_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "RETRY_SECONDS", (0.0,))
    store = FailingBlobs(StoreUnreachable("away"), StoreUnreachable("away"))
    one, errors, _ = writer(store)
    for n in range(3 * MAX_QUEUED_WRITES):
        one.as_leader.put_blob("learner", bytes([n % 256]))
        one.as_leader.put_blob("other", b"x")
    running = asyncio.create_task(one.run())
    await one.wait_until_written(30)
    running.cancel()
    assert store.get_blob("learner") == bytes([(3 * MAX_QUEUED_WRITES - 1) % 256])
    assert store.get_blob("other") == b"x"
    assert errors.count == 2


async def test_a_follower_writes_no_blobs() -> None:
    store = MemoryStore()
    one, _, _ = writer(store, shared=True)
    one.as_leader.put_blob("learner", b"x")
    await one.drain()
    assert store.get_blob("learner") is None
