"""Relays, two control processes and their PostgreSQL are killed and stopped at random moments, while clients stream.

`hemostat relay` with two relays, and two `hemostat control` of which one is active. Each run sets the mode at the
active one, and a moment later kills or stops something; it ends when one is active again. After each run the database
itself is read: what was answered with 200 is stored, no event is missing, and the salt is the same.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml
from tests.bench.faults import Row
from tests.support import postgres
from tests.support.fake_vllm import FakeVllm, serving
from tests.support.postgres import Postgres
from tests.support.served import AUTHORIZED, RELAY, TOKEN, is_spare
from tests.support.streaming_load import Load, streaming_load
from tests.support.waiting import until

from hemostat.control.stored_state import SALT_KEY
from hemostat.models.vllm_server import free_port
from hemostat.profiles.persistence import MODE_KEY
from hemostat.store.postgres import PostgresStore
from hemostat.store.protocol import Snapshot, StoreFailure

NAME = "database"
TAKES = "25 minutes"

RUNS = 200
CLIENTS = 8
WAIT_SECONDS = 120.0
CONTROL = "hemostat.control.process"
CRASH_SECONDS, VANISHED_SECONDS = 5.0, 15.0


@dataclass(slots=True)
class Outcome:
    """Of all runs of one fault."""

    runs: int = 0
    refused: int = 0
    cut: int = 0
    failed: int = 0
    seconds: list[float] = field(default_factory=list)
    """From the fault until a control process was active, where it was not the same one all the time."""
    broken: list[str] = field(default_factory=list)
    """What the database did not hold."""


class Process:
    """`hemostat relay` or `hemostat control`."""

    def __init__(self, command: str, folder: Path, settings: dict[str, Any]) -> None:
        folder.mkdir()
        self.log = folder / "log"
        self.admin = settings["admin"]["port"]
        (folder / "hemostat.yaml").write_text(yaml.safe_dump(settings | {"run_dir": str(folder)}))
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "hemostat", command, "--config", str(folder / "hemostat.yaml")],
                stdout=log,
                stderr=log,
            )

    def pids(self, module: str) -> list[int]:
        """Of its children that run this module."""
        parent = self.process.pid
        found = []
        for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
            with suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if module.encode() in command and not (module == RELAY and is_spare(int(pid))):
                    found.append(int(pid))
        return found

    async def state(self) -> str:
        """ "" where it does not answer."""
        with suppress(httpx.HTTPError, KeyError, ValueError):
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.admin}", timeout=1) as client:
                return str((await client.get("/api/v1/status")).json()["control"]["state"])
        return ""

    async def set_mode(self, mode: str) -> int:
        """The status; 0 where there was no answer."""
        with suppress(httpx.HTTPError):
            address = f"http://127.0.0.1:{self.admin}"
            async with httpx.AsyncClient(base_url=address, headers=AUTHORIZED, timeout=WAIT_SECONDS) as client:
                return (await client.post("/api/v1/calibration", json={"mode": mode})).status_code
        return 0

    def end(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        finally:
            self.process.kill()
            self.process.wait()


class Deployment:
    """server: the database's. url: of the store."""

    def __init__(self, server: Postgres, url: str, relay: Process, controls: list[Process], data: str) -> None:
        self.server, self.url, self.relay, self.controls, self.data = server, url, relay, controls, data

    async def active(self, *, others_wait: bool = False) -> Process:
        """The control process that is active, once one is. others_wait: and the other one is ready to take over."""
        end = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < end:
            states = await asyncio.gather(*(one.state() for one in self.controls))
            if "active" in states and (not others_wait or "standby" in states):
                return self.controls[states.index("active")]
            await asyncio.sleep(0.05)
        raise AssertionError("".join(one.log.read_text()[-3000:] for one in self.controls))

    async def stored(self) -> Snapshot:
        def read() -> Snapshot:
            store = PostgresStore(self.url)
            try:
                return store.read()
            finally:
                store.close()

        end = time.monotonic() + WAIT_SECONDS
        while True:
            try:
                return await asyncio.to_thread(read)
            except StoreFailure:
                if time.monotonic() > end:
                    raise
                await asyncio.sleep(0.1)


Fault = Callable[[Deployment, Process, random.Random], Awaitable[None]]
"""Returns once a control process is active again. The process: the active one."""


async def kill_control(deployment: Deployment, active: Process, chance: random.Random) -> None:
    for pid in active.pids(CONTROL):
        os.kill(pid, signal.SIGKILL)
    await deployment.active()


async def stop_control(deployment: Deployment, active: Process, chance: random.Random) -> None:
    pids = active.pids(CONTROL)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        await deployment.active()
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


async def kill_relay(deployment: Deployment, active: Process, chance: random.Random) -> None:
    os.kill(chance.choice(deployment.relay.pids(RELAY)), signal.SIGKILL)
    await until(lambda: len(deployment.relay.pids(RELAY)) == 2, WAIT_SECONDS)


async def stop_relay(deployment: Deployment, active: Process, chance: random.Random) -> None:
    pid = chance.choice(deployment.relay.pids(RELAY))
    os.kill(pid, signal.SIGSTOP)
    await asyncio.sleep(chance.uniform(0, 3))
    os.kill(pid, signal.SIGCONT)


async def kill_server(deployment: Deployment, active: Process, chance: random.Random) -> None:
    deployment.server.kill()
    await asyncio.sleep(chance.uniform(0, 3))
    await asyncio.to_thread(deployment.server.start)
    await deployment.active()


