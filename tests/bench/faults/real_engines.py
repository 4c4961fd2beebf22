"""Real vLLM engines behind one Hemostat: which one is named where it serves another checkpoint, and what clients see
when it is killed or rolled.

Two servers of SmolLM2-135M-Instruct, W4A16 and W8A8; two more addresses forward to the first, so that three engines are
alike and one is not, in the memory of two. Needs vLLM.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from tests.bench.proxy.load import PATH
from tests.support.stack import ADMIN_TOKEN, Stack, sampling_settings, wait_for

from hemostat_lab.demo import vllm_server
from hemostat_lab.demo.checkpoints import cached_checkpoints

from . import Row

NAME = "real_engines"
TAKES = "about 10 minutes"

MODEL = "smollm2"
ODD, OTHERS = "w8a8", "w4a16"
ADDRESSES = 4
MAX_TOKENS = 1000
"""Of its own, within which the engine that differs is to be named."""
GIVE_UP_TOKENS = 4000
TOKENS = 40
"""Of an answer."""
STREAMS = 4
"""At a time."""
ARGUMENTS = [
    *("--enforce-eager", "--dtype", vllm_server.dtype(), "--max-model-len", "1024", "--max-logprobs", "64"),
    *("--logits-processors", vllm_server.LOGITS_PROCESSOR),
]
TASKS = (
    "Tell me about {} in a few sentences.",
    "Write a short poem about {}.",
    "Explain to a child what {} is.",
    "List three facts about {}.",
)
SUBJECTS = (
    *("the sea", "a volcano", "bread", "the moon", "chess", "a bridge", "rain", "the heart", "gold", "a forest"),
    *("music", "trade", "the desert", "glass", "winter", "a harbour", "honey", "paper", "the wind", "clocks"),
)


@contextlib.asynccontextmanager
async def forwarding(port: int) -> AsyncIterator[int]:
    """Another address of the server at this port."""

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.CancelledError):  # cancelled at the end
            upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", port)
            await asyncio.gather(_copy(reader, upstream_writer), _copy(upstream_reader, writer))

    server = await asyncio.start_server(forward, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


@dataclass
class Engines:
    """The two real servers."""

    folder: Path
    admin: str
    servers: dict[str, vllm_server.VllmServer] = field(default_factory=dict)

    def start(self, scheme: str) -> None:
        """From the main thread, which lives as long as the server has to."""
        port = self.servers[scheme].port if scheme in self.servers else None
        environment = {"HEMOSTAT_ADMIN_URL": f"http://{self.admin}", "HEMOSTAT_ENGINE_TOKEN": ADMIN_TOKEN}
        checkpoint = cached_checkpoints(scheme, print).compressed
        log = self.folder / f"{scheme}-{time.monotonic():.0f}.log"
        server = self.servers[scheme] = vllm_server.VllmServer(checkpoint, MODEL, log, ARGUMENTS, environment, port)
        server.start()

    def kill(self, scheme: str) -> None:
        os.killpg(self.servers[scheme].pid, signal.SIGKILL)
        self.servers[scheme].stop()

    def close(self) -> None:
        for server in self.servers.values():
            server.stop()


@dataclass
class Clients:
    """Each request is a conversation of its own, streamed. broken: when each one that broke had begun (monotonic)."""

    url: str
    complete: int = 0
    broken: list[float] = field(default_factory=list)
    ended: bool = False
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    async def run(self) -> None:
        async with httpx.AsyncClient(base_url=self.url, timeout=300, trust_env=False) as client:
            await asyncio.gather(*(self._keep_asking(client) for _ in range(STREAMS)))

    async def _keep_asking(self, client: httpx.AsyncClient) -> None:
        while not self.ended:
            n = next(self._numbers)
            task, subject = TASKS[n % len(TASKS)], SUBJECTS[n // len(TASKS) % len(SUBJECTS)]
            content = f"{task.format(subject)} ({n})"
            body: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": content}], "stream": True}
            begun = time.monotonic()
            try:
                async with client.stream("POST", PATH, json=body | {"max_tokens": TOKENS, "seed": n}) as response:
                    last = ""
                    async for line in response.aiter_lines():
                        last = line or last
                    if response.status_code != 200 or last != "data: [DONE]":
                        raise httpx.ReadError("the stream is incomplete")
                self.complete += 1
            except httpx.HTTPError:
                self.broken.append(begun)


def engine(stack: Stack, name: str) -> dict[str, Any]:
    result: dict[str, Any] = next(row for row in stack.status()["upstream"] if row["engine"] == name)
    return result


def named(stack: Stack) -> list[str]:
    return [row["engine"] for row in stack.status()["upstream"] if row["figures"].get("outlier")]


async def find_odd(stack: Stack, odd: str) -> list[Row]:
    wait_for("every engine is identified", lambda: all(e["holds"] is not None for e in stack.status()["upstream"]), 60)
    clients = Clients(stack.url)
    asking = asyncio.create_task(clients.run())
    while not await asyncio.to_thread(named, stack):
        if (await asyncio.to_thread(engine, stack, odd))["figures"].get("tokens", 0) > GIVE_UP_TOKENS:
            break
        await asyncio.sleep(0.5)
    clients.ended = True
    await asking
    outliers, figures = await asyncio.to_thread(named, stack), (await asyncio.to_thread(engine, stack, odd))["figures"]
    others = [row["figures"].get("kl_nats") for row in stack.status()["upstream"] if row["engine"] != odd]
    kl = f"KL {figures.get('kl_nats', 0.0):.3f} nats a token, the others {min(filter(None, others), default=0.0):.3f}"
    tokens = figures.get("on_tokens") or float("inf")
    case = f"real vLLM, one {ODD} among three {OTHERS}"
    return [
        Row(f"{case}: named, and no other", "", f"{', '.join(outliers) or 'none'} ({kl})", odd, outliers == [odd]),
        Row(f"{case}: own tokens until it is named", "", tokens, f"<= {MAX_TOKENS}", tokens <= MAX_TOKENS),
    ]


async def roll(engines: Engines, stack: Stack, odd: str) -> list[Row]:
    result = []
    authorized = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
    for case, drained in (("kill -9 of a real engine, and its restart", False), ("a drained real engine rolled", True)):
        clients = Clients(stack.url)
        asking = asyncio.create_task(clients.run())
        await asyncio.sleep(3.0)
        if drained:
            stack.admin.post("/api/v1/engines/drain", json={"engine": odd}, headers=authorized).raise_for_status()
            await asyncio.sleep(2.0)  # until every relay has the policy, and has reported under it
            while (await asyncio.to_thread(engine, stack, odd))["outstanding"]:
                await asyncio.sleep(0.2)
            await asyncio.to_thread(engines.servers[ODD].stop)
        else:
            engines.kill(ODD)
        killed = time.monotonic()
        engines.start(ODD)
        await asyncio.to_thread(engines.servers[ODD].wait_ready, 600.0)
        if drained:
            stack.admin.post("/api/v1/engines/undrain", json={"engine": odd}, headers=authorized).raise_for_status()
        while (row := await asyncio.to_thread(engine, stack, odd))["up"] != row["relays"]:
            await asyncio.sleep(0.2)
        await asyncio.sleep(3.0)
        clients.ended = True
        await asking
        late = sum(begun > killed for begun in clients.broken)
        allowed = 0 if drained else STREAMS
        text = f"{len(clients.broken)} of {len(clients.broken) + clients.complete}, {late} begun after it"
        limit = "0" if drained else f"<= {allowed} that it had, 0 begun later"
        holds = len(clients.broken) <= allowed and not late
        result.append(Row(f"{case}: streams broken", "", text, limit, holds))
    return result


async def measured(folder: Path) -> list[Row]:
    admin = vllm_server.free_port()
    engines = Engines(folder, f"127.0.0.1:{admin}")
    checkpoints = cached_checkpoints(OTHERS, print)
    try:
        for scheme in (OTHERS, ODD):
            engines.start(scheme)
        for server in engines.servers.values():
            await asyncio.to_thread(server.wait_ready, 900.0, print)
        async with contextlib.AsyncExitStack() as forwarders:
            first = engines.servers[OTHERS].port
            ports = [first, *[await forwarders.enter_async_context(forwarding(first)) for _ in range(ADDRESSES - 2)]]
            odd = engines.servers[ODD].port
            urls = [f"http://127.0.0.1:{port}" for port in (*ports, odd)]
            reference = {"backend": "transformers", "model": str(checkpoints.reference), "dtype": vllm_server.dtype()}
            made = sampling_settings(urls[0], reference)
            made |= {"upstream": {"urls": urls, "affinity": False}}
            made["admin"] = {"port": admin, "token": ADMIN_TOKEN}
            stack = await asyncio.to_thread(Stack, made, folder / "stack")
            try:
                await asyncio.to_thread(stack.wait_scoring)
                name = f"127.0.0.1:{odd}"
                return [*await find_odd(stack, name), *await roll(engines, stack, name)]
            finally:
                await asyncio.to_thread(stack.stop)
    finally:
        engines.close()


def rows() -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        yield from asyncio.run(measured(Path(folder)))
