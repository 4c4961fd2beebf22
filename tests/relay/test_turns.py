"""Measures how long one client may hold the event loop, counted by pass of the loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import pytest
from tests.support.hooks import HookSequence, SpyHook
from tests.support.relay import GET, OK, Request, UpstreamConnection, answering, post, relaying
from tests.support.waiting import until

from hemostat.relay.http.framing import MAX_SMALL_CHUNKS
from hemostat.relay.limits import Limits
from hemostat.relay.turns import ANSWER_BYTES, MAX_NETWORKS, MAX_OWN_ANSWERS, TURN_BYTES, Turns
from hemostat.relay.upstreams.connection import MAX_INTERIM_RESPONSES, PIECE_BYTES, SHORT_PIECE_BYTES

REFUSED = post(b"", path=b"/v1/load_lora_adapter")
READ_BYTES = 256 * 1024
"""uvloop reads no more at a time."""


@contextlib.asynccontextmanager
async def growth(count: Callable[[], int]) -> AsyncIterator[list[int]]:
    """Returns by how much the count grows in each pass of the event loop."""
    grown: list[int] = []
    loop = asyncio.get_running_loop()
    last, running = count(), True

    def look() -> None:
        nonlocal last
        now = count()
        grown.append(now - last)
        last = now
        if running:
            loop.call_soon(look)

    look()
    yield grown
    running = False
    await asyncio.sleep(0)


async def test_empty_lines_before_a_request_are_ignored_however_they_are_cut() -> None:
    seen: list[Request] = []
    async with relaying(answering(seen), limits=Limits(head_bytes=100)) as (_, _, connect):
        client = await connect()
        for cut in (1, 2, 3, 49, 100):
            sent = b"\r\n" * 50 + GET
            for at in range(0, len(sent), cut):
                await client.send(sent[at : at + cut])
                await asyncio.sleep(0)
            assert (await client.response()).status == 200
        await client.send((b"\r\n" * 50 + GET) * 20)
        for _ in range(20):
            assert (await client.response()).status == 200
    assert len(seen) == 25


@pytest.mark.parametrize("packet", [2, 51, 1 << 20])
async def test_too_many_empty_lines_are_refused_in_how_many_packets_they_come(packet: int) -> None:
    async with relaying(answering([]), limits=Limits(head_bytes=101)) as (_, _, connect):
        client = await connect()
        sent = b"\r\n" * 51 + GET
        with contextlib.suppress(ConnectionError):
            for at in range(0, len(sent), packet):
                await client.send(sent[at : at + packet])
                await asyncio.sleep(0.001)
        response = await client.response()
        assert response.status == 400
        assert b"empty lines" in response.body
        assert await client.rest() == b""


@pytest.mark.parametrize("line", [b"\n", b"\r\r\n", b"\r\n\n"])
async def test_what_is_no_empty_line_does_not_pass_for_one(line: bytes) -> None:
    async with relaying(answering([])) as (_, _, connect):
        client = await connect()
        await client.send(b"\r\n" + line + GET)
        assert (await client.response()).status == 400


async def test_a_megabyte_of_empty_lines_is_not_read() -> None:
    async with relaying(answering([])) as (relay, _, connect):
        flood, other = await connect(), await connect()
        flood.writer.write(b"\r\n" * (1 << 19) + GET)
        await other.send(GET)
        assert (await other.response()).status == 200
        assert (await flood.response()).status == 400
        assert relay.counters.requests == {("/v1/models", "ok"): 1, ("other", "refused"): 1}


async def test_pipelined_requests_that_the_relay_refuses_are_answered_in_turns() -> None:
    number = (1 << 20) // len(REFUSED)
    async with relaying(answering([])) as (relay, _, connect):
        flood, other = await connect("127.0.0.2"), await connect()

        def refused() -> int:
            return relay.counters.requests.get(("other", "refused"), 0)

        reading = asyncio.create_task(flood.reader.readexactly(1 << 22))
        async with growth(refused) as grown:
            flood.writer.write(REFUSED * number)
            await until(lambda: refused() > 0)
            await other.send(GET)
            assert (await other.response()).status == 200
            before = refused()
            await until(lambda: refused() == number)
        assert sum(grown) == number
        assert 0 < max(grown) <= MAX_OWN_ANSWERS
        assert before < number // 4
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        assert all(inside.state.name == "READING_HEAD" for inside in relay.clients)


async def test_connections_of_one_client_take_turns() -> None:
    """Each gets one answer for what it has just sent; beyond that they share the client's turn."""
    connections, number = 20, 100
    async with relaying(answering([])) as (relay, _, connect):
        flood = [await connect("127.0.0.2") for _ in range(connections)]

        def refused() -> int:
            return relay.counters.requests.get(("other", "refused"), 0)

        async with growth(refused) as grown:
            for client in flood:
                client.writer.write(REFUSED * number)
            await until(lambda: refused() == connections * number)
        assert max(grown) <= connections + 2 * MAX_OWN_ANSWERS
        assert sorted(grown)[-connections] <= 2 * MAX_OWN_ANSWERS


