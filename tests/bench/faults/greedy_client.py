"""One client that takes what all share, beside honest ones: memory, places for uploads, limits of requests.

The greedy client has an address of its own (127.0.0.2), or the honest ones' address and other credentials.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import resource
import time
from collections.abc import Awaitable, Callable, Iterator

from tests.bench.faults import Row
from tests.bench.faults.overload import answer, relay_process, stack, upstream
from tests.support.memory import peak_mib, resident_mib

NAME = "greedy_client"
TAKES = "4 minutes"

HONEST, GREEDY = "127.0.0.1", "127.0.0.2"
SLOW_UPLOADS, UPLOAD_BYTES = 130, 2_000_000
UPLOAD_RATE = 1_300
"""Bytes per second of a slow upload; the least that is allowed is 1,024."""
HONEST_UPLOADS = 60
HEADS, HEAD_BYTES = 8_000, 64_000
SLOW_CLIENTS, SLOW_BYTES, SLOW_SECONDS = 70, 200_000, 15.0
FLOOD_CONNECTIONS, FLOOD_BYTES = 400, 1_000_000
WAIT_SECONDS = 60.0

Who = Callable[[], tuple[str, bytes]]
"""Address and credential of the greedy client's next request."""
_invented = itertools.count()


def one_address() -> tuple[str, bytes]:
    return GREEDY, b""


def many_credentials() -> tuple[str, bytes]:
    """At an address of its own, since one that is shared is shared with whoever invents credentials there."""
    return GREEDY, b"Bearer invented-%d" % next(_invented)


def one_credential() -> tuple[str, bytes]:
    """As behind a gateway that the honest ones use too."""
    return HONEST, b"Bearer greedy"


WAYS: dict[str, Who] = {
    "another address": one_address,
    "another address, a credential for each request": many_credentials,
    "the same address, another credential": one_credential,
}


def rows() -> Iterator[Row]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        with upstream(answer) as url:
            yield _spellings(url)
            for name, who in WAYS.items():
                yield _uploads(url, name, who)
            for name, who in WAYS.items():
                yield _slow_bodies(url, name, who)
            yield from _heads(url)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# Clients -------------------------------------------------------------------------------------------------------------


