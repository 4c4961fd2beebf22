"""Floods that cost who sends them next to nothing: what another client waits longer, in the same run.

For each flood the 99th percentile of another client's requests is taken without it and during it, five times each in
turn; the row has the median of the five differences. The flood is a process of its own, at another address (127.0.0.2).
An engine's flood is the answer to a request that is sampled, so that the hook reads it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import multiprocessing
import socket
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator

import httpx
from tests.bench.faults import Row
from tests.bench.faults.overload import answer, get, listening, sampled, stack, upstream
from tests.support.fake_vllm import FakeVllm, serving
from tests.support.stack import wait_for

NAME = "floods"
TAKES = "4 minutes"

GREEDY = "127.0.0.2"
ROUNDS, SECONDS = 5, 2.0
MAX_DIFFERENCE = 0.05
"""Seconds by which another client's 99th percentile may grow."""
UPLOADS, UPLOAD_BYTES = 150, 1_000_000
ENGINE_BYTES, ENGINE_UNITS = 1 << 20, 16

Address = tuple[str, int]


# Floods --------------------------------------------------------------------------------------------------------------


async def _connect(address: Address) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection(*address, local_addr=(GREEDY, 0))


def _sends(head: bytes, unit: bytes) -> Callable[[Address], Awaitable[None]]:
    """A client that sends a head, then the same bytes as fast as they are taken, until it is refused."""

    async def flood(address: Address) -> None:
        reader, writer = await _connect(address)
        reading = asyncio.ensure_future(_discard(reader))
        try:
            writer.write(head)
            while not reading.done():
                writer.write(unit)
                await writer.drain()
                await asyncio.sleep(0)
        finally:
            reading.cancel()
            writer.transport.abort()

    return flood


async def _discard(reader: asyncio.StreamReader) -> None:
    while await reader.read(1 << 20):
        pass


async def _byte_by_byte(address: Address) -> None:
    reader, writer = await _connect(address)
    writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    reading = asyncio.ensure_future(_discard(reader))
    try:
        for byte in itertools.chain(b"GET / HTTP/1.1\r\nHost: a\r\nX: ", itertools.repeat(ord("x"), 1 << 16)):
            writer.write(bytes((byte,)))
            await asyncio.sleep(0)
            if reading.done():
                break
    finally:
        reading.cancel()
        writer.transport.abort()


async def _upload(address: Address) -> None:
    reader, writer = await _connect(address)
    try:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % UPLOAD_BYTES
        writer.write(head + bytes(UPLOAD_BYTES - 1))
        await reader.read(1)
    finally:
        writer.transport.abort()


async def _asks_engine(address: Address) -> None:
    reader, writer = await _connect(address)
    try:
        body = b'{"model": "fake", "messages": [{"role": "user", "content": "Hi"}], "stream": true, "max_tokens": 4}'
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
            b"Connection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        await _discard(reader)
    finally:
        writer.transport.abort()


REFUSED = b"POST /v1/load_lora_adapter HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n"
CHUNKED = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
EMPTY, SHORT = b"\n\n", b"1\r\nx\r\n"