async def test_bodies_of_one_client_are_read_in_turns() -> None:
    connections, size = 30, 1_000_000
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % size
    async with relaying(answering([])) as (relay, _, connect):
        flood = [await connect("127.0.0.2") for _ in range(connections)]

        def received() -> int:
            return sum(inside.exchange.outgoing.unsent_bytes for inside in relay.clients if inside.exchange)

        async with growth(received) as grown:
            for client in flood:
                client.writer.write(head + bytes(size - 1))
            await until(lambda: received() == connections * (size - 1))
        # One pass finds something on each of them; after it each has to wait for its turn.
        assert max(grown) <= connections * READ_BYTES
        assert sum(size > 2 * READ_BYTES for size in grown) <= 3
        for client in flood:
            await client.send(b"x")
            assert (await client.response("POST")).status == 200


async def test_short_chunks_take_up_the_turn() -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with relaying(answering([])) as (relay, _, connect):
        client = await connect()
        await client.send(head)
        await until(lambda: any(inside.exchange for inside in relay.clients))

        def waiting() -> int:
            return sum(not inside.transport.is_reading() for inside in relay.clients)

        async with growth(waiting) as grown:
            await client.send(b"1\r\nx\r\n" * MAX_SMALL_CHUNKS)
            await until(lambda: 1 in grown)
        await client.send(b"0\r\n\r\n")
        assert (await client.response("POST")).status == 200
        assert not waiting()


async def test_a_connection_that_is_closed_while_it_waits_is_forgotten() -> None:
    async with relaying(answering([])) as (relay, _, connect):
        flood = [await connect("127.0.0.2") for _ in range(5)]
        for client in flood:
            client.writer.write(REFUSED * 500)
        await until(lambda: any(not inside.transport.is_reading() for inside in relay.clients))
        for inside in relay.clients:
            inside.transport.abort()
        await until(lambda: not len(relay.clients))
        other = await connect("127.0.0.2")
        await other.send(GET)
        assert (await other.response()).status == 200


class Connection:
    def __init__(self, name: str, done: list[str]) -> None:
        self.name = name
        self.done = done

    def take_turn(self) -> None:
        self.done.append(self.name)


async def test_networks_go_on_one_after_the_other_with_one_connection_each() -> None:
    turns = Turns(asyncio.get_running_loop())
    done: list[str] = []
    for connection in range(3):
        turns.wait(b"a", Connection(f"a{connection}", done))
    turns.wait(b"b", Connection("b0", done))
    passes = []
    while len(done) < 4:
        await asyncio.sleep(0)
        passes.append(done.copy())
    assert done == ["a0", "b0", "a1", "a2"]
    assert ["a0", "b0"] in passes

    done.clear()
    for network in range(2 * MAX_NETWORKS):
        turns.wait(b"%d" % network, Connection(f"{network}", done))
    numbers = []
    while len(done) < 2 * MAX_NETWORKS:
        await asyncio.sleep(0)
        numbers.append(len(done))
    assert MAX_NETWORKS in numbers
    assert done == [f"{network}" for network in range(2 * MAX_NETWORKS)]


