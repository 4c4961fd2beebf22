"""The queue of writes: what reaches the store, in which order, and what becomes of failures."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from tests.support.waiting import until

from hemostat.store import writer as writer_module
from hemostat.store.errors import StoreErrorLog
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


def writer(store: MemoryStore) -> tuple[StoreWriter, StoreErrorLog]:
    errors = StoreErrorLog()
    return StoreWriter(store, errors), errors


async def test_every_kind_of_write_reaches_the_store() -> None:
    store = MemoryStore()
    one, errors = writer(store)
    profile = StoredProfile("a", b"1", 1.0)
    one.put_profile(profile)
    one.put_profile(StoredProfile("b", b"2", 2.0))
    one.delete_profile("b")
    one.append_event({"n": 1})
    one.set_state("mode", "auto")
    one.raise_state("tests", 3)
    one.raise_state("tests", 2)
    await one.drain()
    assert store.profiles() == [profile]
    assert store.events(9) == [{"n": 1}]
    assert (store.get_state("mode"), store.get_state("tests"), errors.count) == ("auto", "3", 0)


async def test_an_unreachable_server_is_retried_and_another_failure_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "RETRY_SECONDS", (0.001,))
    store = FailingStore(StoreUnreachable("away"), StoreUnreachable("away"), StoreFailure("damaged"))
    one, errors = writer(store)
    for n in range(2):
        one.append_event({"n": n})
    one.append_event({"n": 2})
    task = asyncio.create_task(one.run())
    await until(lambda: len(store.events(9)) == 2)
    await one.wait_until_written(5.0)
    assert [event["n"] for event in store.events(9)] == [2, 1], "the write with another failure is dropped, not retried"
    assert errors.count == 3
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


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
    one, _ = writer(store)
    one._blobs = blobs = LoopOnly()
    one.put_blob("learned", b"1")
    await one.drain()
    assert store.get_blob("learned") == b"1"
    assert blobs.threads == {threading.get_ident()}


async def test_writes_beyond_the_queue_are_counted() -> None:
    one, errors = writer(MemoryStore())
    for n in range(MAX_QUEUED_WRITES + 2):
        one.set_state("n", str(n))
    assert errors.count == 2


def test_a_repeated_message_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    errors = StoreErrorLog()
    for message in ("away", "away", "damaged"):
        errors.record(StoreFailure(message))
    assert [record.message for record in caplog.records] == ["away", "damaged"]
    assert errors.count == 3


class FailingBlobs(FailingStore):
    def put_blob(self, key: str, data: bytes) -> None:
        if self.failures:
            raise self.failures.pop(0)
        super().put_blob(key, data)


async def test_of_blobs_that_wait_only_the_newest_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "RETRY_SECONDS", (0.0,))
    store = FailingBlobs(StoreUnreachable("away"), StoreUnreachable("away"))
    one, errors = writer(store)
    for n in range(3 * MAX_QUEUED_WRITES):
        one.put_blob("learner", bytes([n % 256]))
        one.put_blob("other", b"x")
    running = asyncio.create_task(one.run())
    await one.wait_until_written(30)
    running.cancel()
    assert store.get_blob("learner") == bytes([(3 * MAX_QUEUED_WRITES - 1) % 256])
    assert store.get_blob("other") == b"x"
    assert errors.count == 2
