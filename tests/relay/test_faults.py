"""Failing, slow and malicious clients and upstreams."""

from __future__ import annotations

import asyncio
import socket
import ssl
from pathlib import Path

import pytest
from tests.support.certificates import certificate
from tests.support.hooks import HookSequence, SpyHook
from tests.support.relay import (
    GET,
    OK,
    Client,
    Request,
    Script,
    Upstream,
    UpstreamConnection,
    answering,
    post,
    relaying,
    reset,
)
from tests.support.waiting import HANG_SECONDS, until

from hemostat.relay.disconnect import DisconnectWatcher
from hemostat.relay.exchange_state import ExchangeState
from hemostat.relay.limits import Limits
from hemostat.relay.relay import Relay
from hemostat.relay.upstreams.connection import UpstreamConnection as RelayConnection

CHUNKED_HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


async def test_upstream_down_is_a_502_in_openai_shape() -> None:
    async with relaying(answering([])) as (relay, upstream, connect):
        await upstream.stop()
        client = await connect()
        for _ in range(2):
            await client.send(post(b"{}"))
            response = await client.response("POST")
            assert response.status == 502
            assert b'{"error": {"message": "the upstream cannot be reached (' in response.body
            assert response.get(b"connection") == []
        await client.send(b"HEAD / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert (await client.response("HEAD")).status == 502
        assert relay.counters.requests["/v1/completions", "upstream_failed"] == 2


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nContent-Length: +2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA : b\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nA: b\r\n c\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nA: b\x00\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok",
        b"HTTP/1.1 2 OK\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        b"",
    ],
)
async def test_malformed_responses_are_a_502(answer: bytes) -> None:
    async def script(connection: UpstreamConnection) -> None:
        await connection.request()
        await connection.send(answer)

    async with relaying(script) as (_, _, connect):
        client = await connect()
        await client.send(post(b"{}"))
        assert (await client.response("POST")).status == 502


@pytest.mark.parametrize(
    "start",
    [
        CHUNKED_HEAD + b"5\r\nhello\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello",
    ],
)
@pytest.mark.parametrize("by_reset", [True, False])
async def test_upstream_failing_during_its_response_ends_the_clients_connection(start: bytes, by_reset: bool) -> None:
    async def script(connection: UpstreamConnection) -> None:
        await connection.request()
        await connection.send(start)
        await asyncio.sleep(0.02)
        if by_reset:
            connection.reset()

    async with relaying(script) as (relay, _, connect):
        client = await connect()
        await client.send(GET)
        assert await client.rest() == start
        assert relay.counters.requests == {("/v1/models", "upstream_failed"): 1}


async def test_truncated_response_to_an_http_1_0_client_ends_in_a_reset() -> None:
    async def script(connection: UpstreamConnection) -> None:
        await connection.request()
        await connection.send(CHUNKED_HEAD + b"5\r\nhello\r\n")
        await asyncio.sleep(0.02)

    async with relaying(script) as (_, _, connect):
        client = await connect()
        await client.send(b"GET / HTTP/1.0\r\n\r\n")
        with pytest.raises(ConnectionResetError):
            await client.rest()


