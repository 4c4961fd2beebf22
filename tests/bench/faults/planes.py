"""kill -9 and SIGSTOP of control processes and relays at random moments, while clients stream through two relays.

Two `hemostat control`, one of which is active, two `hemostat relay` by TCP with TLS, an engine that reports, a
reference that scores, and a store: SQLite here, PostgreSQL in `database.py`, which is killed and stopped, too.

A supervisor that is killed alone leaves no process behind: its command can be started again.

In each run an operator does something until it is answered with 200, then something else, and within 0.3 s a process is
killed or stopped. The run ends when one control process is active and has both relays. Then the store itself is read:
it holds what was answered with 200, and nothing is lost of what it has held (tests/support/nothing_lost.py).
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from tests.bench.faults import Row
from tests.support import postgres
from tests.support.constant_profile import constant_profile
from tests.support.fake_vllm import VOCAB, FakeVllm, serving
from tests.support.nothing_lost import check, counts
from tests.support.planes import CONTROL, RELAY, Instance, Planes, Relay, engine, planes, ready
from tests.support.postgres import Postgres
from tests.support.stores import stored
from tests.support.streaming_load import Load, streaming_load

from hemostat.ipc.supervised import STOP_SECONDS
from hemostat.profiles.persistence import MODE_KEY
from hemostat.store.protocol import Snapshot, StoreFailure

NAME = "planes"
TAKES = "1 minute with 5 runs (`--runs`)"

RUNS_VARIABLE, SEED_VARIABLE = "FAULT_RUNS", "FAULT_SEED"
RUNS, SEED = 5, 26
CLIENTS = 3
"""Of each relay."""
TOKENS, TOKEN_SECONDS = 5, 0.04
CRASH_SECONDS, VANISHED_SECONDS = 5.0, 15.0
"""At most, until another control process is active."""
LEFT_SECONDS = STOP_SECONDS + 5.0
"""The seconds that a process may outlive its supervisor: it stops in order, and ends itself where that takes too
long."""
HANG_SECONDS = 60.0
SETTINGS: Mapping[str, Any] = {
    "shadow": {"rate": 0.5, "top_k": 8},
    "calibration": {"mode": "auto"},
    "alarm": {"baseline_requests": 30},
}


@dataclass(slots=True)
class Outcome:
    """Of all runs of one fault."""

    runs: int = 0
    failures: list[str] = field(default_factory=list)
    """Of requests, beside those that were in a relay that was killed."""
    cut: int = 0
    """The endings of the requests that were in it."""
    seconds: list[float] = field(default_factory=list)
    """From the fault until another control process was active."""
    lost: list[str] = field(default_factory=list)
    """What the store does not hold."""


@dataclass(slots=True)
class World:
    """url: of the store. server: None: it is SQLite. versions: that the engine says it holds."""

    planes: Planes
    url: str
    server: Postgres | None
    versions: list[str]
    hit: Relay | None = None
    """The relay that the present fault hits."""

    async def stored(self) -> Snapshot:
        end = time.monotonic() + HANG_SECONDS
        while True:
            try:
                return await asyncio.to_thread(stored, self.url)
            except StoreFailure:  # the server has just been started
                if time.monotonic() > end:
                    raise
                await asyncio.sleep(0.1)


# --- what an operator does -----------------------------------------------------------------------------------------


Kept = Callable[[Snapshot, Snapshot], bool]
"""Whether the store holds what was done, by what it held before and holds after."""


@dataclass(frozen=True, slots=True)
class Action:
    """A request to the admin port of the active control process."""

    name: str
    path: str
    given: dict[str, Any]
    is_kept: Kept

    async def done(self, active: Instance) -> bool:
        """Whether it was answered with 200."""
        try:
            return (await active.post(self.path, **self.given)).status_code == 200
        except httpx.TransportError:
            return False


def importing(world: World, draw: random.Random) -> Action:
    bias = np.random.default_rng(draw.getrandbits(32)).normal(0.0, 0.5, VOCAB)
    profile = constant_profile("fake", bias, 1.0)
    world.versions.append(profile.version)
    kept = _has_event("import", profile.version)
    return Action("import", "/api/v1/profiles", {"content": profile.to_bytes()}, kept)


def promoting(world: World, draw: random.Random) -> Action:
    version = world.versions[-1]
    return Action("promote", "/api/v1/profiles/promote", {"json": {"version": version}}, _has_event("promote", version))


def rolling_back(world: World, draw: random.Random) -> Action:
    return Action("roll back", "/api/v1/profiles/rollback", {}, _has_event("roll_back"))


def setting_mode(world: World, draw: random.Random) -> Action:
    mode = draw.choice(["observe", "auto"])
    is_kept: Kept = lambda before, after: _mode(after) == mode  # noqa: E731
    return Action("mode", "/api/v1/calibration", {"json": {"mode": mode}}, is_kept)


def rebasing(world: World, draw: random.Random) -> Action:
    return Action(
        "rebase", "/api/v1/alarm/rebase", {}, lambda before, after: after.head.revision > before.head.revision
    )


ACTIONS = (promoting, promoting, rolling_back, setting_mode, rebasing)


def _has_event(decision: str, version: str | None = None) -> Kept:
    """A new one."""

    def number(snapshot: Snapshot) -> int:
        result = (event for event in snapshot.events if event["decision"] == decision)
        return sum(version in (None, event["version"]) for event in result)

    return lambda before, after: number(after) > number(before)


def _mode(snapshot: Snapshot) -> str:
    """The one that is configured where none is stored."""
    stored = snapshot.states.get(MODE_KEY)
    return "auto" if stored is None else str(json.loads(stored)["state"]["mode"])


# --- what fails ----------------------------------------------------------------------------------------------------

Fault = Callable[[World, Instance, random.Random], Awaitable[float | None]]
"""Returns the seconds until another control process is active, where there is one. The instance: the active one."""


async def _taken_over(world: World, began: float, but: Instance | None = None) -> float:
    await world.planes.active(but=but, with_relays=False)
    return time.monotonic() - began


async def kill_control(world: World, active: Instance, draw: random.Random) -> float:
    """Its supervisor starts it again."""
    began = time.monotonic()
    for pid in active.children(CONTROL):
        os.kill(pid, signal.SIGKILL)
    return await _taken_over(world, began)


async def kill_machine(world: World, active: Instance, draw: random.Random) -> float:
    began = time.monotonic()
    active.kill()
    seconds = await _taken_over(world, began, active)
    active.start()
    return seconds


async def kill_supervisor(world: World, active: Instance, draw: random.Random) -> float:
    """Its control process stops in order, and nobody is there who would kill it."""
    began, processes = time.monotonic(), active.pids()
    active.process.kill()
    active.process.wait()
    seconds = await _taken_over(world, began, active)
    await end_of(processes, active)
    active.start()
    return seconds


async def end_of(processes: Mapping[int, str], instance: Instance) -> None:
    """Wait until all of these are gone."""
    end = time.monotonic() + LEFT_SECONDS
    while left := {pid: name for pid, name in processes.items() if os.path.exists(f"/proc/{pid}")}:  # noqa: ASYNC240
        assert time.monotonic() < end, f"outlived their supervisor: {left}\n{instance.log.read_text()[-5000:]}"
        await asyncio.sleep(0.05)


async def kill_supervisor_of_relay(world: World, active: Instance, draw: random.Random) -> None:
    """The relay lets its requests end, and goes."""
    world.hit = relay = draw.choice(world.planes.relays)
    processes = relay.pids()
    relay.process.kill()
    relay.process.wait()
    await end_of(processes, relay)
    relay.start()
    await ready(relay)


async def stop_control(world: World, active: Instance, draw: random.Random) -> float | None:
    """With SQLite the other one waits: the lock is held."""
    began, seconds = time.monotonic(), None
    active.signal(signal.SIGSTOP)
    try:
        if world.server is None:
            await asyncio.sleep(draw.uniform(0.5, 14.0))  # relays leave a silent control process after ten seconds
        else:
            seconds = await _taken_over(world, began, active)
    finally:
        active.signal(signal.SIGCONT)
    return seconds


async def kill_relay(world: World, active: Instance, draw: random.Random) -> None:
    world.hit = draw.choice(world.planes.relays)
    for pid in world.hit.children(RELAY):
        os.kill(pid, signal.SIGKILL)


async def stop_relay(world: World, active: Instance, draw: random.Random) -> None:
    relay = draw.choice(world.planes.relays)
    relay.signal(signal.SIGSTOP)
    await asyncio.sleep(draw.uniform(0.0, 3.0))
    relay.signal(signal.SIGCONT)


async def kill_server(world: World, active: Instance, draw: random.Random) -> None:
    assert world.server is not None
    world.server.kill()
    await asyncio.sleep(draw.uniform(0.0, 3.0))
    await asyncio.to_thread(world.server.start)


async def stop_server(world: World, active: Instance, draw: random.Random) -> None:
    assert world.server is not None
    world.server.freeze()
    await asyncio.sleep(draw.uniform(0.0, 12.0))
    world.server.thaw()


FAULTS: dict[str, Fault] = {
    "kill -9 of the active control process": kill_control,
    "kill -9 of it and of its supervisor": kill_machine,
    "kill -9 of its supervisor alone": kill_supervisor,
    "SIGSTOP of the active control process": stop_control,
    "kill -9 of the processes of a relay": kill_relay,
    "kill -9 of the supervisor of a relay alone": kill_supervisor_of_relay,
    "SIGSTOP of a relay, up to 3 s": stop_relay,
}
SERVER_FAULTS: dict[str, Fault] = {
    "kill -9 of PostgreSQL, started after up to 3 s": kill_server,
    "SIGSTOP of PostgreSQL, up to 12 s": stop_server,
}
LIMITS = {
    kill_control: CRASH_SECONDS,
    kill_machine: CRASH_SECONDS,
    kill_supervisor: LEFT_SECONDS,
    stop_control: VANISHED_SECONDS,
}
HITS: Mapping[Fault, tuple[str, ...]] = {kill_relay: ("cut",), kill_supervisor_of_relay: ("refused",)}
"""The errors that clients of the relay that is hit may see; nobody else's request fails. A relay without its supervisor
answers what it has and what waits in its queue, and then its port refuses connections."""


# --- runs ----------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def deployed(*, server: bool) -> AsyncIterator[World]:
    """server: the store is PostgreSQL."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        database = stack.enter_context(postgres.running()) if server else None
        url = database.url(database.new_database()) if database is not None else f"sqlite:///{folder / 'store.db'}"
        upstream = stack.enter_context(serving(FakeVllm(noise=0.5, token_delay=TOKEN_SECONDS)))
        reference = {"backend": "vllm", "url": stack.enter_context(serving(FakeVllm()))}
        made = await stack.enter_async_context(planes(folder, upstream, store=url, reference=reference, **SETTINGS))
        versions: list[str] = []
        await stack.enter_async_context(engine(made.controls, versions, VOCAB))
        await made.until(await made.active(), lambda status: status["reference"]["state"] == "ready")
        yield World(made, url, database, versions)