async def test_a_turn_is_used_up_by_network_and_begins_anew_with_each_pass() -> None:
    turns = Turns(asyncio.get_running_loop())
    assert [turns.spend(b"a", ANSWER_BYTES) for _ in range(MAX_OWN_ANSWERS)] == [False] * (MAX_OWN_ANSWERS - 1) + [True]
    assert not turns.spend(b"b", TURN_BYTES - 1)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not turns.spend(b"a", TURN_BYTES - 1)


STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def unchanged(data: bytes) -> bytes:
    return data


@pytest.mark.parametrize("event", [b"\n\n", b"\r\r", b":\n\n", b"data:\n\n"])
@pytest.mark.parametrize("chunk", [1, 1 << 16])
async def test_empty_events_of_an_engine_are_read_in_short_pieces(event: bytes, chunk: int) -> None:
    body = event * (READ_BYTES // len(event) // (8 if chunk == 1 else 1))
    pieces = [body[at : at + chunk] for at in range(0, len(body), chunk)]
    answer = STREAM + b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    hook = SpyHook(wanted=True, transform=unchanged)
    async with relaying(answering([], answer), hook=HookSequence([hook])) as (_, _, connect):
        client = await connect()
        await client.send(GET)
        async with growth(lambda: len(hook.seen)) as grown:
            assert (await client.response()).body == body
    # In one pass the end of what has been read, and the beginning of what is read then.
    assert 0 < max(grown) <= 2 * SHORT_PIECE_BYTES
    assert hook.seen == body


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("framing", [b"Content-Length: 1000000\r\n", b""])
async def test_a_long_response_arrives_whole_in_pieces(framing: bytes, wanted: bool) -> None:
    body = bytes(range(250)) * 4000
    hook = SpyHook(wanted=wanted, transform=unchanged)

    async def script(connection: UpstreamConnection) -> None:
        await connection.request()
        await connection.send(b"HTTP/1.1 200 OK\r\n" + framing + b"\r\n" + body)

    async with relaying(script, hook=HookSequence([hook])) as (_, _, connect):
        client = await connect()
        await client.send(GET)
        async with growth(lambda: len(hook.seen)) as grown:
            assert (await client.response()).body == body
    assert not wanted or framing or max(grown) <= 2 * PIECE_BYTES


async def test_what_follows_a_long_response_is_not_taken_for_the_next_one() -> None:
    size = 3 * PIECE_BYTES
    stray = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nstray"
    answers = [b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b%b" % (size, bytes(size), stray), OK]

    async def script(connection: UpstreamConnection) -> None:
        while await connection.request() is not None:
            await connection.send(answers.pop(0))

    async with relaying(script) as (_, upstream, connect):
        client = await connect()
        await client.send(GET)
        assert len((await client.response()).body) == size
        await client.send(GET)
        assert (await client.response()).body == b"ok"
        assert upstream.connections == 2


@pytest.mark.parametrize("number", [MAX_INTERIM_RESPONSES, MAX_INTERIM_RESPONSES + 1])
@pytest.mark.parametrize("cut", [7, 1 << 20])
async def test_interim_responses_are_bounded(number: int, cut: int) -> None:
    sent = b"HTTP/1.1 102 Processing\r\n\r\n" * number + OK

    async def script(connection: UpstreamConnection) -> None:
        while await connection.request() is not None:
            for at in range(0, len(sent), cut):
                await connection.send(sent[at : at + cut])
                await asyncio.sleep(0)

    async with relaying(script) as (_, _, connect):
        client = await connect()
        for _ in range(2 if number <= MAX_INTERIM_RESPONSES else 1):
            await client.send(GET)
            response = await client.response()
            assert response.status == (200 if number <= MAX_INTERIM_RESPONSES else 502)
            assert response.interim == [102] * MAX_INTERIM_RESPONSES