CLIENTS: dict[str, tuple[Callable[[Address], Awaitable[None]], int]] = {
    "empty lines before a request": (_sends(b"", b"\r\n" * (1 << 19)), 1),
    "pipelined requests that the relay refuses": (_sends(b"", REFUSED * ((1 << 20) // len(REFUSED))), 1),
    "a body in chunks of one byte": (_sends(CHUNKED, SHORT * 1000), 1),
    "a head sent byte by byte": (_byte_by_byte, 1),
    f"{UPLOADS} unfinished uploads of {UPLOAD_BYTES / 1e6:.0f} MB, begun again": (_upload, UPLOADS),
}
ENGINES = {
    "an engine's stream of empty events": b"%x\r\n%b\r\n" % (ENGINE_BYTES, EMPTY * (ENGINE_BYTES // len(EMPTY))),
    "an engine's stream in chunks of one byte": b"1\r\n\n\r\n" * (ENGINE_BYTES // 6),
}
"""The name of a flood -> the chunks that are sent again and again."""


def _run(name: str, address: Address) -> None:
    """In a process of its own, until it is ended."""
    flood, number = CLIENTS.get(name, (_asks_engine, 1))

    async def again() -> None:
        while True:
            with contextlib.suppress(ConnectionError):
                await flood(address)
            await asyncio.sleep(0.001)

    async def run() -> None:
        await asyncio.gather(*(again() for _ in range(number)))

    asyncio.run(run())


@contextlib.contextmanager
def flooding(name: str, url: str) -> Iterator[None]:
    host, _, port = url.removeprefix("http://").partition(":")
    process = multiprocessing.get_context("spawn").Process(target=_run, args=(name, (host, int(port))), daemon=True)
    process.start()
    try:
        time.sleep(1.5)  # until it has started
        yield
    finally:
        process.kill()
        process.join()
        time.sleep(0.5)


# The engine ----------------------------------------------------------------------------------------------------------


class Engine:
    """A server before a fake vLLM. While `flood` is set, it answers requests for text with that, again and again."""

    def __init__(self, behind: str) -> None:
        self.flood = b""
        self._behind = behind

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                _, _, length = head.lower().partition(b"content-length: ")
                body = await reader.readexactly(int(length.split(b"\r\n")[0])) if length else b""
                method, path, _ = head.decode("latin-1").split(" ", 2)
                if self.flood and path == "/v1/chat/completions":
                    await self._send_flood(writer)
                elif path == "/health":
                    await answer(writer, path)
                else:
                    await self._forward(writer, method, path, body)

    async def _send_flood(self, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(ENGINE_UNITS):
            writer.write(self.flood)
            await writer.drain()
        writer.write(b"0\r\n\r\n")

    async def _forward(self, writer: asyncio.StreamWriter, method: str, path: str, body: bytes) -> None:
        async with httpx.AsyncClient() as client:
            headers = {"content-type": "application/json"}
            response = await client.request(method, self._behind + path, content=body, headers=headers)
        kind = response.headers.get("content-type", "application/json")
        head = f"HTTP/1.1 {response.status_code} OK\r\nContent-Type: {kind}\r\n"
        writer.write(f"{head}Content-Length: {len(response.content)}\r\n\r\n".encode() + response.content)


# The cases -----------------------------------------------------------------------------------------------------------


async def _percentile(url: str) -> float:
    """99th percentile of the seconds of another client's requests, one after the other; infinite if one fails."""
    seconds = []
    ends = time.monotonic() + SECONDS
    while time.monotonic() < ends:
        status, _, took = await get(url, "/health")
        seconds.append(took if status == 200 else float("inf"))
        await asyncio.sleep(0.002)
    return sorted(seconds)[int(0.99 * len(seconds))]


def _row(name: str, before: str, url: str) -> Row:
    differences, without, during = [], [], []
    for _ in range(ROUNDS):
        without.append(asyncio.run(_percentile(url)))
        with flooding(name, url):
            during.append(asyncio.run(_percentile(url)))
        differences.append(during[-1] - without[-1])
    difference = statistics.median(differences)
    measured = (
        f"{1e3 * difference:+.0f} ms ({1e3 * statistics.median(without):.0f} ms, then "
        f"{1e3 * statistics.median(during):.0f} ms)"
    )
    limit = f"<= {1e3 * MAX_DIFFERENCE:.0f} ms"
    return Row(f"{name}: p99 of another client", before, measured, limit, difference <= MAX_DIFFERENCE)


BEFORE = {
    "empty lines before a request": "no answer within 20 s",
    "pipelined requests that the relay refuses": "+13,570 ms",
    f"{UPLOADS} unfinished uploads of {UPLOAD_BYTES / 1e6:.0f} MB, begun again": "+28 ms",
}


def rows() -> Iterator[Row]:
    with upstream(answer) as url:
        for name in CLIENTS:
            with stack(url) as proxy:
                yield _row(name, BEFORE.get(name, ""), proxy.url)
    for name, unit in ENGINES.items():
        with serving(FakeVllm()) as behind:
            engine = Engine(behind)
            with (
                listening(engine.connected) as url,
                stack(url, reference={"backend": "vllm", "url": behind}, shadow={"rate": 1.0}) as proxy,
            ):
                wait_for("a sampled request", lambda: sampled(proxy) > 0, 60.0, every=0.5)
                engine.flood = unit
                yield _row(name, BEFORE.get(name, ""), proxy.url)
