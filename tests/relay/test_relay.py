"""What the relay forwards, and in which form."""

from __future__ import annotations

import asyncio
import re
import time

import pytest
from tests.support.relay import (
    GET,
    OK,
    Request,
    UpstreamConnection,
    answering,
    budget_of,
    post,
    relaying,
)
from tests.support.waiting import HANG_SECONDS, until

from hemostat.relay.limits import Limits


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "PATCH", "PROPFIND", "FOO", "M-SEARCH", "foo"])
@pytest.mark.parametrize("target", ["/v1/chat/completions", "/what/ever?x=%20&y=/../", "/%2e%2e//"])
async def test_every_method_and_path_passes(method: str, target: str) -> None:
    seen: list[Request] = []
    async with relaying(answering(seen)) as (_, _, connect):
        client = await connect()
        await client.send(f"{method} {target} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
        assert (await client.response(method)).body == b"ok"
    assert (seen[0].method, seen[0].target) == (method.encode(), target.encode())


async def test_options_star_and_absolute_form() -> None:
    seen: list[Request] = []
    async with relaying(answering(seen)) as (_, _, connect):
        client = await connect()
        await client.send(b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n")
        await client.response("OPTIONS")
        await client.send(b"GET http://b:1/x?y HTTP/1.1\r\nHost: a\r\n\r\n")
        await client.response()
    assert seen[0].target == b"*"
    assert seen[1].target == b"/x?y"
    assert seen[1].get(b"host") == [b"b:1"]


async def test_keep_alive_on_both_sides() -> None:
    seen: list[Request] = []
    started = time.perf_counter()
    async with relaying(answering(seen)) as (relay, upstream, connect):
        client = await connect()
        for n in range(50):
            await client.send(post(b"x" * n))
            assert (await client.response("POST")).body == b"ok"
        assert upstream.connections == 1
        assert relay.counters.requests == {("/v1/completions", "ok"): 50}
        assert sum(relay.counters.overhead) == 50
        assert 0 < relay.counters.overhead_sum < time.perf_counter() - started
    assert [request.body for request in seen] == [b"x" * n for n in range(50)]


async def test_request_head_is_kept_but_for_hop_by_hop_fields() -> None:
    seen: list[Request] = []
    async with relaying(answering(seen)) as (_, _, connect):
        client = await connect()
        await client.send(
            b"POST / HTTP/1.1\r\nhOSt: me\r\nX-B: 1\r\nConnection: keep-alive, X-Hop\r\nX-Hop: gone\r\nx-b:  2 \r\n"
            b"TE: trailers\r\nKeep-Alive: timeout=5\r\nProxy-Authorization: secret\r\nProxy-Connection: x\r\n"
            b"Trailer: a\r\nUpgrade: h2c\r\nX-Hemostat-Shadow: off\r\nx-HEMOSTAT-x: 1\r\nAuthorization: Bearer c\r\n"
            b"CONTENT-length: 2\r\nX-Request-Id: mine\r\ntraceparent: 00-11-22-01\r\nAccept: */*\r\n\r\nhi"
        )
        await client.response("POST")
    assert seen[0].headers == [
        (b"hOSt", b"me"),
        (b"X-B", b"1"),
        (b"x-b", b"2"),
        (b"Authorization", b"Bearer c"),
        (b"CONTENT-length", b"2"),
        (b"X-Request-Id", b"mine"),
        (b"traceparent", b"00-11-22-01"),
        (b"Accept", b"*/*"),
    ]


async def test_connection_cannot_remove_content_length_host_or_request_id() -> None:
    seen: list[Request] = []
    async with relaying(answering(seen)) as (_, _, connect):
        client = await connect()
        await client.send(post(b"hello", b"Connection: content-length, host, x-request-id", b"X-Request-Id: a"))
        await client.response("POST")
    assert seen[0].body == b"hello"
    assert seen[0].get(b"host") == [b"a"]
    assert len(seen[0].get(b"x-request-id")) == 1
    assert seen[0].get(b"x-request-id") != [b"a"]


async def test_missing_ids_are_generated() -> None:
    seen: list[Request] = []
    async with relaying(answering(seen)) as (_, _, connect):
        client = await connect()
        for _ in range(2):
            await client.send(GET)
            await client.response()
    ids = [request.get(b"x-request-id")[0] for request in seen]
    assert all(re.fullmatch(rb"[0-9a-f]{12}4[0-9a-f]{3}[89ab][0-9a-f]{15}", value) for value in ids)
    assert ids[0] != ids[1]
    assert all(re.fullmatch(rb"00-[0-9a-f]{32}-[0-9a-f]{16}-00", r.get(b"traceparent")[0]) for r in seen)


@pytest.mark.parametrize("sent", [None, b"Bearer mine"])
async def test_upstream_api_key_only_where_the_client_has_none(sent: bytes | None) -> None:
    seen: list[Request] = []
    async with relaying(answering(seen), upstream_api_key="k") as (_, _, connect):
        client = await connect()
        await client.send(post(b"", *([b"authorization: " + sent] if sent else [])))
        await client.response("POST")
    assert seen[0].get(b"authorization") == [sent or b"Bearer k"]


async def test_response_head_is_kept_but_for_hop_by_hop_fields() -> None:
    answer = (
        b"HTTP/1.1 418 I'm  a Teapot\r\nServer:uvicorn\r\nX-A: 1\r\nconnection: keep-alive, x-hop\r\nx-hop: 1\r\n"
        b"X-a:2 \r\n"
        b"Keep-Alive: 5\r\ncontent-LENGTH: 3\r\nSet-Cookie: a\r\nSet-Cookie: b\r\nProxy-Authenticate: x\r\n\r\nabc"
    )
    async with relaying(answering([], answer)) as (relay, _, connect):
        client = await connect()
        await client.send(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        assert await client.rest() == (
            b"HTTP/1.1 418 I'm  a Teapot\r\nServer:uvicorn\r\nX-A: 1\r\nX-a:2 \r\ncontent-LENGTH: 3\r\n"
            b"Set-Cookie: a\r\nSet-Cookie: b\r\nConnection: close\r\n\r\nabc"
        )
        assert relay.counters.requests == {("other", "client_error"): 1}


async def test_chunked_response_passes_byte_for_byte() -> None:
    body = b"5;ext=1\r\nhello\r\n1\r\n \r\n005\r\nworld\r\n0\r\nX-Trailer: 1\r\n\r\n"
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nA: b\r\n\r\n"
    async with relaying(answering([], head + body)) as (_, upstream, connect):
        for _ in range(2):
            client = await connect()
            await client.send(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            assert await client.rest() == head[:-2] + b"Connection: close\r\n\r\n" + body
        assert upstream.connections == 1


async def test_trailers_that_say_how_to_read_a_message_are_not_passed_on() -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"

    async def script(connection: UpstreamConnection) -> None:
        while await connection.request() is not None:
            await connection.send(head + b"2\r\nok\r\n0\r\nX: 1\r\nTransfer-Enc")
            await connection.send(b"oding: chunked\r\nContent-Length: 5\r\nAuthorization: a\r\nHost: b\r\n\r\n")

    async with relaying(script) as (_, upstream, connect):
        for _ in range(2):
            client = await connect()
            await client.send(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            got = await client.rest()
            assert got == head[:-2] + b"Connection: close\r\n\r\n2\r\nok\r\n0\r\nX: 1\r\n\r\n"
        assert upstream.connections == 1, "a field that is left out does not cost the connection"


async def test_stream_arrives_as_it_is_sent() -> None:
    gate = asyncio.Event()

    async def script(connection: UpstreamConnection) -> None:
        await connection.request()
        await connection.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for n in range(3):
            await connection.send(b"7\r\ndata: %d\r\n" % n)
            await gate.wait()
            gate.clear()
        await connection.send(b"0\r\n\r\n")

    async with relaying(script) as (_, _, connect):
        client = await connect()
        await client.send(GET)
        for n in range(3):
            assert await asyncio.wait_for(client.reader.readuntil(b"data: %d\r\n" % n), HANG_SECONDS)
            gate.set()
        assert await asyncio.wait_for(client.reader.readexactly(5), HANG_SECONDS) == b"0\r\n\r\n"


async def test_close_delimited_response_is_chunked_and_the_client_kept() -> None:
    async def script(connection: UpstreamConnection) -> None:
        await connection.request()
        await connection.send(b"HTTP/1.0 200 OK\r\nA: b\r\n\r\nhello ")
        await asyncio.sleep(0.01)
        await connection.send(b"world")

    async with relaying(script) as (_, upstream, connect):
        client = await connect()
        for _ in range(2):
            await client.send(GET)
            response = await client.response()
            assert response.body == b"hello world"
            assert response.headers == [(b"A", b"b"), (b"Transfer-Encoding", b"chunked")]
        assert upstream.connections == 2


@pytest.mark.parametrize("chunked", [True, False])
async def test_http_1_0_client_gets_plain_bytes(chunked: bool) -> None:
    async def script(connection: UpstreamConnection) -> None:
        request = await connection.request()
        assert request is not None
        assert request.get(b"host") != []
        coding = b"Transfer-Encoding: chunked\r\n" if chunked else b"Connection: close\r\n"
        body = b"5\r\nhello\r\n0\r\n\r\n" if chunked else b"hello"
        await connection.send(b"HTTP/1.1 103 Early\r\n\r\nHTTP/1.1 200 OK\r\n" + coding + b"\r\n" + body)

    async with relaying(script) as (_, _, connect):
        client = await connect()
        await client.send(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
        assert await client.rest() == b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhello"


async def test_http_1_0_keep_alive_only_where_asked_for() -> None:
    async with relaying(answering([])) as (_, _, connect):
        client = await connect()
        await client.send(b"GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n")
        assert (await client.response()).get(b"connection") == [b"keep-alive"]
        await client.send(b"GET / HTTP/1.0\r\n\r\n")
        assert (await client.rest()).endswith(b"Connection: close\r\n\r\nok")


@pytest.mark.parametrize(
    ("method", "answer"),
    [
        ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"),
        ("HEAD", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"),
        ("GET", b"HTTP/1.1 204 No Content\r\nA: b\r\n\r\n"),
        ("GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 77\r\n\r\n"),
    ],
)
async def test_responses_without_a_body(method: str, answer: bytes) -> None:
    async with relaying(answering([], answer)) as (_, upstream, connect):
        client = await connect()
        for _ in range(2):
            await client.send(f"{method} / HTTP/1.1\r\nHost: a\r\n\r\n".encode())
            assert await asyncio.wait_for(client.reader.readexactly(len(answer)), HANG_SECONDS) == answer
        assert upstream.connections == 1


@pytest.mark.parametrize("size", [0, 1, 70_000, 3_000_000])
async def test_bodies_of_every_framing_arrive_whole(size: int) -> None:
    seen: list[Request] = []
    body = bytes(range(256)) * (size // 256) + b"x" * (size % 256)

    def echo(request: Request) -> bytes:
        return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(request.body) + request.body

    async with relaying(answering(seen, echo)) as (_, _, connect):
        client = await connect()
        reading = asyncio.create_task(client.response("POST"))
        await client.send(post(body))
        assert (await reading).body == body
        reading = asyncio.create_task(client.response("POST"))
        await client.send(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        for at in range(0, size, 50_001):
            piece = body[at : at + 50_001]
            await client.send(b"%X;x=y\r\n%b\r\n" % (len(piece), piece))
        await client.send(b"0\r\nTrailer: dropped\r\n\r\n")
        assert (await reading).body == body
    assert seen[1].get(b"transfer-encoding") == [b"chunked"]
    assert seen[1].get(b"trailer") == []


async def test_pipelined_requests_are_answered_in_order_one_at_a_time() -> None:
    at_once = 0

    async def script(connection: UpstreamConnection) -> None:
        nonlocal at_once
        while (request := await connection.request()) is not None:
            at_once += 1
            assert at_once == 1
            await asyncio.sleep(0.002)
            at_once -= 1
            body = request.target + request.body
            await connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    async with relaying(script) as (_, _, connect):
        client = await connect()
        chunked = b"POST /c%d HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n"
        await client.send(
            b"".join(
                (b"\r\nGET /g%d HTTP/1.1\r\nHost: a\r\n\r\n" % n) + post(b"abc", path=b"/p%d" % n) + chunked % n
                for n in range(20)
            )
        )
        for n in range(20):
            for wanted in (b"/g%d", b"/p%dabc", b"/c%dhi"):
                assert (await client.response()).body == wanted % n


@pytest.mark.parametrize("at", range(1, 9))
async def test_empty_lines_before_a_request_are_ignored_however_they_are_cut(at: int) -> None:
    seen: list[Request] = []
    async with relaying(answering(seen)) as (_, _, connect):
        client = await connect()
        data = b"\r\n" * 4 + GET
        await client.send(data[:at])
        await asyncio.sleep(0.01)
        await client.send(data[at:])
        assert (await client.response()).body == b"ok"
    assert len(seen) == 1


async def test_pipelined_input_is_bounded() -> None:
    release = asyncio.Event()

    async def script(connection: UpstreamConnection) -> None:
        while await connection.request() is not None:
            await release.wait()
            await connection.send(OK)

    async with relaying(script) as (relay, _, connect):
        client = await connect()
        count = 40_000
        client.writer.write(GET * count)
        await until(lambda: any(inside.reading_paused for inside in relay.clients))
        (inside,) = relay.clients
        assert len(inside._buffer) <= 64 * 1024 + 256 * 1024
        release.set()
        for _ in range(300):
            assert (await client.response()).status == 200


async def test_expect_100_continue_is_answered_by_the_upstream() -> None:
    async def script(connection: UpstreamConnection) -> None:
        head = await connection.reader.readuntil(b"\r\n\r\n")
        assert b"Expect: 100-continue\r\n" in head
        await connection.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        assert await connection.reader.readexactly(5) == b"hello"
        await connection.send(OK)

    async with relaying(script, limits=Limits(buffered_body_bytes=4)) as (_, _, connect):
        client = await connect()
        await client.send(b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n")
        assert (
            await asyncio.wait_for(client.reader.readuntil(b"\r\n\r\n"), HANG_SECONDS)
            == b"HTTP/1.1 100 Continue\r\n\r\n"
        )
        await client.send(b"hello")
        assert (await client.response("POST")).body == b"ok"


async def test_expect_100_continue_is_answered_by_the_relay_before_a_short_body() -> None:
    asked: list[Request] = []
    async with relaying(answering(asked)) as (_, upstream, connect):
        client = await connect()
        await client.send(b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n")
        assert (
            await asyncio.wait_for(client.reader.readuntil(b"\r\n\r\n"), HANG_SECONDS)
            == b"HTTP/1.1 100 Continue\r\n\r\n"
        )
        assert upstream.connections == 0
        await client.send(b"hello")
        assert (await client.response("POST")).body == b"ok"
        assert asked[0].body == b"hello"
        assert asked[0].get(b"expect") == []


async def test_early_refusal_of_an_expected_body_closes() -> None:
    async def script(connection: UpstreamConnection) -> None:
        await connection.reader.readuntil(b"\r\n\r\n")
        await connection.send(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 2\r\n\r\nno")
        assert await connection.reader.read() == b""

    async with relaying(script, limits=Limits(buffered_body_bytes=4)) as (_, upstream, connect):
        client = await connect()
        await client.send(b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n")
        response = await client.response("POST")
        assert (response.status, response.get(b"connection")) == (401, [b"close"])
        await until(lambda: upstream.closed == 1)


async def test_interim_responses_are_forwarded() -> None:
    answer = b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n" + OK
    async with relaying(answering([], answer)) as (_, _, connect):
        client = await connect()
        await client.send(GET)
        response = await client.response()
        assert (response.interim, response.status) == ([103], 200)


@pytest.mark.parametrize("framing", [b"Content-Length: 19", b"Transfer-Encoding: chunked"])
@pytest.mark.parametrize("method", [b"GET", b"HEAD"])
async def test_an_interim_response_says_nothing_of_a_body(framing: bytes, method: bytes) -> None:
    """Seed 60020 of the fuzzer: llhttp reads a body of 104 where there is a length."""
    answer = b"HTTP/1.1 104 Later\r\n" + framing + b"\r\nX-A: 1\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
    async with relaying(answering([], answer)) as (_, _, connect):
        client = await connect()
        await client.send(method + b" / HTTP/1.1\r\nHost: a\r\n\r\n")
        sent = await client.reader.readuntil(b"\r\n\r\n")
        assert sent == b"HTTP/1.1 104 Later\r\nX-A: 1\r\n\r\n"
        assert (await client.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n")


async def test_websocket_upgrade_is_tunnelled() -> None:
    async def script(connection: UpstreamConnection) -> None:
        head = await connection.reader.readuntil(b"\r\n\r\n")
        assert b"\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n" in head
        assert b"Sec-WebSocket-Key: k\r\n" in head
        await connection.send(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-X: y\r\n\r\nfirst"
        )
        while data := await connection.reader.read(65536):
            await connection.send(data.upper())
        await connection.send(b"bye")

    async with relaying(script) as (relay, upstream, connect):
        client = await connect()
        await client.send(
            b"GET /v1/realtime HTTP/1.1\r\nHost: a\r\nUpgrade: WebSocket\r\nConnection: keep-alive, Upgrade\r\n"
            b"Sec-WebSocket-Key: k\r\n\r\nearly"
        )
        head = await client.reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 ")
        assert b"Sec-X: y\r\n" in head
        assert await client.reader.readexactly(10) == b"firstEARLY"
        assert budget_of(relay).held_bytes == 0, "nothing of the request is needed any more"
        await client.send(b"\x00\xffraw" * 50_000)
        assert await client.reader.readexactly(250_000) == b"\x00\xffRAW" * 50_000
        client.writer.write_eof()
        assert await client.rest() == b"bye"
        await until(lambda: upstream.closed == 1 and not relay.clients)
        assert relay.upstreams.engines[0].pool.size == 0


@pytest.mark.parametrize("sent", [b"Upgrade: h2c\r\nConnection: Upgrade", b"Upgrade: websocket"])
async def test_other_upgrades_are_not_forwarded(sent: bytes) -> None:
    seen: list[Request] = []
    async with relaying(answering(seen)) as (_, _, connect):
        client = await connect()
        await client.send(b"GET / HTTP/1.1\r\nHost: a\r\n" + sent + b"\r\n\r\n")
        assert (await client.response()).status == 200
    assert seen[0].get(b"upgrade") == []
    assert seen[0].get(b"connection") == []


async def test_pool_is_bounded_and_clients_wait_in_order() -> None:
    order: list[bytes] = []
    answers = asyncio.Semaphore(0)

    async def script(connection: UpstreamConnection) -> None:
        while (request := await connection.request()) is not None:
            order.append(request.target)
            await answers.acquire()
            await connection.send(OK)

    async with relaying(script, upstream_max_connections=2) as (relay, upstream, connect):
        clients = [await connect() for _ in range(12)]
        pool = relay.upstreams.engines[0].pool
        for n, client in enumerate(clients):
            await client.send(b"GET /%02d HTTP/1.1\r\nHost: a\r\n\r\n" % n)
            await until(lambda n=n: len(order) + pool.waiting == n + 1)  # type: ignore[misc]
        for n in range(2, len(clients)):
            answers.release()
            await until(lambda n=n: len(order) == n + 1)  # type: ignore[misc]
        answers.release()
        answers.release()
        for client in clients:
            assert (await client.response()).status == 200
        assert upstream.connections == 2
        assert pool.waiting == 0
    assert order == sorted(order)


async def test_limits() -> None:
    limits = Limits(head_bytes=2000, header_count=10, body_bytes=100)
    cases = [
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 3000, 431),
        (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 20 + b"\r\n", 431),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 101\r\n\r\n", 413),
        (
            b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3c\r\n"
            + b"x" * 60
            + b"\r\n3c\r\n"
            + b"x" * 60,
            413,
        ),
    ]
    async with relaying(answering([]), limits=limits) as (_, _, connect):
        for sent, status in cases:
            client = await connect()
            await client.send(sent)
            response = await client.response("POST")
            assert response.status == status
            assert response.get(b"connection") == [b"close"]
            assert b'"error": {"message": ' in response.body
            assert await client.rest() == b""


async def test_slow_heads_and_bodies_time_out() -> None:
    limits = Limits(head_seconds=0.2, body_seconds=0.2, idle_seconds=0.2)
    async with relaying(answering([]), limits=limits) as (_, _, connect):
        head, body, idle = [await connect() for _ in range(3)]
        await head.send(b"GET / HTTP/1.1\r\nHo")
        await body.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nx")
        assert (await head.response()).status == 408
        assert (await body.response()).status == 408
        assert await idle.rest() == b""
