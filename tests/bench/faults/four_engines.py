"""Four engines behind one Hemostat: what they cost, and what clients notice when one ends.

Fast fakes are an nginx that has the answers ready; the relay has one core, rounds are interleaved with those of a relay
with one upstream. Both are compiled, as in the image, where there is a C compiler. Engines that are killed are
processes of the tests' fake vLLM, which stream a token every 20 ms. Needs nginx and wrk.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from tests.bench.bench_proxy import cpu_seconds, until_answering
from tests.bench.proxy.load import PATH, Answers, free_port, run_wrk, upstream_config, wrk_script
from tests.bench.proxy.proxies import Bench, compiled_build, listening
from tests.support.stack import ADMIN_TOKEN, FAKE_VLLM, Stack, wait_for

from hemostat.relay.upstreams.balancer import BOUND

from . import Row

NAME = "four_engines"
TAKES = "about 3 minutes"

ENGINES = 4
STARTS = 4
"""Of the relays: two starts of the same relay differ by up to 4 % in the instructions of a request."""
ROUNDS = 3
"""With each of them."""
WRK_SECONDS = 2.0
MIN_RATIO = 0.9
STREAMS = 24
"""At a time."""
TOKENS = 40
TOKEN_SECONDS = 0.02
CREATED = re.compile(r'"created": ?(\d+)')


# --- what several engines cost ---------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def relays(folder: Path, code: Path | None) -> AsyncIterator[tuple[dict[int, int], dict[int, int], Path]]:
    """By number of engines: port and pid of a relay; and wrk's script. code: of the relays, else this tree's."""
    answers = await Answers.make()
    script, length = wrk_script(folder)
    ports = [free_port() for _ in range(ENGINES)]
    config = upstream_config(folder / "upstream", ports[0], answers, length)
    listen = "listen 127.0.0.1:{} backlog=4096;"
    every = " ".join(listen.format(port) for port in ports)
    config.write_text(config.read_text().replace(listen.format(ports[0]), every))
    bench = Bench(folder, {})
    environment = {"PYTHONPATH": str(code)} if code is not None else None
    try:
        command = ["nginx", "-e", "stderr", "-p", str(config.parent), "-c", str(config)]
        bench.start(command, pinned=False, log="upstream")
        by_engines, pids = {}, {}
        for engines in (1, ENGINES):
            by_engines[engines] = port = free_port()
            given = {
                **{"worker": 0, "shutdown_seconds": 1.0},
                "upstream": {"urls": [f"http://127.0.0.1:{upstream}" for upstream in ports[:engines]]},
                "control": {"path": str(folder / "none.sock")},
            }
            command = [sys.executable, "-m", "hemostat.relay.main"]
            with listening(port) as sock:
                fds = [sock.fileno()]
                stdin = json.dumps(given | {"fds": fds}).encode()
                log = f"relay-{engines}"
                pids[engines] = bench.start(command, stdin=stdin, log=log, environment=environment, pass_fds=fds)
            await until_answering(port, f"the relay with {engines}", folder / f"relay-{engines}.log")
        yield by_engines, pids, script
    finally:
        bench.stop()


async def cost(folder: Path) -> Row:
    rates: dict[int, list[float]] = {1: [], ENGINES: []}
    cpu: dict[int, list[float]] = {1: [], ENGINES: []}
    code = compiled_build()
    for start in range(STARTS):
        (place := folder / str(start)).mkdir()
        async with relays(place, code) as (ports, pids, script):
            for _ in range(ROUNDS):
                for engines, port in ports.items():
                    before = cpu_seconds(pids[engines])
                    load = await run_wrk(port, WRK_SECONDS, script)
                    rates[engines].append(load.per_second)
                    cpu[engines].append((cpu_seconds(pids[engines]) - before) / load.requests * 1e6)
    ratio = statistics.median(many / single for many, single in zip(rates[ENGINES], rates[1], strict=True))
    micro = {engines: statistics.median(values) for engines, values in cpu.items()}
    text = f"{ratio:.2f} ({micro[ENGINES]:.1f} against {micro[1]:.1f} us of CPU a request)"
    limit = f">= {MIN_RATIO}, median of rounds"
    return Row("requests/s with four fast fakes, to that with one", "", text, limit, ratio >= MIN_RATIO)


# --- engines that end ------------------------------------------------------------------------------------------------


@dataclass
class Fleet:
    """Processes of the fake vLLM; each says by `created` which one it is."""

    ports: list[int] = field(default_factory=lambda: [free_port() for _ in range(ENGINES)])
    processes: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, engine: int) -> None:
        command = [
            sys.executable,
            str(FAKE_VLLM),
            "--port",
            str(self.ports[engine]),
            "--created",
            str(engine + 1),
        ]
        command += ["--token-delay", str(TOKEN_SECONDS)]
        self.processes[engine] = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with httpx.Client(trust_env=False) as client:

            def answers() -> bool:
                with contextlib.suppress(httpx.HTTPError):
                    return client.get(f"http://127.0.0.1:{self.ports[engine]}/health").status_code == 200
                return False

            wait_for(f"engine {engine} answers", answers, 30.0)

    def end(self, engine: int, how: signal.Signals) -> None:
        self.processes[engine].send_signal(how)
        self.processes[engine].wait()

    def close(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()


@dataclass
class Streams:
    """Clients that ask without a pause. broken: of each stream that broke the number of its engine, from 1; 0 where it
    had not begun."""

    url: str
    complete: int = 0
    broken: list[int] = field(default_factory=list)
    engines: set[int] = field(default_factory=set)
    """That answered."""
    ended: bool = False

    async def run(self) -> None:
        limits = httpx.Limits(max_connections=STREAMS)
        async with httpx.AsyncClient(base_url=self.url, timeout=60, trust_env=False, limits=limits) as client:
            await asyncio.gather(*(self._keep_asking(client, n) for n in range(STREAMS)))

    async def _keep_asking(self, client: httpx.AsyncClient, number: int) -> None:
        asked = 0
        while not self.ended:
            asked += 1
            content = f"question {number} {asked}\nsay: {'word ' * (TOKENS // 5)}"
            body = {"model": "fake", "messages": [{"role": "user", "content": content}], "stream": True}
            engine = 0
            try:
                async with client.stream("POST", PATH, json=body | {"max_tokens": TOKENS}) as response:
                    text = ""
                    async for line in response.aiter_lines():
                        text = line or text
                        if not engine and (said := CREATED.search(line)):
                            engine = int(said[1])
                            self.engines.add(engine)
                    if response.status_code != 200 or text != "data: [DONE]":
                        raise httpx.ReadError("the stream is incomplete")
                self.complete += 1
            except httpx.HTTPError:
                self.broken.append(engine)


async def faults(folder: Path) -> list[Row]:
    fleet = Fleet()
    result = []
    try:
        for engine in range(ENGINES):
            fleet.start(engine)
        urls = [f"http://127.0.0.1:{port}" for port in fleet.ports]
        stack = Stack({"upstream": {"urls": urls}}, folder / "stack")
        try:
            for case, how, drained in (
                ("kill -9 of one engine after the other, and their restart", signal.SIGKILL, False),
                ("a rolling restart, each engine drained before", signal.SIGTERM, True),
            ):
                streams = Streams(stack.url)
                asking = asyncio.create_task(streams.run())
                others = 0
                for engine in range(ENGINES):
                    await asyncio.sleep(2.0)
                    broken = len(streams.broken)
                    await asyncio.to_thread(replace, fleet, stack, engine, how, drained)
                    others += sum(number not in (0, engine + 1) for number in streams.broken[broken:])
                streams.ended = True
                await asking
                # What may be in progress at one engine, by the bounded loads; each is killed once.
                allowed = 0 if drained else ENGINES * math.ceil(BOUND * (STREAMS + 1) / ENGINES)
                text = f"{len(streams.broken)} of {len(streams.broken) + streams.complete}, {others} of other engines"
                holds = len(streams.broken) <= allowed and not others
                limit = "0" if drained else f"<= {allowed}, all of the killed engines"
                result.append(Row(f"{case}: streams broken", "", text, limit, holds))
        finally:
            stack.stop()
    finally:
        fleet.close()
    return result


def replace(fleet: Fleet, stack: Stack, engine: int, how: signal.Signals, drained: bool) -> None:
    """End an engine and start it again; returns when the relay takes it for healthy. Blocks."""
    name = f"127.0.0.1:{fleet.ports[engine]}"
    authorized = {"Authorization": f"Bearer {ADMIN_TOKEN}"}

    def row() -> dict[str, object]:
        rows = stack.admin.get("/api/v1/status").json()["upstream"]
        return next(row for row in rows if row["engine"] == name)

    if drained:
        stack.admin.post("/api/v1/engines/drain", json={"engine": name}, headers=authorized).raise_for_status()
        time.sleep(2.0)  # until every relay has the policy, and has reported under it
        wait_for(f"{name} is idle", lambda: row()["outstanding"] == 0, 60.0)
    fleet.end(engine, how)
    time.sleep(2.0)
    fleet.start(engine)
    if drained:
        stack.admin.post("/api/v1/engines/undrain", json={"engine": name}, headers=authorized).raise_for_status()
    wait_for(f"{name} is up", lambda: row()["up"] == row()["relays"], 60.0)


def rows() -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        yield asyncio.run(cost(Path(folder)))
        yield from asyncio.run(faults(Path(folder)))