async def measured(runs: int, seed: int, *, server: bool) -> tuple[dict[str, Outcome], Snapshot]:
    """By fault, and what is stored at the end."""
    draw = random.Random(seed)
    faults = FAULTS | (SERVER_FAULTS if server else {})
    outcomes = {name: Outcome() for name in faults}
    async with AsyncExitStack() as stack:
        world = await stack.enter_async_context(deployed(server=server))
        loads = [
            await stack.enter_async_context(streaming_load(relay.data, CLIENTS, TOKENS, conversations=True))
            for relay in world.planes.relays
        ]
        after = await world.stored()
        for number in range(runs):
            name = draw.choice(list(faults))
            after = await one_run(world, loads, outcomes[name], faults[name], after, draw)
            print(f"{number + 1}: {name}: {outcomes[name]}", file=sys.stderr, flush=True)
    return outcomes, after


async def one_run(
    world: World, loads: list[Load], outcome: Outcome, fault: Fault, before: Snapshot, draw: random.Random
) -> Snapshot:
    """What is stored after it."""
    active = await world.planes.active()
    for other in world.planes.controls:
        if other is not active:
            await world.planes.until(other, lambda status: status["control"]["state"] == "standby")
    failures = [len(load.failures) for load in loads]
    done = [await first_action(world, draw)]
    setting = asyncio.create_task((action := draw.choice(ACTIONS)(world, draw)).done(active))
    await asyncio.sleep(draw.uniform(0.0, 0.3))
    seconds = await fault(world, active, draw)
    await world.planes.active()
    if await setting:
        done.append(action)
    for load in loads:
        await load.until_more(2 * CLIENTS)
    after = await world.stored()
    outcome.runs += 1
    if seconds is not None:
        outcome.seconds.append(seconds)
    for relay, load, known in zip(world.planes.relays, loads, failures, strict=True):
        new = load.failures[known:]
        if relay is world.hit and fault in HITS:
            outcome.cut += sum(text.startswith(HITS[fault]) for text in new)
            new = [text for text in new if not text.startswith(HITS[fault])]
        outcome.failures += new
    world.hit = None
    outcome.lost += [f"{request.name} was answered with 200" for request in done if not request.is_kept(before, after)]
    try:
        check(before, after)
    except AssertionError as error:
        outcome.lost.append(str(error))
    return after


