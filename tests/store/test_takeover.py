"""How soon a waiting process owns a PostgreSQL store whose owner is killed, stopped, or cut off from the network."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tests.support import postgres
from tests.support.network import namespace
from tests.support.waiting import until

from hemostat.control.ownership import Ownership
from hemostat.store.errors import StoreErrorLog
from hemostat.store.postgres import PostgresStore

CRASH_SECONDS, VANISHED_SECONDS = 5.0, 15.0


@dataclass(frozen=True, slots=True)
class Owner:
    """A process that owns a store."""

    process: subprocess.Popen[str]

    def next_state(self) -> tuple[str, float]:
        """Which it came to, and when."""
        assert self.process.stdout is not None
        state, when = json.loads(self.process.stdout.readline())
        return state, when


@contextmanager
def owner(command: list[str]) -> Iterator[Owner]:
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Owner(process)
        finally:
            process.kill()


def program(url: str) -> list[str]:
    return [sys.executable, "-m", "tests.support.owner_process", url]


async def taken_over(url: str, fault: Callable[[], None]) -> tuple[float, float]:
    """When the fault was, and when the process that had waited could decide. It has written, then."""
    store = PostgresStore(url)
    ownership = Ownership(store, StoreErrorLog())
    beginning = asyncio.create_task(ownership.begin())
    await until(ownership.settled.is_set)
    fault()
    at = time.monotonic()
    await beginning
    ownership.activate()
    active = time.monotonic()
    ownership.writer.append_event({"by": "successor"})
    await ownership.writer.write()
    store.close()
    return at, active


async def test_a_waiting_process_takes_over() -> None:
    with namespace() as network, postgres.running(f"127.0.0.1,{network.address}") as server:
        urls = [server.url(server.new_database()) for _ in range(3)]
        cut_off = urls[2].replace("127.0.0.1", network.address)
        with (
            owner(program(urls[0])) as killed,
            owner(program(urls[1])) as stopped,
            owner(network.command(program(cut_off))) as vanished,
        ):
            for one in (killed, stopped, vanished):
                assert one.next_state()[0] == "active"
            faults = (killed.process.kill, lambda: stopped.process.send_signal(signal.SIGSTOP), network.drop)
            found = await asyncio.gather(*map(taken_over, urls, faults))
            names = ("kill -9", "SIGSTOP", "network")
            seconds = {name: active - at for name, (at, active) in zip(names, found, strict=True)}
            print(seconds)
            state, when = vanished.next_state()
            assert (state, when < found[2][1]) == ("suspended", True), "both have decided at the same time"
            stopped.process.send_signal(signal.SIGCONT)
            network.restore()
            for one in (stopped, vanished):
                while one.next_state()[0] != "ended":
                    pass
        for url in urls:
            store = PostgresStore(url)
            assert store.read().events[0] == {"by": "successor"}, "who was superseded has written after it"
            store.close()
    assert seconds["kill -9"] <= CRASH_SECONDS
    assert max(seconds.values()) <= VANISHED_SECONDS