class Peer(asyncio.Protocol):
    """A client's connection: it sends what it is told, and knows the status that it got."""

    def __init__(self) -> None:
        self.status = asyncio.get_running_loop().create_future()
        """Of the first response; 0 where the connection ended without one."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if not self.status.done():
            self.status.set_result(int(data[9:12]))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.status.done():
            self.status.set_result(0)


async def connect(url: str, address: str) -> Peer:
    host, _, port = url.removeprefix("http://").partition(":")
    loop = asyncio.get_running_loop()
    _, peer = await loop.create_connection(Peer, host, int(port), local_addr=(address, 0))
    return peer


def head(length: int, credential: bytes) -> bytes:
    fields = b"Authorization: %b\r\n" % credential if credential else b""
    return b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n%b\r\n" % (length, fields)


async def post(url: str, length: int, seconds: float, credential: bytes = b"Bearer honest") -> int:
    """Send a body evenly in so many seconds; the status, 0 where there was none."""
    try:
        peer = await connect(url, HONEST)
    except OSError:
        return 0
    peer.transport.write(head(length, credential))
    pieces = max(1, round(seconds / 0.25))
    for number in range(pieces):
        if peer.status.done():
            break
        peer.transport.write(bytes(length * (number + 1) // pieces - length * number // pieces))
        if number + 1 < pieces:
            await asyncio.sleep(seconds / pieces)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(WAIT_SECONDS):
            await peer.status
    status = peer.status.result() if peer.status.done() and not peer.status.cancelled() else 0
    peer.transport.abort()
    return int(status)


@contextlib.asynccontextmanager
async def beside(*attackers: Awaitable[None]) -> Iterator[None]:  # type: ignore[misc]
    tasks = [asyncio.ensure_future(attacker) for attacker in attackers]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def share(statuses: list[int]) -> str:
    return f"{sum(status == 200 for status in statuses)} of {len(statuses)}"


def enough(statuses: list[int]) -> bool:
    return sum(status == 200 for status in statuses) >= 0.95 * len(statuses)


# The cases -----------------------------------------------------------------------------------------------------------


def _spellings(url: str) -> Row:
    spellings = [bytes(letters) for letters in itertools.product(*zip(b"bearer", b"BEARER", strict=True))]

    async def attack(proxy: str) -> list[int]:
        return [await post(proxy, 2, 0.0, spelling + b" key") for spelling in spellings * 5]

    with stack(url, client_limits={"requests_per_second": 0.001, "burst": 5}) as proxy:
        statuses = asyncio.run(attack(proxy.url))
    admitted = sum(status == 200 for status in statuses)
    case = "one key, `bearer` in 64 spellings, where 5 requests are allowed: admitted of 320"
    return Row(case, "316", admitted, "5", admitted == 5)


def _uploads(url: str, name: str, who: Who) -> Row:
    async def slow(proxy: str) -> None:
        while True:
            address, credential = who()
            peer = await connect(proxy, address)
            peer.transport.write(head(UPLOAD_BYTES, credential))
            while not peer.status.done():
                peer.transport.write(bytes(UPLOAD_RATE))
                await asyncio.sleep(1.0)
            peer.transport.abort()
            await asyncio.sleep(1.0)

    async def attack(proxy: str) -> list[int]:
        async with beside(*(slow(proxy) for _ in range(SLOW_UPLOADS))):
            await asyncio.sleep(3.0)
            statuses = []
            for _ in range(HONEST_UPLOADS):
                statuses.append(await post(proxy, UPLOAD_BYTES, 0.0))
                await asyncio.sleep(0.25)
            return statuses

    with stack(url) as proxy:
        statuses = asyncio.run(attack(proxy.url))
    case = f"{SLOW_UPLOADS} uploads just above the least rate from {name}: uploads of 2 MB that succeed"
    return Row(case, "0 of 60", share(statuses), ">= 95 %", enough(statuses))


def _slow_bodies(url: str, name: str, who: Who) -> Row:
    async def flood(proxy: str) -> None:
        while True:
            address, credential = who()
            peer = await connect(proxy, address)
            peer.transport.write(head(FLOOD_BYTES, credential) + bytes(FLOOD_BYTES - 1))
            await peer.status
            peer.transport.abort()
            await asyncio.sleep(1.0)

    async def attack(proxy: str) -> list[int]:
        async with beside(*(flood(proxy) for _ in range(FLOOD_CONNECTIONS))):
            honest = (post(proxy, SLOW_BYTES, SLOW_SECONDS, b"Bearer %d" % number) for number in range(SLOW_CLIENTS))
            return list(await asyncio.gather(*honest))

    with stack(url) as proxy:
        statuses = asyncio.run(attack(proxy.url))
    case = f"{FLOOD_CONNECTIONS} stalled bodies of 1 MB from {name}, again and again: bodies sent in 15 s that succeed"
    return Row(case, "0 of 70", share(statuses), ">= 95 %", enough(statuses))


def _heads(url: str) -> Iterator[Row]:
    async def attack(proxy: str) -> list[int]:
        peers = []
        for _ in range(HEADS):
            peer = await connect(proxy, GREEDY)
            peer.transport.write(b"GET / HTTP/1.1\r\nHost: a\r\nX: %b" % bytes(b"x" * HEAD_BYTES))
            peers.append(peer)
        statuses = [await post(proxy, 100, 0.5) for _ in range(20)]
        for peer in peers:
            peer.transport.abort()
        return statuses

    with stack(url) as proxy:
        pid = relay_process(proxy)
        before = resident_mib(pid)
        statuses = asyncio.run(attack(proxy.url))
        peak = peak_mib(pid) - before
        ends = time.monotonic() + 20.0
        while (kept := resident_mib(pid) - before) > 32 and time.monotonic() < ends:
            time.sleep(0.5)
    case = f"{HEADS:,} connections of one address with 64 kB of a head each"
    limit = "<= 256 MiB (limits.buffered_bytes is 128 MiB)"
    yield Row(f"{case}: memory of the relay", "500 MiB", f"grows by {peak:.0f} MiB", limit, peak <= 256)
    yield Row(f"{case}, closed: memory that is kept", "500 MiB", f"{kept:.0f} MiB", "<= 32 MiB", kept <= 32)
    yield Row(f"{case}: requests of another client", "", share(statuses), ">= 95 %", enough(statuses))