async def first_action(world: World, draw: random.Random) -> Action:
    """Done, and answered with 200, at last: who is active may just be finding out that it is not any more."""
    action, end = importing(world, draw), time.monotonic() + HANG_SECONDS
    while not await action.done(await world.planes.active()):
        assert time.monotonic() < end, f"nothing is answered with 200 in {HANG_SECONDS:g} s"
        await asyncio.sleep(0.2)
    return action


def rows(*, server: bool = False) -> Iterator[Row]:
    """server: the store is PostgreSQL."""
    runs, seed = int(os.environ.get(RUNS_VARIABLE, RUNS)), int(os.environ.get(SEED_VARIABLE, SEED))
    outcomes, after = asyncio.run(measured(runs, seed, server=server))
    for name, outcome in outcomes.items():
        limit = LIMITS.get((FAULTS | SERVER_FAULTS)[name], 0.0)
        text = f"{outcome.runs} x: {len(outcome.failures)} requests failed"
        text += f", {outcome.cut} that it had, or would have had, failed" if outcome.cut else ""
        text += f"; active after {min(outcome.seconds):.1f} to {max(outcome.seconds):.1f} s" if outcome.seconds else ""
        text += "".join(f"; {what}" for what in [*outcome.failures[:3], *outcome.lost[:3]])
        wanted = "none fails, nothing is lost" + (f", active within {limit:g} s" if outcome.seconds else "")
        holds = not outcome.failures and not outcome.lost and max(outcome.seconds, default=0.0) <= limit
        yield Row(name, "", text, wanted, holds)
    yield from begun(after, runs)


def begun(after: Snapshot, runs: int) -> Iterator[Row]:
    """What could have been lost."""
    result = Counter[str]()
    for name, number in counts(after).items():
        result["windows" if name.startswith("windows") else name] += number
    result["events"] = len(after.events)
    result["revisions"] = after.head.revision
    text = ", ".join(f"{number} {name}" for name, number in result.items())
    holds = runs < 20 or all(result[name] for name in ("tests", "windows", "alarms"))
    yield Row("what the store has counted by then", "", text, "some of each", holds)
