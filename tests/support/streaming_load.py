"""Clients that stream answers without a pause, one connection each, and count what went wrong."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import secrets
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from tests.support.connections import accepted_by
from tests.support.waiting import HANG_SECONDS, until

CONNECT_SECONDS = 60.0


@dataclass
class Load:
    """Counts. complete: answers whose end was received. refused: connections. cut: requests whose answer ended early,
    or did not begin. failed: answers with another status than 200."""

    complete: int = 0
    refused: int = 0
    cut: int = 0
    failed: int = 0
    streaming: int = 0
    """Answers that have begun and not ended."""
    failures: list[str] = field(default_factory=list)
    """The failures in words, with the bytes of the answer so far and the process that had the connection."""
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    """Set: no further requests."""

    async def until_more(self, answers: int) -> None:
        """Wait until so many more are complete."""
        wanted = self.complete + answers
        await until(lambda: self.complete >= wanted)


class _Client:
    """requests: what it sends, one after the other. pids: the processes that may accept its connections."""

    def __init__(self, url: str, requests: Iterator[bytes], load: Load, pids: Callable[[], Iterable[int]]) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        assert parts.port is not None
        self._address = (parts.hostname, parts.port)
        self._requests = requests
        self._load = load
        self._pids = pids
        self._received = 0
        """Bytes of the present answer."""
        self._accepted_by = 0
        """The process that has accepted the connection; 0 where it is not known."""

    async def run(self) -> None:
        writer: asyncio.StreamWriter | None = None
        while not self._load.stop.is_set():
            if writer is None:
                try:
                    async with asyncio.timeout(CONNECT_SECONDS):
                        reader, writer = await asyncio.open_connection(*self._address)
                    self._accepted_by = 0
                except (OSError, TimeoutError) as error:
                    self._load.refused += 1
                    self._load.failures.append(f"refused: {error!r}")
                    await asyncio.sleep(0.05)
                    continue
            try:
                keep = await self._ask(reader, writer)
            except (OSError, asyncio.IncompleteReadError) as error:
                self._load.cut += 1
                self._load.failures.append(
                    f"cut after {self._received} bytes on a connection of process {self._accepted_by}: {error!r}"
                )
                keep = False
            if not keep:
                await _close(writer)
                writer = None
        if writer is not None:
            await _close(writer)

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection stays open."""
        self._received = 0
        writer.write(next(self._requests))
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        self._received = len(head)
        if not self._accepted_by and (pids := list(self._pids())):
            self._accepted_by = accepted_by(self._address[1], writer.get_extra_info("sockname")[1], pids)
        load = self._load
        load.streaming += 1
        try:
            if b"transfer-encoding: chunked" in head:
                while size := int(await reader.readuntil(b"\r\n"), 16):
                    self._received += len(await reader.readexactly(size + 2))
                await reader.readexactly(2)
            else:
                (length,) = (line for line in head.split(b"\r\n") if line.startswith(b"content-length:"))
                await reader.readexactly(int(length.partition(b":")[2]))
        finally:
            load.streaming -= 1
        if head.startswith(b"http/1.1 200"):
            load.complete += 1
        else:
            load.failed += 1
            load.failures.append(head.split(b"\r\n")[0].decode())
        return b"connection: close" not in head


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


def _request(text: str, tokens: int) -> bytes:
    body = {"model": "fake", "messages": [{"role": "user", "content": text}], "max_tokens": tokens, "stream": True}
    encoded = json.dumps(body | {"ignore_eos": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(encoded)}\r\n\r\n"
    return head.encode() + encoded


@asynccontextmanager
async def streaming_load(
    url: str,
    clients: int,
    tokens: int = 10,
    *,
    conversations: bool = False,
    pids: Callable[[], Iterable[int]] = tuple,
) -> AsyncIterator[Load]:
    """Clients that stream from the chat route until the end of the block; all answers have ended then.

    conversations: each request begins a new one; otherwise all are the same. pids: the processes that may accept the
    connections, so that a failure names its own.
    """
    load = Load()
    texts = (f"hello {secrets.token_hex(8)}" if conversations else "hello" for _ in itertools.count())
    requests = (_request(text, tokens) for text in texts)
    tasks = [asyncio.create_task(_Client(url, requests, load, pids).run()) for _ in range(clients)]
    try:
        await until(lambda: load.complete + load.cut + load.refused >= clients)
        yield load
        load.stop.set()
        async with asyncio.timeout(HANG_SECONDS):
            await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)
