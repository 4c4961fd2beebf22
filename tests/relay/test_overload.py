"""Clients that take more than their share: slow and large bodies, many connections."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable

import pytest
from tests.support.hooks import HookSequence, SpyHook
from tests.support.relay import (
    GET,
    OK,
    Client,
    Connect,
    Request,
    UpstreamConnection,
    answering,
    budget_of,
    post,
    relaying,
)
from tests.support.waiting import until

from hemostat.hooks import Rewrite
from hemostat.metrics import names
from hemostat.relay.client_connection import ConnectionState
from hemostat.relay.clients import EVICTED_SHARE
from hemostat.relay.exchange_state import ExchangeState
from hemostat.relay.http.errors import BadRequest
from hemostat.relay.http.framing import CHUNKED, RequestBodyReader
from hemostat.relay.limits import Limits
from hemostat.relay.relay import Relay

GREEDY = "127.0.0.2"
"""Address of a client that takes more than its share."""


def long(length: int, sent: bytes = b"x", *fields: bytes) -> bytes:
    """The beginning of a request with a body of `length` bytes."""
    head = (b"POST /v1/completions HTTP/1.1", b"Host: a", b"Content-Length: %d" % length, *fields, b"", sent)
    return b"\r\n".join(head)


async def begin(relay: Relay, connect: Connect, data: bytes, address: str = "127.0.0.1") -> Client:
    """A client that has sent the beginning of a request, which the relay has read."""
    known = set(relay.clients)
    client = await connect(address)
    await client.send(data)
    await until(lambda: any(client.state is not ConnectionState.READING_HEAD for client in set(relay.clients) - known))
    return client


@pytest.mark.parametrize("hooked", [False, True])
async def test_incomplete_bodies_take_no_upstream_connection(hooked: bool) -> None:
    hook = HookSequence([*(SpyHook() for _ in range(3)), None]) if hooked else None
    async with relaying(answering([]), upstream_max_connections=2, hook=hook) as (relay, upstream, connect):
        slow = [await begin(relay, connect, long(1000)) for _ in range(3)]
        assert upstream.connections == 0
        client = await connect()
        await client.send(GET)
        assert (await client.response()).status == 200
        await slow[0].send(b"x" * 999)
        assert (await slow[0].response("POST")).status == 200


async def test_a_chunked_body_is_collected_until_it_is_too_long() -> None:
    seen: list[Request] = []
    head = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with relaying(answering(seen), limits=Limits(buffered_body_bytes=8)) as (relay, upstream, connect):
        client = await begin(relay, connect, head + b"5\r\nhello\r\n")
        assert upstream.connections == 0
        await client.send(b"0\r\n\r\n")
        assert (await client.response("POST")).status == 200
        client = await begin(relay, connect, head + b"9\r\nhello you\r\n")
        await until(lambda: any(client.exchange and client.exchange.upstream for client in relay.clients))
        await client.send(b"1\r\n!\r\n0\r\n\r\n")
        assert (await client.response("POST")).status == 200
    assert [request.body for request in seen] == [b"hello", b"hello you!"]


@pytest.mark.parametrize("size", [1, 30])
def test_many_short_chunks_are_refused_before_they_take_long(size: int) -> None:
    data = b"%x\r\n%b\r\n" % (size, b"x" * size) * (200_000 // size)
    reader = RequestBodyReader(CHUNKED, 1_000_000)
    started = time.thread_time()
    with pytest.raises(BadRequest, match="shorter than 64 bytes"):
        reader.feed(data)
    assert time.thread_time() - started < 0.05


def test_short_chunks_are_read_one_at_a_time_and_beside_long_ones() -> None:
    reader = RequestBodyReader(CHUNKED, 10_000_000)
    for _ in range(2000):
        assert reader.feed(b"1\r\nx\r\n") == ([b"x"], b"")
    data = (b"1\r\nx\r\n" + b"100\r\n%b\r\n" % (b"y" * 256)) * 2000
    pieces, rest = reader.feed(data + b"0\r\n\r\nnext")
    assert b"".join(pieces) == (b"x" + b"y" * 256) * 2000
    assert rest == b"next"


async def test_a_body_that_arrives_too_slowly_is_refused() -> None:
    limits = Limits(body_bytes_per_second=100, body_seconds=20.0)
    async with relaying(answering([]), limits=limits) as (relay, _, connect):
        slow, fast = [await begin(relay, connect, long(1_000_000)) for _ in range(2)]
        await slow.send(b"x" * 1000)
        await fast.send(b"x" * 100_000)

        def received() -> list[int]:
            return sorted(
                client.exchange.outgoing.unsent_bytes for client in relay.clients if client.exchange is not None
            )

        await until(lambda: received() == [1001, 100_001])
        for inside in relay.clients:
            inside.sweep(inside.since + 21.0)
        response = await slow.response("POST")
        assert response.status == 408
        assert b"less than 100 bytes/s" in response.body
        (inside,) = [client for client in relay.clients if client.state is ConnectionState.READING_BODY]
        # What was sent at once does not count again.
        inside.sweep(inside.since + 21.0)
        assert (await fast.response("POST")).status == 408


async def test_time_in_which_the_upstream_does_not_read_is_not_the_clients() -> None:
    go = asyncio.Event()

    async def script(connection: UpstreamConnection) -> None:
        await go.wait()
        await connection.request()
        await connection.send(OK)

    async with relaying(script) as (relay, _, connect):
        client = await connect()
        client.writer.write(post(b"x" * 20_000_000))
        await until(lambda: any(inside.reading_paused for inside in relay.clients))
        (inside,) = relay.clients
        inside.sweep(inside.since + 1000.0)
        go.set()
        assert (await client.response("POST")).status == 200


async def test_long_bodies_take_a_quarter_of_the_connections() -> None:
    limits = Limits(buffered_body_bytes=100)
    async with relaying(answering([]), upstream_max_connections=4, limits=limits) as (relay, _, connect):
        first = await begin(relay, connect, long(1000))
        second = await connect()
        await second.send(long(1000))
        refused = await second.response("POST")
        assert refused.status == 503
        assert refused.get(b"retry-after") == [b"1"]
        assert relay.counters.requests["/v1/completions", "overloaded"] == 1
        await first.send(b"x" * 999)
        assert (await first.response("POST")).status == 200
        third = await begin(relay, connect, long(1000))
        await third.close()
        await until(lambda: len(relay.clients) == 1)
        fourth = await begin(relay, connect, long(1000))
        await fourth.send(b"x" * 999)
        assert (await fourth.response("POST")).status == 200


async def test_the_oldest_incomplete_body_gives_way_where_memory_ends() -> None:
    limits = Limits(buffered_body_bytes=1000, buffered_bytes=2200)
    async with relaying(answering([]), limits=limits) as (relay, upstream, connect):
        first, second, third = [await begin(relay, connect, long(1000, b"x" * 700)) for _ in range(3)]
        refused = await first.response("POST")
        assert (refused.status, refused.get(b"retry-after")) == (503, [b"1"])
        assert upstream.connections == 0
        for client in second, third:
            await client.send(b"x" * 300)
            assert (await client.response("POST")).status == 200
        assert budget_of(relay).held_bytes == 0


def unmeasured(relay: Relay) -> None:
    """Nobody is known to be slow, however long the test takes."""
    for inside in relay.clients:
        inside.since += 1000.0


CREDENTIALS = itertools.count()


def invented() -> bytes:
    return b"Authorization: Bearer invented-%d" % next(CREDENTIALS)


@pytest.mark.parametrize(
    ("address", "field"),
    [
        (GREEDY, lambda: b"X: y"),
        (GREEDY, invented),
        ("127.0.0.1", lambda: b"Authorization: Bearer greedy"),
    ],
    ids=["an address", "an address with many credentials", "a credential"],
)
async def test_bodies_of_who_holds_most_give_way_and_slow_clients_keep_theirs(
    address: str, field: Callable[[], bytes]
) -> None:
    """The honest bodies are the oldest; all of them take less than their share."""
    limits = Limits(buffered_body_bytes=1000, buffered_bytes=8000)
    async with relaying(answering([]), limits=limits) as (relay, _, connect):
        honest = [await begin(relay, connect, long(500, b"x" * 300, b"Authorization: Bearer a")) for _ in range(5)]
        for _ in range(20):
            await begin(relay, connect, long(1000, b"x" * 700, field()), address)
        assert budget_of(relay).held_bytes <= 8000
        assert relay.counters.requests["/v1/completions", "overloaded"] >= 10
        for client in honest:
            await client.send(b"x" * 200)
            assert (await client.response("POST")).status == 200


async def test_incomplete_heads_count_and_are_given_back() -> None:
    async with relaying(answering([]), limits=Limits(buffered_bytes=100_000)) as (relay, _, connect):
        budget = budget_of(relay)
        honest = await connect()
        await honest.send(GET[:-2])
        greedy = []
        for _ in range(10):
            greedy.append(await connect(GREEDY))
            await greedy[-1].send(b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 20_000)
        await until(lambda: relay.counters.requests["other", "overloaded"] >= 6)
        assert 0 < budget.held_bytes <= 100_000
        refused = await greedy[0].response()
        assert (refused.status, refused.get(b"retry-after"), refused.get(b"connection")) == (503, [b"1"], [b"close"])
        await honest.send(b"\r\n")
        assert (await honest.response()).status == 200
        for client in greedy:
            await client.close()
        await until(lambda: budget.held_bytes == 0)


async def test_complete_heads_without_a_body_count() -> None:
    """The length of a head is what many fields take, whose body never comes."""
    async with relaying(answering([]), limits=Limits(buffered_bytes=50_000)) as (relay, _, connect):
        fields = [b"X-%d: %b" % (number, b"x" * 100) for number in range(100)]
        for _ in range(10):
            await begin(relay, connect, long(1000, b"", *fields))
        assert 30_000 < budget_of(relay).held_bytes <= 50_000
        assert relay.counters.requests["/v1/completions", "overloaded"] >= 5


async def test_what_is_sent_ahead_of_an_answer_counts() -> None:
    busy = Busy()
    async with relaying(busy.script, limits=Limits(buffered_bytes=50_000)) as (relay, _, connect):
        greedy, honest = await connect(GREEDY), await connect()
        await honest.send(GET)
        await greedy.send(GET)
        await until(lambda: busy.waiting == 2)
        await greedy.send(GET[:-2] + b"X: " + b"x" * 40_000)
        await until(lambda: budget_of(relay).held_bytes > 40_000)
        await greedy.send(b"x" * 20_000)
        with contextlib.suppress(ConnectionResetError):
            assert await greedy.rest() == b""
        assert budget_of(relay).held_bytes <= 1000, "of the honest one's copy"
        busy.go.set()
        assert (await honest.response()).status == 200


@pytest.mark.parametrize(
    ("address", "field"),
    [(GREEDY, lambda: b"X: y"), (GREEDY, invented), ("127.0.0.1", lambda: b"Authorization: Bearer greedy")],
    ids=["an address", "an address with many credentials", "a credential"],
)
async def test_long_bodies_of_who_sends_most_of_them_give_way(address: str, field: Callable[[], bytes]) -> None:
    limits = Limits(buffered_body_bytes=100)
    async with relaying(answering([]), upstream_max_connections=16, limits=limits) as (relay, _, connect):
        greedy = [await begin(relay, connect, long(1000, b"x", field()), address) for _ in range(4)]
        unmeasured(relay)
        honest = await begin(relay, connect, long(1000, b"x", b"Authorization: Bearer a"))
        unmeasured(relay)
        assert (await greedy[0].response("POST")).status == 503, "the oldest"
        refused = await begin(relay, connect, long(1000, b"x", field()), address)
        assert (await refused.response("POST")).status == 503, "it has its share"
        second = await begin(relay, connect, long(1000, b"x", b"Authorization: Bearer a"))
        assert (await greedy[1].response("POST")).status == 503
        for client in honest, second, *greedy[2:]:
            await client.send(b"x" * 999)
            assert (await client.response("POST")).status == 200


async def test_slow_long_bodies_give_way_even_to_their_own_client() -> None:
    """As behind a gateway, where nothing tells clients apart."""
    limits = Limits(buffered_body_bytes=100)
    async with relaying(answering([]), upstream_max_connections=8, limits=limits) as (relay, _, connect):
        slow = await begin(relay, connect, long(100_000))
        (of_slow,) = relay.clients
        fast = await begin(relay, connect, long(100_000, b"x" * 99_999))
        unmeasured(relay)
        third = await begin(relay, connect, long(100_000))
        assert (await third.response("POST")).status == 503, "nobody is known to be slow yet"
        of_slow.since = asyncio.get_running_loop().time() - 2.5
        of_slow.reading_paused = True
        fourth = await begin(relay, connect, long(100_000))
        assert (await fourth.response("POST")).status == 503, "it waits for the upstream, which does not read"
        of_slow.reading_paused = False
        fifth = await begin(relay, connect, long(100_000))
        assert (await slow.response("POST")).status == 503
        for client, rest in (fast, 1), (fifth, 99_999):
            await client.send(b"x" * rest)
            assert (await client.response("POST")).status == 200


class Busy:
    """An upstream that answers nothing before `go`."""

    def __init__(self) -> None:
        self.asked, self.go = asyncio.Event(), asyncio.Event()
        self.waiting = 0

    async def script(self, connection: UpstreamConnection) -> None:
        while await connection.request() is not None:
            self.waiting += 1
            self.asked.set()
            await self.go.wait()
            await connection.send(OK)


async def test_requests_that_wait_for_a_connection_count_too() -> None:
    busy = Busy()
    limits = Limits(buffered_body_bytes=1000, buffered_bytes=2000)
    async with relaying(busy.script, limits=limits, upstream_max_connections=1) as (relay, _, connect):
        first, second = await connect(), await connect()
        await first.send(GET)
        await busy.asked.wait()
        slow = await begin(relay, connect, long(1000, b"x" * 900))
        await second.send(post(b"x" * 1500))
        assert (await slow.response("POST")).status == 503
        busy.go.set()
        assert (await first.response()).status == 200
        assert (await second.response("POST")).status == 200
        assert budget_of(relay).held_bytes == 0


async def test_a_request_that_would_wait_beyond_the_memory_is_refused() -> None:
    busy = Busy()
    limits = Limits(buffered_body_bytes=1000, buffered_bytes=2000)
    async with relaying(busy.script, limits=limits, upstream_max_connections=1) as (relay, _, connect):
        first, second, third = [await connect() for _ in range(3)]
        await first.send(GET)
        await busy.asked.wait()
        await second.send(post(b"x" * 1500))
        await until(lambda: relay.upstreams.engines[0].pool.waiting == 1)
        await third.send(post(b"x" * 900))
        refused = await third.response("POST")
        assert (refused.status, refused.get(b"retry-after")) == (503, [b"1"])
        assert budget_of(relay).held_bytes < 2000
        busy.go.set()
        for client, method in ((first, "GET"), (second, "POST")):
            assert (await client.response(method)).status == 200
        await third.send(post(b"x" * 900))
        assert (await third.response("POST")).status == 200, "its connection stays open"
        assert budget_of(relay).held_bytes == 0


async def test_what_is_kept_to_be_sent_again_is_counted_and_given_up_first() -> None:
    go = asyncio.Event()
    hooks = [SpyHook(lambda _: Rewrite(b"rewritten")) for _ in range(2)]

    async def script(connection: UpstreamConnection) -> None:
        while await connection.request() is not None:
            await go.wait()
            await connection.send(OK)

    async with relaying(script, limits=Limits(buffered_bytes=1700), hook=HookSequence([*hooks])) as (relay, _, connect):
        first, second = await connect(), await connect()
        await first.send(post(b"x" * 900))
        await until(
            lambda: [client.exchange.state for client in relay.clients if client.exchange] == [ExchangeState.FORWARDED]
        )
        budget = budget_of(relay)
        assert budget.held_bytes == 900, "the client's own body; no copy of what was sent"
        await second.send(post(b"y" * 100))
        await until(lambda: hooks[1].calls)
        # The second request cannot be kept, so that it is not rewritten either.
        assert hooks[1].calls == [("request", None)]
        go.set()
        for client in first, second:
            assert (await client.response("POST")).status == 200
        assert budget.held_bytes == 0


async def test_copies_for_the_case_of_a_failure_do_not_switch_sampling_off() -> None:
    hooks = [SpyHook() for _ in range(9)]

    async def script(connection: UpstreamConnection) -> None:
        await asyncio.Event().wait()

    async with relaying(script, limits=Limits(buffered_bytes=2000), hook=HookSequence([*hooks])) as (relay, _, connect):
        for _ in hooks:
            await (await connect()).send(post(b"x" * 300))
        await until(lambda: hooks[-1].calls)
        assert [hook.calls for hook in hooks] == [[("request", b"x" * 300)]] * 9
        budget = budget_of(relay)
        await until(
            lambda: all(client.exchange.state is ExchangeState.FORWARDED for client in relay.clients if client.exchange)
        )
        assert 300 < budget.held_bytes <= 500, "the first one's copy"


async def test_a_client_that_does_not_read_frees_its_upstream_connection() -> None:
    async def script(connection: UpstreamConnection) -> None:
        while await connection.request() is not None:
            await connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 20000000\r\n\r\n" + bytes(20_000_000))

    limits = Limits(send_seconds=60.0)
    async with relaying(script, limits=limits, upstream_max_connections=1) as (relay, upstream, connect):
        client = await connect()
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await client.send(GET)
        await until(lambda: any(client.write_paused for client in relay.clients))
        (inside,) = relay.clients
        now = asyncio.get_running_loop().time()
        inside._stalled = 1, now - 1000.0
        inside.sweep(now)  # it has taken bytes since
        inside.sweep(now + 59.0)
        assert not inside.transport.is_closing()

        def swept() -> bool:
            nonlocal now
            now += 61.0  # again and again: the kernel may still take bytes for the client
            inside.sweep(now)
            return len(relay.clients) == 0

        await until(swept)
        await until(lambda: upstream.closed == 1)
        assert relay.counters.requests["/v1/models", "client_gone"] == 1


async def test_the_oldest_idle_connection_is_closed_for_a_new_one() -> None:
    limits = Limits(connections=3)
    async with relaying(answering([]), limits=limits) as (relay, _, connect):
        clients = []
        for number in range(3):
            clients.append(await connect())
            await until(lambda number=number: len(relay.clients) == number + 1)  # type: ignore[misc]
        for inside, since in zip(relay.clients, (3.0, 1.0, 2.0), strict=True):
            inside.since = since
        last = await connect()
        assert await clients[1].rest() == b"", "it was idle for longest"
        for client in clients[0], clients[2], last:
            await client.send(GET)
            assert (await client.response()).status == 200
        assert relay.counters.other[names.CLOSED_CONNECTIONS]["connections",] == 1


async def test_connections_of_the_address_that_has_most_are_closed_first() -> None:
    limits = Limits(connections=EVICTED_SHARE)
    async with relaying(answering([]), limits=limits) as (relay, _, connect):
        honest = [await connect(), await connect()]
        await until(lambda: len(relay.clients) == 2)  # they have waited for longest
        greedy = [await connect(GREEDY) for _ in range(EVICTED_SHARE - 2)]
        await until(lambda: len(relay.clients) == EVICTED_SHARE)
        greedy.append(await connect(GREEDY))
        for client in greedy[:2]:
            assert await client.rest() == b""
        for client in *honest, *greedy[2:]:
            await client.send(GET)
            assert (await client.response()).status == 200


async def test_slow_heads_and_bodies_give_way_to_new_connections() -> None:
    async with relaying(answering([]), limits=Limits(connections=2)) as (relay, _, connect):
        body = await begin(relay, connect, long(1000))
        head = await connect()
        await head.send(b"GET / HT")
        await until(lambda: len(relay.clients) == 2)
        for slow in body, head:
            client = await connect()
            with contextlib.suppress(ConnectionResetError):
                assert await slow.rest() == b""
            await client.send(GET)
            assert (await client.response()).status == 200


async def test_a_connection_that_is_answered_is_not_closed_for_a_new_one() -> None:
    go = asyncio.Event()

    async def script(connection: UpstreamConnection) -> None:
        while await connection.request() is not None:
            await go.wait()
            await connection.send(OK)

    async with relaying(script, limits=Limits(connections=1)) as (relay, _, connect):
        busy = await connect()
        await busy.send(GET)
        await until(lambda: any(client.exchange is not None for client in relay.clients))
        refused = await (await connect()).response()
        assert (refused.status, refused.get(b"retry-after"), refused.get(b"connection")) == (503, [b"1"], [b"close"])
        go.set()
        assert (await busy.response()).status == 200
        assert len(relay.clients) == 1


async def test_one_address_has_a_limit_of_its_own() -> None:
    async with relaying(answering([]), limits=Limits(connections_per_client=2)) as (relay, _, connect):
        clients = [await connect() for _ in range(2)]
        await until(lambda: len(relay.clients) == 2)
        await connect()
        assert await clients[0].rest() == b""
        assert relay.counters.other[names.CLOSED_CONNECTIONS]["connections_per_client",] == 1


async def test_many_are_closed_at_a_time() -> None:
    number = 3 * EVICTED_SHARE
    async with relaying(answering([]), limits=Limits(connections=number)) as (relay, _, connect):
        for _ in range(number + 1):
            await connect()
        await until(lambda: len(relay.clients) == number - 3)
