"""The least relays that Python can be: `python bare_relay.py PORT UPSTREAM_PORT [--heads]`.

The event loop of Hemostat's relay, one connection upstream for each client's, and bytes that are handed on as they
arrive: nothing is counted, bounded or waited for. With `--heads`, Hemostat's parsers check the heads of requests and
responses, which are then written anew: the least that an intermediary of HTTP does.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import cast

import uvloop

from hemostat.relay.http.request import parse_request
from hemostat.relay.http.response import parse_response

MAX_FIELDS = 100

Translation = Callable[[bytes], bytes]


def request_head(head: bytes) -> bytes:
    request = parse_request(head, MAX_FIELDS)
    return b"%b %b HTTP/1.1\r\n%b" % (request.method, request.target, b"\r\n".join(request.lines))


def response_head(head: bytes) -> bytes:
    response = parse_response(head, to_head=False)
    return b"\r\n".join((response.status_line, *response.lines))


class _End(asyncio.Protocol):
    """One of the two connections that belong together."""

    def __init__(self, translate: Translation | None, other: _End | None = None) -> None:
        """translate: what becomes of the head of each message that arrives; None: nothing is looked at."""
        self.other = other
        self.early = b""
        """What the client sent before there was a connection upstream."""
        self.transport: asyncio.Transport = cast("asyncio.Transport", None)
        self.translate = translate
        self.begins = True
        """A message begins with the next bytes. Its head has to be among them, and so has all of a request."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if self.other is None:
            self.early += data
            return
        if self.translate is not None and self.begins:
            self.begins = False
            self.other.begins = True
            head, end, body = data.partition(b"\r\n\r\n")
            data = b"".join((self.translate(head), end, body))
        self.other.transport.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.other is not None:
            self.other.transport.close()


class ClientEnd(_End):
    def __init__(self, upstream_port: int, *, heads: bool) -> None:
        super().__init__(request_head if heads else None)
        self.upstream_port = upstream_port
        self.of_upstream = response_head if heads else None
        self.connecting: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.connecting = asyncio.get_running_loop().create_task(self.connect())

    async def connect(self) -> None:
        loop = asyncio.get_running_loop()
        _, self.other = await loop.create_connection(
            lambda: _End(self.of_upstream, self), "127.0.0.1", self.upstream_port
        )
        if self.early:
            self.data_received(self.early)


async def _serve(port: int, upstream_port: int, *, heads: bool) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: ClientEnd(upstream_port, heads=heads), "127.0.0.1", port, backlog=2048)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_serve(int(sys.argv[1]), int(sys.argv[2]), heads="--heads" in sys.argv))
