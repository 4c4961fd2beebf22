"""kill -9 of one process at a time: a request breaks only on a connection that the killed process had accepted.

Two `hemostat control`, two `hemostat relay`, an engine and a store as in `planes.py`. Each failure of a client is
written to standard error: how many bytes of the answer had come, and which process had accepted the connection.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import sys
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import AsyncExitStack
from functools import partial

from tests.bench.faults import Row
from tests.bench.faults.planes import CLIENTS, RUNS, SEED, TOKENS, World, deployed, end_of
from tests.support.planes import CONTROL, RELAY, Instance, Relay, ready
from tests.support.served import is_spare
from tests.support.streaming_load import streaming_load

NAME = "kills"
TAKES = f"5 minutes: {RUNS} kills of each process"

Kill = Callable[[World, random.Random], Awaitable[Collection[int]]]
"""Returns the processes that were killed."""
BEFORE = "39 of 40 clients cut in 10 kills"
"""The figure for the supervisor of a relay at commit 2176a512. The relay closed its connections at once."""
_OWNER = re.compile(r"connection of process (\d+)")


def _killed(pids: Collection[int]) -> Collection[int]:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    return pids


def relays_of(relay: Relay, *, spare: bool) -> list[int]:
    """The relay processes without the spare one, or the spare one alone."""
    return [pid for pid in relay.children(RELAY) if is_spare(pid) is spare]


async def relay_process(world: World, draw: random.Random) -> Collection[int]:
    return _killed(relays_of(draw.choice(world.planes.relays), spare=False))


async def spare_relay(world: World, draw: random.Random) -> Collection[int]:
    return _killed(relays_of(draw.choice(world.planes.relays), spare=True))


async def admin_port(world: World, draw: random.Random) -> Collection[int]:
    return _killed(draw.choice(world.planes.relays).children("relay_admin"))


async def active_control(world: World, draw: random.Random) -> Collection[int]:
    return _killed((await world.planes.active()).children(CONTROL))


async def standby_control(world: World, draw: random.Random) -> Collection[int]:
    active = await world.planes.active()
    return _killed([pid for each in world.planes.controls if each is not active for pid in each.children(CONTROL)])


async def _supervisor(instance: Instance) -> Collection[int]:
    """The supervisor alone; the command is started again once all of its processes are gone."""
    processes = instance.pids()
    result = _killed([instance.process.pid])
    instance.process.wait()
    await end_of(processes, instance)
    instance.start()
    await ready(instance)
    return result


async def supervisor_of_control(world: World, draw: random.Random) -> Collection[int]:
    return await _supervisor(await world.planes.active())


async def supervisor_of_relay(world: World, draw: random.Random) -> Collection[int]:
    return await _supervisor(draw.choice(world.planes.relays))


KILLS: dict[str, Kill] = {
    "a relay process": relay_process,
    "the spare relay": spare_relay,
    "the admin port's process of `hemostat relay`": admin_port,
    "the active control process": active_control,
    "the control process that waits": standby_control,
    "the supervisor of the active control process": supervisor_of_control,
    "the supervisor of a relay, whose port refuses connections until it is started again": supervisor_of_relay,
}


async def measured(kill: Kill, kills: int, seed: int) -> tuple[int, int, list[str]]:
    """The answers that were complete, those that broke on a connection of a killed process, and what else failed.

    A refused connection is a failure, too, where the supervisor of a relay was not killed.
    """
    draw = random.Random(seed)
    killed: set[int] = set()
    async with AsyncExitStack() as stack:
        world = await stack.enter_async_context(deployed(server=False))
        loads = [
            await stack.enter_async_context(
                streaming_load(
                    relay.data, CLIENTS, TOKENS, conversations=True, pids=partial(relays_of, relay, spare=False)
                )
            )
            for relay in world.planes.relays
        ]
        for _ in range(kills):
            await world.planes.active()
            await asyncio.sleep(draw.uniform(0.0, 0.3))
            killed.update(await kill(world, draw))
            for load in loads:
                await load.until_more(4 * CLIENTS)
    failures = [text for load in loads for text in load.failures]
    if kill is supervisor_of_relay:
        failures = [text for text in failures if not text.startswith("refused")]
    own = [text for text in failures if (found := _OWNER.search(text)) and int(found[1]) in killed]
    for text in failures:
        print(f"{text}; killed: {sorted(killed)}", file=sys.stderr)
    return sum(load.complete for load in loads), len(own), [text for text in failures if text not in own]


def rows() -> Iterator[Row]:
    for name, kill in KILLS.items():
        complete, own, others = asyncio.run(measured(kill, RUNS, SEED))
        text = f"{RUNS} x: {complete} answers complete, {own} cut that it had accepted, {len(others)} others"
        text += "".join(f"; {what}" for what in others[:3])
        wanted = "none fails but those that it had accepted"
        before = BEFORE if kill is supervisor_of_relay else ""
        yield Row(f"kill -9 of {name}", before, text, wanted, not others)
