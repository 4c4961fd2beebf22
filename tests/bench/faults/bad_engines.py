"""Engines that fail, and a client whose requests make engines fail: four engines behind one Hemostat.

Engines are one process with four ports. A good one answers 200 after ANSWER_SECONDS; all of them close the connection
of a request with the word poison.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.bench.faults import Row
from tests.support.stack import Stack, wait_for

NAME = "bad_engines"
TAKES = "about 2 minutes"

GOOD, BLACK_HOLE, BUSY, DEAD = "good", "black hole", "busy", "dead"
"""BLACK_HOLE: 500 at once, and /health 200. BUSY: 503, and /health 200. DEAD: closes each connection."""
ENGINES = 4
ANSWER_SECONDS = 0.05
RATE = 150.0
"""Requests/s of an open loop, and of the other clients."""
POISON_RATE = 100.0
CLOSED = 16
"""Clients of a closed loop."""
SECONDS = 8.0
FIRST_SECONDS = 3.0
"""After them, a black hole has to be ejected."""
CREDENTIALS = 20
BUSY_REQUESTS = 1000


# The engines ---------------------------------------------------------------------------------------------------------


class Engine(asyncio.Protocol):
    """One connection."""

    def __init__(self, kind: str, asked: Counter[str]) -> None:
        self._kind = kind
        self._asked = asked
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if self._kind == DEAD:
            transport.abort()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, separator, body = self._buffer.partition(b"\r\n\r\n")
        _, _, rest = head.lower().partition(b"content-length:")
        if not separator or len(body) < int(rest.split(b"\r\n")[0] or 0):
            return
        self._buffer = b""
        if head.startswith(b"GET"):  # /health, or what Hemostat asks for itself
            self._answer(200)
            return
        self._asked[self._kind] += 1
        if b"poison" in body:
            self._transport.abort()
        elif self._kind == GOOD:
            asyncio.get_running_loop().call_later(ANSWER_SECONDS, self._answer, 200)
        else:
            self._answer(500 if self._kind == BLACK_HOLE else 503)

    def _answer(self, status: int) -> None:
        self._transport.write(b"HTTP/1.1 %d Status\r\nContent-Length: 2\r\n\r\n{}" % status)


def _serve(pipe: Connection, kinds: list[str]) -> None:
    """In a process of its own: send the ports, and at the end how many requests came to engines of each kind."""

    async def run() -> None:
        loop, asked = asyncio.get_running_loop(), Counter[str]()
        servers = [
            await loop.create_server(lambda kind=kind: Engine(kind, asked), "127.0.0.1", 0)  # type: ignore[misc]
            for kind in kinds
        ]
        pipe.send([server.sockets[0].getsockname()[1] for server in servers])
        await asyncio.to_thread(pipe.recv)
        pipe.send(asked)

    asyncio.run(run())


@contextmanager
def proxy(*kinds: str, **upstream: Any) -> Iterator[tuple[Stack, Callable[[], Counter[str]]]]:
    """Hemostat before engines of these kinds; and a function that ends the engines and tells how many requests came."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(theirs, list(kinds)))
    process.start()

    def asked() -> Counter[str]:
        ours.send(None)
        counted = ours.recv()
        assert isinstance(counted, Counter)
        return counted

    try:
        urls = [f"http://127.0.0.1:{port}" for port in ours.recv()]
        with tempfile.TemporaryDirectory() as folder:
            stack = Stack({"upstream": {"urls": urls} | upstream}, Path(folder))
            try:
                yield stack, asked
            finally:
                stack.stop()
    finally:
        process.kill()
        process.join()


# Clients -------------------------------------------------------------------------------------------------------------


