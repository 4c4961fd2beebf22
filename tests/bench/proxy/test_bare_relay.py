"""The relay that others are compared with does hand on requests and responses."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from tests.bench.proxy.bare_relay import ClientEnd


@pytest.mark.parametrize("heads", [False, True])
async def test_requests_of_one_connection_are_answered(heads: bool) -> None:
    received: list[bytes] = []
    ended = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.read(1 << 16):  # a request is written at once
            received.append(head)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-Number: %d\r\n\r\nhello" % len(received))
        writer.close()
        await writer.wait_closed()
        ended.set()

    upstream = await asyncio.start_server(answer, "127.0.0.1", 0)
    to_upstream = upstream.sockets[0].getsockname()[1]
    relay = await asyncio.get_running_loop().create_server(lambda: ClientEnd(to_upstream, heads=heads), "127.0.0.1", 0)
    async with httpx.AsyncClient(trust_env=False) as client:
        url = f"http://127.0.0.1:{relay.sockets[0].getsockname()[1]}/path"
        for number in (1, 2):
            # Without a body, httpx writes a request at once.
            response = await client.get(url, headers={"Connection": "keep-alive", "X-Own": "yes"})
            assert (response.status_code, response.text) == (200, "hello")
            assert response.headers["X-Number"] == str(number)
    await asyncio.wait_for(ended.wait(), 60)
    relay.close()
    upstream.close()
    assert len(received) == 2
    for request in received:
        assert request.startswith(b"GET /path HTTP/1.1\r\n")
        assert b"\r\nX-Own: yes\r\n" in request
        # A field of one connection is not handed on by what looks at heads.
        assert (b"\r\nConnection: keep-alive" in request) is not heads
