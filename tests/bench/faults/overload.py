"""Clients that take more than their share of a proxy, and an upstream that sends more than it was asked for."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import resource
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx
from tests.bench.faults import Row
from tests.support import costly_search
from tests.support.costly_bodies import BEYOND, WITHIN, cpu_seconds
from tests.support.fake_vllm import FakeVllm, serving
from tests.support.memory import peak_mib, resident_mib
from tests.support.stack import Stack, children, wait_for

from hemostat.openai.routes import Form

NAME = "overload"
TAKES = "3 minutes"

SLOW_CLIENTS = 600
STALLED = 150
IDLE_CLIENTS = 400
OPEN_FILES = 256
SEARCHED = 4_000
"""Random bodies of which the costliest is searched."""
STRAY_CLIENTS, STRAY_REQUESTS = 50, 20
ANSWER_SECONDS = 20.0
"""So long an answer is waited for."""
RELAY = "hemostat.relay.main"


def rows() -> Iterator[Row]:
    with upstream(answer) as url:
        yield from _slow_bodies(url)
        yield _descriptors(url)
        yield _slow_heads_of_the_admin_port(url)
        yield _request_id(url)
    with serving(FakeVllm()) as url:
        yield from _memory(url)
    with upstream(_answer_and_more) as url:
        yield _stray_bytes(url)
    yield from _costly_bodies()


# The upstream --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def upstream(answer: Callable[[asyncio.StreamWriter, str], Any]) -> Iterator[str]:
    """A server in a thread of its own that answers each request by `answer`, which is told the path."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
                _, _, length = head.partition("content-length: ")
                if length:
                    await reader.readexactly(int(length.split("\r\n")[0]))
                await answer(writer, head.split()[1])

    with listening(connected) as url:
        yield url


@contextlib.contextmanager
def listening(connected: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]) -> Iterator[str]:
    """A server in a thread of its own, which calls this for each connection."""
    started = threading.Event()
    loop = asyncio.new_event_loop()
    port = 0

    async def serve() -> None:
        nonlocal port
        server = await asyncio.start_server(connected, "127.0.0.1", 0, backlog=2048)
        port = server.sockets[0].getsockname()[1]
        started.set()

    def run() -> None:
        loop.run_until_complete(serve())
        loop.run_forever()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    started.wait()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        for task in asyncio.all_tasks(loop):
            loop.call_soon_threadsafe(task.cancel)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


def _response(path: str) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(path), path.encode())


async def answer(writer: asyncio.StreamWriter, path: str) -> None:
    writer.write(_response(path))


async def _answer_and_more(writer: asyncio.StreamWriter, path: str) -> None:
    writer.write(_response(path))
    await asyncio.sleep(0)
    writer.write(_response("/stray"))


# Clients -------------------------------------------------------------------------------------------------------------