class Load:
    """Requests to the proxy, and their statuses (0: the connection closed)."""

    def __init__(self, url: str) -> None:
        host, _, port = url.removeprefix("http://").partition(":")
        self._address = host, int(port)
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._number = 0
        self._began = time.monotonic()
        self.answers: list[tuple[float, int]] = []
        """Seconds since the start, and status."""

    async def ask(self, text: str = "question", credential: str | None = None) -> None:
        self._number += 1
        content = f"{text} {self._number}"
        body = json.dumps({"model": "fake", "messages": [{"role": "user", "content": content}]}).encode()
        name = credential or f"client-{self._number % CREDENTIALS}"
        fields = f"Host: a\r\nAuthorization: Bearer {name}\r\nContent-Length: {len(body)}"
        request = f"POST /v1/chat/completions HTTP/1.1\r\n{fields}\r\n\r\n".encode() + body
        reader, writer = self._idle.pop() if self._idle else await asyncio.open_connection(*self._address)
        status = 0
        try:
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            status = int(head.split()[1])
            await reader.readexactly(int(head.partition(b"content-length:")[2].split(b"\r\n")[0]))
            self._idle.append((reader, writer))
        except (OSError, asyncio.IncompleteReadError):
            writer.close()
        self.answers.append((time.monotonic() - self._began, status))

    async def open_loop(self, rate: float, seconds: float, **request: str) -> None:
        async with asyncio.TaskGroup() as tasks:
            for number in range(int(rate * seconds)):
                await asyncio.sleep(max(0.0, self._began + number / rate - time.monotonic()))
                tasks.create_task(self.ask(**request))

    async def closed_loop(self, seconds: float) -> None:
        async def keep_asking() -> None:
            while time.monotonic() < self._began + seconds:
                await self.ask()

        await asyncio.gather(*(keep_asking() for _ in range(CLOSED)))

    def share(self, status: int, since: float = 0.0) -> float:
        statuses = [got for at, got in self.answers if at >= since]
        return statuses.count(status) / len(statuses)


# The cases -----------------------------------------------------------------------------------------------------------


def _black_hole() -> Iterator[Row]:
    loops: dict[str, Callable[[Load], Awaitable[None]]] = {
        "open loop": lambda load: load.open_loop(RATE, SECONDS),
        "closed loop": lambda load: load.closed_loop(SECONDS),
    }
    before = {
        ("open loop", True): "29 %",
        ("open loop", False): "62 %",
        ("closed loop", True): "49 %",
        ("closed loop", False): "47 %",
    }
    for (loop, affinity), was in before.items():

        async def attack(url: str, loop: str = loop) -> Load:
            load = Load(url)
            await loops[loop](load)
            return load

        with proxy(BLACK_HOLE, *[GOOD] * (ENGINES - 1), affinity=affinity) as (stack, _):
            load = asyncio.run(attack(stack.url))
        later, all_of_them = load.share(500, FIRST_SECONDS), load.share(500)
        yield Row(
            f"one of four engines answers 500 at once, {loop}, affinity {'on' if affinity else 'off'}: answers 500",
            was,
            f"{later:.1%} after {FIRST_SECONDS:.0f} s; {all_of_them:.1%} of all {len(load.answers)}",
            "<= 2 % after 3 s",
            later <= 0.02,
        )


def _busy() -> Row:
    async def attack(url: str) -> None:
        load = Load(url)
        for _ in range(BUSY_REQUESTS // 50):
            await asyncio.gather(*(load.ask() for _ in range(50)))

    with proxy(*[BUSY] * ENGINES) as (stack, asked):
        asyncio.run(attack(stack.url))
        sent = sum(asked().values()) / BUSY_REQUESTS
    case = "all four engines answer 503: requests sent for each of the clients'"
    return Row(case, "4.00", f"{sent:.3f}", "<= 1.15", sent <= 1.15)


def _poison() -> Iterator[Row]:
    async def attack(url: str) -> Load:
        others, bad = Load(url), Load(url)
        await asyncio.gather(
            others.open_loop(RATE, SECONDS), bad.open_loop(POISON_RATE, SECONDS, text="poison", credential="bad")
        )
        return others

    for last, before in ((GOOD, "0 %"), (DEAD, "29 %")):
        with proxy(*[GOOD] * (ENGINES - 1), last) as (stack, _):

            def engines(stack: Stack = stack) -> list[dict[str, Any]]:
                result: list[dict[str, Any]] = stack.admin.get("/api/v1/status").json()["upstream"]
                return result

            if last == DEAD:
                wait_for("the dead engine is ejected", lambda: engines() and not engines()[-1]["up"], 30.0)
            others = asyncio.run(attack(stack.url))
            ejections = [engine["ejections"] for engine in engines()]
        failed = others.share(502) + others.share(0)
        beside = "four good engines" if last == GOOD else "three good engines and a dead one"
        yield Row(
            f"one client's {POISON_RATE:.0f} requests/s make {beside} close: the others' 502",
            before,
            f"{failed:.2%} of {len(others.answers)}",
            "<= 1 %",
            failed <= 0.01,
        )
        honest = sum(ejections[: ENGINES - 1])
        yield Row(f"the same, {beside}: ejections of the good ones", "9", honest, "0", honest == 0)


def rows() -> Iterator[Row]:
    yield from _black_hole()
    yield _busy()
    yield from _poison()
