"""How soon a waiting process owns a PostgreSQL store whose owner is killed, stopped, or cut off from the network."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pytest
from tests.support import postgres
from tests.support.network import namespace
from tests.support.waiting import until

from hemostat.control.ownership import Ownership
from hemostat.store.errors import StoreErrorLog
from hemostat.store.postgres import PostgresStore
from hemostat.store.protocol import Head

CRASH_SECONDS, VANISHED_SECONDS = 30.0, 60.0
"""On a busy machine; `make bench-faults` has limits of 5 and 15. Where nobody looks, it takes hours."""


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


async def taken_over(url: str, fault: Callable[[], None]) -> tuple[float, float, Head]:
    """When the fault was, when the process that had waited could decide, and what it has committed since: nothing but
    that it is the owner."""
    store = PostgresStore(url)
    ownership = Ownership(store, StoreErrorLog())
    beginning = asyncio.create_task(ownership.begin())
    await until(ownership.settled.is_set)
    fault()
    at = time.monotonic()
    await beginning
    ownership.activate()
    active = time.monotonic()
    await ownership.writer.write()
    store.close()
    return at, active, ownership.writer.head


async def test_a_waiting_process_takes_over() -> None:
    with ExitStack() as stack:
        try:
            network, why = stack.enter_context(namespace()), ""
        except pytest.skip.Exception as skipped:
            network, why = None, str(skipped)
        listen = "127.0.0.1" if network is None else f"127.0.0.1,{network.address}"
        server = stack.enter_context(postgres.running(listen))
        urls = {name: server.url(server.new_database()) for name in ("kill -9", "SIGSTOP", "network")}
        killed = stack.enter_context(owner(program(urls["kill -9"])))
        stopped = stack.enter_context(owner(program(urls["SIGSTOP"])))
        faults = {"kill -9": killed.process.kill, "SIGSTOP": lambda: stopped.process.send_signal(signal.SIGSTOP)}
        owners = [killed, stopped]
        if network is not None:
            cut_off = urls["network"].replace("127.0.0.1", network.address)
            owners.append(stack.enter_context(owner(network.command(program(cut_off)))))
            faults["network"] = network.drop
        for process in owners:
            assert process.next_state()[0] == "active"
        result = await asyncio.gather(*(taken_over(urls[name], fault) for name, fault in faults.items()))
        seconds = {name: active - at for name, (at, active, _) in zip(faults, result, strict=True)}
        print(seconds)
        if network is not None:
            state, when = owners[2].next_state()
            assert (state, when < result[2][1]) == ("suspended", True), "both have decided at the same time"
            network.restore()
        stopped.process.send_signal(signal.SIGCONT)
        for process in owners[1:]:
            while process.next_state()[0] != "ended":
                pass
        for name, (_, _, head) in zip(faults, result, strict=True):
            store = PostgresStore(urls[name])
            assert store.head() == head, "who was superseded has written after it"
            store.close()
    assert seconds["kill -9"] <= CRASH_SECONDS
    assert max(seconds.values()) <= VANISHED_SECONDS
    if why:
        pytest.skip(f"the others take over; no network is dropped: {why}")