async def test_bytes_after_the_end_of_a_response_never_reach_the_next_request() -> None:
    async def script(connection: UpstreamConnection) -> None:
        await connection.request()
        await connection.send(OK + b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")
        await connection.request()

    async with relaying(script) as (_, upstream, connect):
        for _ in range(3):
            client = await connect()
            await client.send(GET)
            assert (await client.response()).body == b"ok"
        assert upstream.connections == 3


async def test_bytes_behind_a_response_never_reach_a_client_that_waits_for_a_connection() -> None:
    async def script(connection: UpstreamConnection) -> None:
        while await connection.request() is not None:
            await connection.send(OK)
            await asyncio.sleep(0)  # by now the relay has read the response alone
            await connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")

    async with relaying(script, upstream_max_connections=1) as (relay, upstream, connect):
        clients = [await connect() for _ in range(20)]
        for client in clients:
            await client.send(GET)
        assert {(await client.response()).body for client in clients} == {b"ok"}
        assert upstream.connections == 20, "from the first time on no connection is reused"
        assert not relay.upstreams.engines[0].pool.trusted


async def test_bytes_on_an_idle_connection_are_discarded() -> None:
    async def script(connection: UpstreamConnection) -> None:
        await connection.request()
        await connection.send(OK)
        await asyncio.sleep(0.02)
        await connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")
        await connection.request()

    async with relaying(script) as (relay, upstream, connect):
        client = await connect()
        await client.send(GET)
        assert (await client.response()).body == b"ok"
        await until(lambda: relay.upstreams.engines[0].pool.size == 0)
        await client.send(GET)
        assert (await client.response()).body == b"ok"
        assert upstream.connections == 2


def stale(seen: list[Request]) -> Script:
    """The first connection answers once, takes a second request and closes without a response; later ones answer."""

    async def script(connection: UpstreamConnection) -> None:
        while (request := await connection.request()) is not None:
            seen.append(request)
            if connection.number == 0 and len(seen) > 1:
                return
            await connection.send(OK)

    return script


async def test_safe_request_on_a_stale_connection_is_sent_once_more() -> None:
    seen: list[Request] = []
    async with relaying(stale(seen)) as (_, upstream, connect):
        client = await connect()
        for _ in range(2):
            await client.send(GET)
            assert (await client.response()).status == 200
        assert upstream.connections == 2
    assert len(seen) == 3
    assert seen[1] == seen[2]


async def test_unsafe_request_on_a_stale_connection_is_never_sent_twice() -> None:
    seen: list[Request] = []
    async with relaying(stale(seen)) as (_, upstream, connect):
        client = await connect()
        # vLLM may keep the response of this route.
        await client.send(post(b"1", path=b"/v1/responses"))
        assert (await client.response("POST")).status == 200
        await client.send(post(b"2", path=b"/v1/responses"))
        assert (await client.response("POST")).status == 502
        assert upstream.connections == 1
    assert [request.body for request in seen] == [b"1", b"2"]


async def test_generation_on_a_stale_connection_is_sent_once_more() -> None:
    seen: list[Request] = []
    async with relaying(stale(seen)) as (_, upstream, connect):
        client = await connect()
        for body in (b"1", b"2"):
            await client.send(post(body))
            assert (await client.response("POST")).status == 200
        assert upstream.connections == 2
    assert [request.body for request in seen] == [b"1", b"2", b"2"]


async def test_a_second_failure_is_not_retried() -> None:
    async def script(connection: UpstreamConnection) -> None:
        await connection.request()
        if connection.number == 0:
            await connection.send(OK)
            await connection.request()

    async with relaying(script) as (_, upstream, connect):
        client = await connect()
        await client.send(GET)
        assert (await client.response()).status == 200
        await client.send(GET)
        assert (await client.response()).status == 502
        assert upstream.connections == 2


async def test_pooled_connection_that_has_closed_is_not_used() -> None:
    async def script(connection: UpstreamConnection) -> None:
        await connection.request()
        await connection.send(OK)

    async with relaying(script) as (_, upstream, connect):
        client = await connect()
        for _ in range(5):
            await client.send(post(b"x"))
            assert (await client.response("POST")).status == 200
            await asyncio.sleep(0.01)
        assert upstream.connections == 5


class Waiting:
    """An upstream that takes a request, sends `start`, and sees when its connection ends."""

    def __init__(self, start: bytes = b"") -> None:
        self.start = start
        self.asked = asyncio.Event()
        self.ended = asyncio.Event()

    async def script(self, connection: UpstreamConnection) -> None:
        await connection.request()
        if self.start:
            await connection.send(self.start)
        self.asked.set()
        try:
            await connection.reader.read()
        finally:
            self.ended.set()


def count_checks(monkeypatch: pytest.MonkeyPatch) -> list[DisconnectWatcher]:
    """Grows by one with every check of a client's connection."""
    checks: list[DisconnectWatcher] = []
    check = DisconnectWatcher._check

    def counted(self: DisconnectWatcher) -> None:
        checks.append(self)
        check(self)

    monkeypatch.setattr(DisconnectWatcher, "_check", counted)
    return checks


@pytest.mark.parametrize("by_reset", [True, False])
@pytest.mark.parametrize("start", [b"", CHUNKED_HEAD, CHUNKED_HEAD + b"5\r\nhello\r\n"])
async def test_client_disconnect_closes_the_upstream_connection(
    by_reset: bool, start: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = Waiting(start)
    checks = count_checks(monkeypatch)
    async with relaying(waiting.script) as (relay, _, connect):
        client = await connect()
        await client.send(post(b"{}"))
        await asyncio.wait_for(waiting.asked.wait(), HANG_SECONDS)
        if start:
            await client.reader.read(len(start))
        await asyncio.sleep(0.05)
        if by_reset:
            reset(client.writer)
        else:
            client.writer.close()
        await until(waiting.ended.is_set)
        await until(lambda: not relay.clients)
        assert len(checks) <= (0 if by_reset else 2), "one that probes the client, one that sees its reset"
        assert relay.counters.requests == {("/v1/completions", "client_gone"): 1}


async def test_client_disconnect_while_reading_is_paused_closes_the_upstream_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waiting = Waiting()
    async with relaying(waiting.script) as (relay, _, connect):
        client = await connect()
        await client.send(GET)
        client.writer.write(GET * 20_000)
        await asyncio.wait_for(waiting.asked.wait(), HANG_SECONDS)
        (inside,) = relay.clients
        await until(lambda: inside.reading_paused)
        checks = count_checks(monkeypatch)
        client.writer.transport.abort()
        await until(waiting.ended.is_set)
        assert len(checks) <= 3, "one before the client left, one that probes it, one that sees its reset"


async def test_client_disconnect_removes_its_request_from_the_queue() -> None:
    waiting = Waiting()
    async with relaying(waiting.script, upstream_max_connections=1) as (relay, _, connect):
        first, second = await connect(), await connect()
        await first.send(GET)
        await asyncio.wait_for(waiting.asked.wait(), HANG_SECONDS)
        await second.send(GET)
        await until(lambda: relay.upstreams.engines[0].pool.waiting == 1)
        second.writer.close()
        await until(lambda: relay.upstreams.engines[0].pool.waiting == 0)


@pytest.mark.parametrize("count", [1, 3])
async def test_half_close_is_not_a_disconnect(count: int) -> None:
    async def script(connection: UpstreamConnection) -> None:
        while await connection.request() is not None:
            await asyncio.sleep(0.3)
            await connection.send(CHUNKED_HEAD)
            await asyncio.sleep(0.3)
            await connection.send(b"5\r\nhello\r\n")
            await asyncio.sleep(0.2)
            await connection.send(b"0\r\n\r\n")

    async with relaying(script) as (_, _, connect):
        client = await connect()
        client.writer.write(GET * count)
        client.writer.write_eof()
        for _ in range(count):
            response = await client.response()
            assert (response.status, response.body) == (200, b"hello")
        assert await client.rest() == b""


async def test_half_close_in_the_middle_of_a_request_ends_it() -> None:
    waiting = Waiting()
    async with relaying(waiting.script, limits=Limits(buffered_body_bytes=4)) as (_, upstream, connect):
        client = await connect()
        await client.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nhalf")
        await until(lambda: upstream.connections == 1)
        client.writer.write_eof()
        assert await client.rest() == b""
        await until(lambda: upstream.closed == 1)


@pytest.mark.parametrize("hooked", [True, False])
async def test_half_close_in_the_middle_of_a_pipelined_request_ends_it(hooked: bool) -> None:
    async def script(connection: UpstreamConnection) -> None:
        while await connection.request() is not None:
            await asyncio.sleep(0.05)
            await connection.send(OK)

    hook = HookSequence([None, SpyHook()]) if hooked else None
    async with relaying(script, hook=hook) as (relay, _, connect):
        client = await connect()
        client.writer.write(GET + b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nhalf")
        client.writer.write_eof()
        assert (await client.response()).status == 200
        assert await client.rest() == b""
        await until(lambda: not relay.clients)


async def test_slow_client_costs_bounded_memory() -> None:
    sent = 0

    async def script(connection: UpstreamConnection) -> None:
        nonlocal sent
        await connection.request()
        await connection.send(CHUNKED_HEAD)
        piece = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
        for _ in range(800):
            await connection.send(piece)
            sent += len(piece)
        await connection.send(b"0\r\n\r\n")

    async with relaying(script) as (relay, _, connect):
        client = await connect()
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await client.send(GET)
        before = -1
        while before != sent:
            before = sent
            await asyncio.sleep(0.15)
        (inside,) = relay.clients
        assert inside.transport.get_write_buffer_size() <= 512 * 1024
        assert sent < 30 * 1024 * 1024, "the rest is left with the upstream"
        client.writer.transport.resume_reading()  # type: ignore[attr-defined]
        assert len((await client.response()).body) == 800 * 0x10000


async def test_slow_upstream_costs_bounded_memory() -> None:
    go = asyncio.Event()

    async def script(connection: UpstreamConnection) -> None:
        connection.writer.transport.pause_reading()
        await go.wait()
        connection.writer.transport.resume_reading()
        request = await connection.request()
        assert request is not None
        await connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n%08d" % len(request.body))

    size = 40_000_000
    async with relaying(script) as (relay, _, connect):
        client = await connect()
        client.writer.write(post(b"x" * size))
        await until(lambda: bool(relay.clients))
        (inside,) = relay.clients
        # It is paused before there is a connection, too.
        await until(lambda: inside.exchange and inside.exchange.upstream and inside.reading_paused)
        assert inside.exchange is not None
        assert inside.exchange.upstream is not None
        # What was collected before the connection was used, and what was read beyond it.
        collected = Limits().buffered_body_bytes
        assert inside.exchange.upstream.transport.get_write_buffer_size() <= collected + 512 * 1024
        assert inside.reading_paused
        go.set()
        assert (await client.response("POST")).body == b"%08d" % size


async def test_body_that_is_read_before_there_is_a_connection_is_bounded() -> None:
    waiting = Waiting()
    async with relaying(waiting.script, upstream_max_connections=1) as (relay, _, connect):
        first, second = await connect(), await connect()
        await first.send(GET)
        await asyncio.wait_for(waiting.asked.wait(), HANG_SECONDS)
        second.writer.write(post(b"x" * 20_000_000))
        await until(lambda: any(inside.reading_paused for inside in relay.clients))
        exchanges = [client.exchange for client in relay.clients if client.exchange is not None]
        (inside,) = [exchange for exchange in exchanges if exchange.state is ExchangeState.QUEUED]
        assert inside.outgoing.unsent_bytes <= Limits().buffered_body_bytes + 512 * 1024
        first.writer.transport.abort()
        await until(lambda: inside.state is not ExchangeState.QUEUED)


async def test_what_waited_for_a_connection_does_not_lift_the_limit_of_what_is_read_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kernel takes only a part of it, as on a network."""
    waiting, end = Waiting(), asyncio.Event()
    made = RelayConnection.connection_made

    def with_small_buffer(self: RelayConnection, transport: asyncio.BaseTransport) -> None:
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        made(self, transport)

    monkeypatch.setattr(RelayConnection, "connection_made", with_small_buffer)

    async def script(connection: UpstreamConnection) -> None:
        if not waiting.asked.is_set():
            await waiting.script(connection)
            return
        connection.writer.transport.pause_reading()
        await end.wait()

    async with relaying(script, upstream_max_connections=1) as (relay, _, connect):
        first, second = await connect(), await connect()
        await first.send(GET)
        await asyncio.wait_for(waiting.asked.wait(), HANG_SECONDS)
        second.writer.write(post(b"x" * 40_000_000))
        await until(lambda: any(inside.reading_paused for inside in relay.clients))
        exchanges = [client.exchange for client in relay.clients if client.exchange is not None]
        (inside,) = [exchange for exchange in exchanges if exchange.state is ExchangeState.QUEUED]
        first.writer.transport.abort()
        await until(lambda: inside.upstream is not None)
        reader = next(client for client in relay.clients if client.exchange is inside)
        await until(lambda: reader.reading_paused or inside.request_complete)
        assert inside.upstream is not None
        assert inside.upstream.transport.get_write_buffer_size() <= 1024 * 1024
        assert not inside.request_complete
        end.set()


async def test_drain_lets_requests_in_progress_end_and_accepts_no_new_ones() -> None:
    go = asyncio.Event()

    async def script(connection: UpstreamConnection) -> None:
        while await connection.request() is not None:
            await go.wait()
            await connection.send(OK)

    async with relaying(script) as (relay, _, connect):
        idle, busy = await connect(), await connect()
        await busy.send(GET)
        await until(lambda: sum(inside.exchange is not None for inside in relay.clients) == 1 < len(relay.clients))
        draining = asyncio.create_task(relay.drain(5))
        assert await idle.rest() == b""
        assert not relay.ready
        with pytest.raises(ConnectionRefusedError):
            await connect()
        assert not draining.done()
        go.set()
        response = await busy.response()
        assert (response.body, response.get(b"connection")) == (b"ok", [b"close"])
        await busy.close()
        assert await draining


async def test_drain_leaves_time_for_one_more_request_however_long_a_connection_was_idle() -> None:
    """A client of a pool sends its next request at any moment, and not only just after an answer."""
    async with relaying(answering([])) as (relay, _, connect):
        client = await connect()
        await client.send(GET)
        assert (await client.response()).get(b"connection") == []
        (inside,) = relay.clients
        inside.since -= 20.0
        draining = asyncio.create_task(relay.drain(5))
        await until(lambda: not relay.ready)
        inside.sweep(asyncio.get_running_loop().time())
        await client.send(GET)
        answer = await client.response()
        assert (answer.status, answer.get(b"connection")) == (200, [b"close"])
        assert await draining
        await client.close()


async def test_drain_gives_up_after_its_time() -> None:
    waiting = Waiting()
    async with relaying(waiting.script) as (relay, _, connect):
        client = await connect()
        await client.send(GET)
        await asyncio.wait_for(waiting.asked.wait(), HANG_SECONDS)
        assert not await relay.drain(0.1)


def authority(folder: Path) -> tuple[Path, ssl.SSLContext]:
    """A certificate for localhost, and a server's context with it."""
    made = certificate(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made.cert, made.key)
    return made.cert, context


async def test_tls_upstream(tmp_path: Path) -> None:
    seen: list[Request] = []
    ca, context = authority(tmp_path)
    async with relaying(answering(seen), context=context, upstream_ca=ca) as (_, upstream, connect):
        client = await connect()
        for size in (1, 1_000_000):
            await client.send(post(b"x" * size))
            assert (await client.response("POST")).body == b"ok"
        assert upstream.connections == 1
        assert seen[0].get(b"host") == [b"localhost:%d" % upstream.port]
    assert len(seen[1].body) == 1_000_000


async def test_tls_upstream_with_an_unknown_authority_is_a_502(tmp_path: Path) -> None:
    _, context = authority(tmp_path)
    async with relaying(answering([]), context=context) as (_, _, connect):
        client = await connect()
        await client.send(GET)
        response = await client.response()
        assert response.status == 502
        assert b"upstream cannot be reached" in response.body


async def test_upstream_url_is_checked() -> None:
    for url in ("ftp://a", "http://", "http://a/v1", "a:80"):
        with pytest.raises(ValueError, match="upstream_url"):
            Relay(url)


async def test_host_names_and_ipv6_listen() -> None:
    upstream = Upstream(answering([]))
    await upstream.start()
    relay = Relay(f"http://localhost:{upstream.port}")
    sock = socket.socket(socket.AF_INET6)
    sock.bind(("::1", 0))
    await relay.serve(sock)
    client = Client(*await asyncio.open_connection("::1", sock.getsockname()[1]))
    await client.send(GET)
    assert (await client.response()).body == b"ok"
    await client.close()
    await relay.close()
    await upstream.stop()
    await asyncio.sleep(0.01)