async def connect(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = url.removeprefix("http://").partition(":")
    return await asyncio.open_connection(host, int(port))


async def get(url: str, path: str) -> tuple[int, str, float]:
    """Status, body and seconds; status 0 where there is no answer within ANSWER_SECONDS."""
    started = time.monotonic()
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            reader, writer = await connect(url)
            writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            data = (await reader.read()).decode("latin-1")
            writer.close()
    except (TimeoutError, ConnectionError):
        return 0, "", time.monotonic() - started
    head, _, body = data.partition("\r\n\r\n")
    return int(head.split()[1]) if head else 0, body, time.monotonic() - started


async def crowd(url: str, number: int, data: bytes) -> list[asyncio.StreamWriter]:
    """Connections that have sent this, as far as it was read."""
    writers = []
    for _ in range(number):
        _, writer = await connect(url)
        writer.write(data)
        writers.append(writer)
    await asyncio.sleep(1.0)  # for the proxy to read it
    return writers


def leave(writers: list[asyncio.StreamWriter]) -> None:
    for writer in writers:
        writer.transport.abort()


@contextlib.contextmanager
def stack(url: str, **settings: Any) -> Iterator[Stack]:
    with tempfile.TemporaryDirectory() as folder:
        started = Stack({"upstream": {"url": url}, **settings}, Path(folder))
        try:
            yield started
        finally:
            started.stop()


def begun(length: int, sent: int) -> bytes:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % length
    return head + b"x" * sent


# The cases -----------------------------------------------------------------------------------------------------------


def _slow_bodies(url: str) -> Iterator[Row]:
    for length, kind in ((1000, "short"), (2_000_000, "long")):

        async def attack(proxy: str, length: int = length) -> tuple[int, float]:
            writers = await crowd(proxy, SLOW_CLIENTS, begun(length, 1))
            status, _, seconds = await get(proxy, "/health")
            leave(writers)
            return status, seconds

        with stack(url) as proxy:
            status, seconds = asyncio.run(attack(proxy.url))
        yield Row(
            f"{SLOW_CLIENTS} clients that send one byte of a {kind} body: GET /health",
            "no answer in 20 s",
            f"{status} in {seconds:.2f} s",
            "200 within 1 s",
            status == 200 and seconds < 1.0,
        )


def _memory(url: str) -> Iterator[Row]:
    for number, length in ((STALLED, 3_700_000), (1000, 1_000_000)):

        async def attack(proxy: str, number: int = number, length: int = length) -> None:
            leave(await crowd(proxy, number, begun(length, length - 1)))

        # Every request is sampled, so that the hook wants to read every body.
        with stack(url, reference={"backend": "vllm", "url": url}, shadow={"rate": 1.0}) as proxy:
            wait_for("scoring", lambda: sampled(proxy) > 0, ANSWER_SECONDS, every=0.5)
            pid = relay_process(proxy)
            before = resident_mib(pid)
            asyncio.run(attack(proxy.url))
            grown = peak_mib(pid) - before
        yield Row(
            f"{number} stalled bodies of {length / 1e6:.1f} MB: memory of the relay",
            "77 to 614 MB" if number == STALLED else "grows by 840 MiB",
            f"grows by {grown:.0f} MiB",
            "<= 256 MiB (limits.buffered_bytes is 128 MiB)",
            grown <= 256,
        )


def sampled(proxy: Stack) -> float:
    body = {"model": "fake", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    httpx.post(f"{proxy.url}/v1/chat/completions", json=body, timeout=ANSWER_SECONDS)
    metrics = proxy.admin.get("/metrics").text.splitlines()
    return sum(
        float(line.split()[-1]) for line in metrics if line.startswith('hemostat_shadow_requests_total{outcome="s')
    )


def relay_process(proxy: Stack) -> int:
    return next(pid for module, pid in _modules(proxy).items() if module.startswith("hemostat.relay"))


def _modules(proxy: Stack) -> dict[str, int]:
    return children(proxy.pid)


def _limited(pipe: Connection, url: str) -> None:
    """Run the proxy with few descriptors, in a process of its own: the limit cannot be raised again."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))
    with stack(url) as proxy:
        pipe.send(proxy.url)
        pipe.recv()


def _descriptors(url: str) -> Row:
    async def attack(proxy: str) -> int:
        writers = await crowd(proxy, IDLE_CLIENTS, b"")
        status, _, _ = await get(proxy, "/health")
        leave(writers)
        return status

    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_limited, args=(theirs, url))
    process.start()
    try:
        status = asyncio.run(attack(ours.recv()))
    finally:
        ours.send(None)
        process.join()
    case = f"ulimit -n {OPEN_FILES}, {IDLE_CLIENTS} idle clients: GET /health"
    return Row(case, "502", str(status), "200", status == 200)


def _slow_heads_of_the_admin_port(url: str) -> Row:
    async def attack(admin: str) -> list[int]:
        writers = await crowd(admin, 300, b"GET /livez HTTP/1.1\r\n")
        statuses = [(await get(admin, path))[0] for path in ("/livez", "/readyz")]
        leave(writers)
        return statuses

    with stack(url) as proxy:
        statuses = asyncio.run(attack(str(proxy.admin.base_url).rstrip("/")))
    case = "300 slow heads on the admin port: /livez, /readyz"
    return Row(case, "503", ", ".join(map(str, statuses)), "200, 200", statuses == [200, 200])


def _request_id(url: str) -> Row:
    async def ask(proxy: str) -> None:
        _, writer = await connect(proxy)
        writer.write(begun(1, 1).replace(b"Host: a\r\n", b"Host: a\r\nX-Request-Id: %b\r\n" % (b"i" * 5000)))
        await asyncio.sleep(0.5)
        writer.close()

    with stack(url, log={"requests": True}) as proxy:
        asyncio.run(ask(proxy.url))
        line = next(line for line in proxy.log.read_text().splitlines() if "iii" in line)
    return Row("a request id of 5,000 bytes: its line in the log", "5,000 bytes", len(line), "<= 500", len(line) <= 500)


def _stray_bytes(url: str) -> Row:
    async def client(proxy: str, number: int) -> int:
        """How many answers were another request's."""
        wrong = 0
        for request in range(STRAY_REQUESTS):
            path = f"/{number}/{request}"
            status, body, _ = await get(proxy, path)
            wrong += status == 200 and body != path
        return wrong

    async def attack(proxy: str) -> int:
        return sum(await asyncio.gather(*(client(proxy, number) for number in range(STRAY_CLIENTS))))

    with stack(url, upstream={"url": url, "max_connections": 8}) as proxy:
        wrong = asyncio.run(attack(proxy.url))
    total = STRAY_CLIENTS * STRAY_REQUESTS
    case = f"an upstream that sends bytes behind each answer: wrong answers of {total}"
    return Row(case, "166 (another upstream)", wrong, "0", wrong == 0)


LIMIT = "<= 5 ms"
BEFORE = {
    "400,000 members": "614 ms",
    "1.3 million empty messages": "655 ms",
    "one escaped key of 4 MB": "250 ms",
}
"""Of the bodies that the attacks used."""


def _costly_bodies() -> Iterator[Row]:
    """CPU time of the thread, which does not depend on what else the machine does, but on its processor."""
    for name, body in BEYOND.items():
        if name in BEFORE:
            yield _cost(f"a body of {name}: CPU to find that it is not read", BEFORE[name], [body])
    yield _cost(f"the worst of {len(WITHIN)} bodies that are read: CPU", "", list(WITHIN.values()))
    result = 1e3 * costly_search.worst(SEARCHED, seed=1)
    yield Row(
        f"the worst that a search over {SEARCHED:,} bodies finds: CPU", "", f"{result:.2f} ms", LIMIT, result <= 5.0
    )
    yield _cost(f"the worst of {len(BEYOND)} bodies that are not read: CPU", "", list(BEYOND.values()))


def _cost(case: str, before: str, bodies: list[bytes]) -> Row:
    worst = 1e3 * max(cpu_seconds(body, form) for body in bodies for form in Form)
    return Row(case, before, f"{worst:.2f} ms", LIMIT, worst <= 5.0)
