"""SIGSTOP of the active control process and of a relay, while clients stream: for 20 s, and for good.

Supervisors kill the processes that stay stopped: the store's lock is then free, and another relay takes the
connections. A process that goes on after 20 s is not killed.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from functools import partial

from tests.bench.faults import Row
from tests.bench.faults.kills import relays_of
from tests.bench.faults.planes import CLIENTS, CRASH_SECONDS, TOKENS, deployed
from tests.support.planes import CONTROL
from tests.support.streaming_load import streaming_load
from tests.support.waiting import until

from hemostat.ipc.liveness import BEAT_SECONDS, LOOK_SECONDS, RELAY_SILENT_SECONDS, SILENT_SECONDS

NAME = "stops"
TAKES = "3 minutes"

BUSY_SECONDS = 20.0
"""The seconds of a stop after which a process goes on."""
NOTICED_SECONDS = BEAT_SECONDS + 2 * LOOK_SECONDS
"""The longest time that a supervisor needs in addition to its limit."""


async def measured() -> list[Row]:
    async with AsyncExitStack() as stack:
        world = await stack.enter_async_context(deployed(server=False))
        relay, other = world.planes.relays
        pids = partial(relays_of, relay, spare=False)
        load, spared = [
            await stack.enter_async_context(streaming_load(each.data, CLIENTS, TOKENS, conversations=True, pids=own))
            for each, own in ((relay, pids), (other, partial(relays_of, other, spare=False)))
        ]
        active = await world.planes.active()
        stopped = [*active.children(CONTROL), *pids()]
        control_pid, relay_pid = stopped

        _signal(stopped, signal.SIGSTOP)
        await asyncio.sleep(BUSY_SECONDS)
        _signal(stopped, signal.SIGCONT)
        await world.planes.active()
        await load.until_more(2 * CLIENTS)
        same = [*active.children(CONTROL), *pids()] == stopped
        failures = len(load.failures) + len(spared.failures)
        text = f"{'the same processes go on' if same else 'killed'}, {failures} requests failed"
        busy = Row(
            f"SIGSTOP of both for {BUSY_SECONDS:g} s", "", text, "the same go on, none fails", same and not failures
        )

        began = time.monotonic()
        _signal(stopped, signal.SIGSTOP)
        await world.planes.active(but=active, with_relays=False)
        seconds = time.monotonic() - began
        await until(lambda: not os.path.exists(f"/proc/{relay_pid}"), RELAY_SILENT_SECONDS + 2 * NOTICED_SECONDS)
        relay_seconds = time.monotonic() - began
        await load.until_more(2 * CLIENTS)
        await spared.until_more(2 * CLIENTS)
        own = [text for text in load.failures if f"connection of process {relay_pid}:" in text]
        others = [text for text in [*load.failures, *spared.failures] if text not in own]
    limit, relay_limit = SILENT_SECONDS + NOTICED_SECONDS + CRASH_SECONDS, RELAY_SILENT_SECONDS + NOTICED_SECONDS
    return [
        busy,
        Row(
            "SIGSTOP of the active control process for good",
            "the standby waited for good (SQLite)",
            f"another one active after {seconds:.0f} s",
            f"active within {limit:g} s",
            seconds <= limit and control_pid not in active.children(CONTROL),
        ),
        Row(
            "SIGSTOP of a relay for good",
            "its clients waited for good",
            f"killed after {relay_seconds:.0f} s; {len(own)} cut that it had accepted, {len(others)} others",
            f"killed within {relay_limit:g} s, none fails but those that it had accepted",
            relay_seconds <= relay_limit and not others,
        ),
    ]


def _signal(pids: list[int], sig: signal.Signals) -> None:
    for pid in pids:
        os.kill(pid, sig)


def rows() -> Iterator[Row]:
    yield from asyncio.run(measured())
