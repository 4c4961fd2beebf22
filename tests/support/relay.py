"""Real clients and a scripted upstream on both sides of a relay; h11 parses what they get."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import h11
from tests.support.waiting import HANG_SECONDS

from hemostat.hooks import Hook
from hemostat.relay.relay import Relay
from hemostat.relay.request_budget import RequestBudget
from hemostat.relay.upstreams.settings import UpstreamSettings

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
GET = b"GET /v1/models HTTP/1.1\r\nHost: a\r\n\r\n"


def post(body: bytes, *extra: bytes, path: bytes = b"/v1/completions") -> bytes:
    return b"\r\n".join(
        (b"POST " + path + b" HTTP/1.1", b"Host: a", b"Content-Length: %d" % len(body), *extra, b"", body)
    )


@dataclass
class Request:
    method: bytes
    target: bytes
    headers: list[tuple[bytes, bytes]]
    """Names in their original case."""
    body: bytes

    def get(self, name: bytes) -> list[bytes]:
        return [value for key, value in self.headers if key.lower() == name]


@dataclass
class Response:
    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes
    interim: list[int] = field(default_factory=list)

    def get(self, name: bytes) -> list[bytes]:
        return [value for key, value in self.headers if key.lower() == name]


def budget_of(relay: Relay) -> RequestBudget:
    """Returns what bounds the memory for requests: the relay publishes no figure of it."""
    return relay._context.budget


def reset(writer: asyncio.StreamWriter) -> None:
    """End a connection with a reset instead of an orderly close."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


class UpstreamConnection:
    """The upstream's end of one connection."""

    def __init__(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.number = number
        self.reader = reader
        self.writer = writer
        self._left = b""

    async def request(self) -> Request | None:
        """The next request as h11 reads it, None at the end of file."""
        parser = h11.Connection(h11.SERVER)
        if self._left:
            parser.receive_data(self._left)
        head: h11.Request | None = None
        body: list[bytes] = []
        while True:
            event = parser.next_event()
            if event is h11.NEED_DATA:
                parser.receive_data(await self.reader.read(65536))
            elif isinstance(event, h11.Request):
                head = event
            elif isinstance(event, h11.Data):
                body.append(bytes(event.data))
            elif isinstance(event, h11.EndOfMessage):
                assert head is not None
                self._left = parser.trailing_data[0]
                return Request(head.method, head.target, list(head.headers.raw_items()), b"".join(body))
            else:
                return None

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    def reset(self) -> None:
        reset(self.writer)


Script = Callable[[UpstreamConnection], Awaitable[None]]


class Upstream:
    """Runs the script on every connection."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.connections = 0
        self.closed = 0
        self.requests: list[Request] = []
        self.port = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self, context: ssl.SSLContext | None = None, port: int = 0) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port, ssl=context)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        connection = UpstreamConnection(self.connections, reader, writer)
        self.connections += 1
        try:
            await self.script(connection)
        except ConnectionError:
            pass
        except asyncio.CancelledError:
            pass
        finally:
            self._tasks.discard(task)
            self.closed += 1
            writer.close()
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                await writer.wait_closed()

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def answering(upstream_requests: list[Request], answer: bytes | Callable[[Request], bytes] = OK) -> Script:
    """Keeps connections alive; remembers every request and answers it."""

    async def script(connection: UpstreamConnection) -> None:
        while (request := await connection.request()) is not None:
            upstream_requests.append(request)
            await connection.send(answer(request) if callable(answer) else answer)

    return script


class Client:
    """A client's end, for raw bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self._left = b""

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def response(self, method: str = "GET", seconds: float = HANG_SECONDS) -> Response:
        """The next response as h11 reads it."""
        async with asyncio.timeout(seconds):
            return await self._response(method)

    async def _response(self, method: str) -> Response:
        parser = h11.Connection(h11.CLIENT)
        parser.send(h11.Request(method=method, target="/", headers=[("Host", "a")]))
        parser.send(h11.EndOfMessage())
        if self._left:
            parser.receive_data(self._left)
        interim: list[int] = []
        head: h11.Response | None = None
        body: list[bytes] = []
        while True:
            event = parser.next_event()
            if event is h11.NEED_DATA:
                parser.receive_data(await self.reader.read(65536))
            elif isinstance(event, h11.InformationalResponse):
                interim.append(event.status_code)
            elif isinstance(event, h11.Response):
                head = event
            elif isinstance(event, h11.Data):
                body.append(bytes(event.data))
            elif isinstance(event, h11.EndOfMessage):
                assert head is not None
                self._left = parser.trailing_data[0]
                return Response(head.status_code, list(head.headers.raw_items()), b"".join(body), interim)
            else:
                raise AssertionError(f"no response: {event}")

    async def rest(self, seconds: float = HANG_SECONDS) -> bytes:
        """Everything up to the end of file."""
        async with asyncio.timeout(seconds):
            return self._left + await self.reader.read()

    async def close(self) -> None:
        """At once: a graceful close would wait until all that was written is read."""
        self.writer.transport.abort()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


class Connect(Protocol):
    """Connects a client of this address."""

    def __call__(self, address: str = ...) -> Awaitable[Client]: ...


@contextlib.asynccontextmanager
async def listening(relay: Relay) -> AsyncIterator[Connect]:
    """A function that connects to the relay, which listens on a port of its own until the end."""
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    await relay.serve(sock)
    port = sock.getsockname()[1]
    clients: list[Client] = []

    async def connect(address: str = "127.0.0.1") -> Client:
        client = Client(*await asyncio.open_connection("127.0.0.1", port, local_addr=(address, 0)))
        clients.append(client)
        return client

    try:
        yield connect
    finally:
        for client in clients:
            await client.close()
        await relay.close()


@contextlib.asynccontextmanager
async def relaying(
    script: Script, *, context: ssl.SSLContext | None = None, hook: Hook | None = None, **options: Any
) -> AsyncIterator[tuple[Relay, Upstream, Connect]]:
    """A relay before a scripted upstream, and a function that connects to it. options: of `UpstreamSettings` with the
    prefix upstream_ (no checks of its health unless they say so), and of `Relay`."""
    upstream = Upstream(script)
    await upstream.start(context)
    scheme = "https" if context else "http"
    host = "localhost" if context else "127.0.0.1"
    settings: dict[str, Any] = {"health_seconds": 0.0}
    settings |= {
        name.removeprefix("upstream_"): options.pop(name) for name in [*options] if name.startswith("upstream_")
    }
    relay = Relay(UpstreamSettings((f"{scheme}://{host}:{upstream.port}",), **settings), **options)
    relay.hook = hook
    try:
        async with listening(relay) as connect:
            yield relay, upstream, connect
    finally:
        await upstream.stop()
        await asyncio.sleep(0.01)


def chat_json(content: str | None, reason: str = "stop", tokens: int = 7, **message: Any) -> bytes:
    return json.dumps(
        {
            "choices": [{"index": 0, "message": {"content": content, **message}, "finish_reason": reason}],
            "usage": {"completion_tokens": tokens},
        }
    ).encode()