async def stop_server(deployment: Deployment, active: Process, chance: random.Random) -> None:
    deployment.server.freeze()
    await asyncio.sleep(chance.uniform(0, 12))
    deployment.server.thaw()
    await deployment.active()


FAULTS: dict[str, Fault] = {
    "kill -9 of the active control process": kill_control,
    "SIGSTOP of the active control process until another one is active": stop_control,
    "kill -9 of a relay": kill_relay,
    "SIGSTOP of a relay, up to 3 s": stop_relay,
    "kill -9 of PostgreSQL, started after up to 3 s": kill_server,
    "SIGSTOP of PostgreSQL, up to 12 s": stop_server,
}
LIMITS = {kill_control: CRASH_SECONDS, stop_control: VANISHED_SECONDS}
"""Seconds until another one is active."""


@asynccontextmanager
async def deployed() -> AsyncIterator[Deployment]:
    upstream = FakeVllm(token_delay=0.01)
    with ExitStack() as stack:
        server = stack.enter_context(postgres.running())
        engine = stack.enter_context(serving(upstream))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url = server.url(server.new_database())
        common = {"upstream": {"url": engine}, "shadow": {"rate": 0.1, "top_k": 8}, "store": {"url": url}}
        addresses = [f"127.0.0.1:{free_port()}" for _ in range(2)]

        def started(command: str, name: str, control: dict[str, Any], **more: Any) -> Process:
            admin = {"port": free_port(), "token": TOKEN}
            settings = common | {"admin": admin, "control": {"token": TOKEN} | control} | more
            one = Process(command, folder / name, settings)
            stack.callback(one.end)
            return one

        controls = [started("control", f"control{n}", {"listen": address}) for n, address in enumerate(addresses)]
        port = free_port()
        listen = {"host": "127.0.0.1", "port": port}
        relay = started("relay", "relay", {"addresses": addresses}, listen=listen, workers=2)
        deployment = Deployment(server, url, relay, controls, f"http://127.0.0.1:{port}")
        await deployment.active()
        await until(lambda: len(relay.pids(RELAY)) == 2, WAIT_SECONDS)
        yield deployment


async def measured(runs: int, seed: int) -> dict[str, Outcome]:
    chance = random.Random(seed)
    outcomes = {name: Outcome() for name in FAULTS}
    async with deployed() as deployment, streaming_load(deployment.data, CLIENTS) as load:
        await load.until_more(CLIENTS)
        before = await deployment.stored()
        for number in range(runs):
            name = chance.choice(list(FAULTS))
            before = await one_run(deployment, load, outcomes[name], FAULTS[name], before, chance)
            print(f"{number + 1}: {name}: {outcomes[name]}", file=sys.stderr, flush=True)
    return outcomes


async def one_run(
    deployment: Deployment, load: Load, outcome: Outcome, fault: Fault, before: Snapshot, chance: random.Random
) -> Snapshot:
    """What is stored after it."""
    counts = (load.refused, load.cut, load.failed)
    active = await deployment.active(others_wait=True)
    mode = "auto" if stored_mode(before) == "observe" else "observe"
    setting = asyncio.create_task(active.set_mode(mode))
    await asyncio.sleep(chance.uniform(0, 0.3))
    began = time.monotonic()
    await fault(deployment, active, chance)
    seconds = time.monotonic() - began
    status = await setting
    await load.until_more(2 * CLIENTS)
    after = await deployment.stored()
    outcome.runs += 1
    outcome.refused += load.refused - counts[0]
    outcome.cut += load.cut - counts[1]
    outcome.failed += load.failed - counts[2]
    if fault in LIMITS:
        outcome.seconds.append(seconds)
    outcome.broken += broken(before, after, mode if status == 200 else "")
    return after


def broken(before: Snapshot, after: Snapshot, mode: str) -> Iterator[str]:
    """What should be stored and is not. mode: that was answered with 200; "" for none."""
    if after.head.revision < before.head.revision:
        yield f"revision {after.head.revision} after {before.head.revision}"
    if after.states.get(SALT_KEY) != before.states.get(SALT_KEY):
        yield "another salt"
    kept = {json.dumps(event) for event in after.events}
    if lost := [event for event in before.events if json.dumps(event) not in kept]:
        yield f"events lost: {lost}"
    if mode and stored_mode(after) != mode:
        yield f"mode {stored_mode(after)}, not {mode}"


def stored_mode(snapshot: Snapshot) -> str:
    """The one that is configured where none is stored."""
    return snapshot.states.get(MODE_KEY, "observe").rpartition(" ")[2]


def rows(runs: int = RUNS) -> Iterator[Row]:
    outcomes = asyncio.run(measured(runs, seed=26))
    for name, one in outcomes.items():
        limit = LIMITS.get(FAULTS[name])
        text = f"{one.runs} runs: {one.refused} refused, {one.cut} cut, {one.failed} failed"
        text += f", {len(one.broken)} times something was lost" if one.broken else ", nothing was lost"
        if one.seconds:
            text += f"; active after {min(one.seconds):.1f} to {max(one.seconds):.1f} s"
        cut = CLIENTS * one.runs if FAULTS[name] is kill_relay else 0
        wanted = "0 refused or failed, nothing lost" + (", cut: only what the relay had" if cut else ", 0 cut")
        wanted += f", active within {limit:g} s" if limit else ""
        holds = not one.refused and not one.failed and one.cut <= cut and not one.broken
        yield Row(name, "", text, wanted, holds and max(one.seconds, default=0.0) <= (limit or 0.0))
