"""Limits for each client: a rate and a number of requests in progress, by its Authorization header or its address."""

from __future__ import annotations

import asyncio
import itertools
import json
import resource
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.memory import kept_bytes
from tests.support.relay import GET, OK, Request, Response, UpstreamConnection, answering, post, relaying
from tests.support.waiting import until

from hemostat.metrics import names
from hemostat.relay import client_limits
from hemostat.relay.access_log import AccessLog
from hemostat.relay.client_identity import client_network
from hemostat.relay.client_limits import ClientLimits
from hemostat.relay.http.request import RequestHead
from hemostat.relay.main import _within_descriptors

ANNA, BERT = b"Authorization: Bearer anna", b"Authorization: Bearer bert"


def limited(relay: Any) -> dict[tuple[str, ...], float]:
    result: dict[tuple[str, ...], float] = relay.counters.other.get(names.CLIENT_LIMITED_REQUESTS, {})
    return result


async def test_a_client_beyond_its_rate_gets_429_and_its_connection_stays_open() -> None:
    seen: list[Request] = []
    limits = ClientLimits(requests_per_second=0.001, burst=2)
    async with relaying(answering(seen), client_limits=limits) as (relay, _, connect):
        client = await connect()

        async def ask(request: bytes) -> Response:
            await client.send(request)
            return await client.response("POST")

        assert [(await ask(post(b"{}", ANNA))).status for _ in range(3)] == [200, 200, 429]
        refused = await ask(post(b"{}", ANNA))
        assert 900 <= int(refused.get(b"retry-after")[0]) <= 1000
        assert b"rate_limit_exceeded" in refused.body
        assert (await ask(post(b"{}", BERT))).status == 200, "another client"
        await client.send(GET[:-2] + ANNA + b"\r\n\r\n")
        assert (await client.response()).status == 200, "GET does not count"
        assert len(seen) == 4
        assert limited(relay) == {("rate",): 2.0}
        assert relay.counters.requests["/v1/completions", "refused"] == 2


SPELLINGS = [bytes(letters) for letters in itertools.product(*zip(b"bearer", b"BEARER", strict=True))]


async def test_a_credential_is_one_client_however_it_is_spelled() -> None:
    seen: list[Request] = []
    async with relaying(answering(seen), client_limits=ClientLimits(requests_per_second=0.001, burst=5)) as (
        relay,
        _,
        connect,
    ):
        client = await connect()
        for spelling in SPELLINGS:
            for field in (b"Authorization: %b anna", b"authorization:%b \t  anna "):
                await client.send(post(b"{}", field % spelling))
                await client.response("POST")
        assert (len(SPELLINGS), len(seen)) == (64, 5)
        assert limited(relay) == {("rate",): 123.0}


@pytest.mark.parametrize(
    "fields",
    [
        [b"X-Api-Key: anna", b"X-Api-Key: bert", b"Authorization:", b"Authorization:  \t"],
        [b"Authorization: Bearer anna\r\nAuthorization: Bearer %d" % number for number in range(3)],
    ],
)
async def test_what_vllm_does_not_check_names_no_client(fields: list[bytes]) -> None:
    seen: list[Request] = []
    async with relaying(answering(seen), client_limits=ClientLimits(requests_per_second=0.001, burst=2)) as (
        _,
        _,
        connect,
    ):
        client = await connect()
        for field in fields:
            await client.send(post(b"{}", field))
            await client.response("POST")
    assert len(seen) == 2


async def test_requests_in_progress_are_limited_and_end_with_their_client() -> None:
    go, asked = asyncio.Event(), 0

    async def script(connection: UpstreamConnection) -> None:
        nonlocal asked
        while await connection.request() is not None:
            asked += 1
            await go.wait()
            await connection.send(OK)

    async with relaying(script, client_limits=ClientLimits(concurrent=2)) as (relay, _, connect):
        clients = [await connect() for _ in range(3)]
        for client in clients[:2]:
            await client.send(post(b"{}"))
        await until(lambda: asked == 2)
        await clients[2].send(post(b"{}"))
        assert (await clients[2].response("POST")).status == 429, "all of one address, without a header"
        await clients[2].send(post(b"{}", ANNA, b"Connection: keep-alive"))
        await until(lambda: asked == 3)
        await clients[0].close()
        await until(lambda: len(relay.clients) == 2)
        last = await connect()
        await last.send(post(b"{}"))
        await until(lambda: asked == 4)
        go.set()
        assert (await last.response("POST")).status == 200
        assert limited(relay) == {("concurrent",): 1.0}


SWITCHED = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
WEBSOCKET = b"GET /v1/realtime HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"


async def test_websockets_count_while_they_are_open_and_are_logged_with_their_status(tmp_path: Path) -> None:
    async def script(connection: UpstreamConnection) -> None:
        await connection.reader.readuntil(b"\r\n\r\n")
        await connection.send(SWITCHED)
        await connection.reader.read()

    with (tmp_path / "access.log").open("wb", buffering=0) as file:
        log = AccessLog(file.fileno(), "json", lambda _: None)
        async with relaying(script, client_limits=ClientLimits(concurrent=1), access_log=log) as (relay, _, connect):
            first, second = await connect(), await connect()
            await first.send(WEBSOCKET)
            assert (await first.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
            await second.send(WEBSOCKET)
            assert (await second.response()).status == 429
            await first.close()
            await until(lambda: len(relay.clients) == 1)
            await second.send(WEBSOCKET)
            assert (await second.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
    lines = [json.loads(line) for line in (tmp_path / "access.log").read_text().splitlines()]
    assert [(line["status"], line["outcome"]) for line in lines] == [(429, "refused"), (101, "ok"), (101, "ok")]


def test_an_ipv6_client_is_its_network_and_an_ipv4_one_its_address_however_the_socket_listens() -> None:
    limits = ClientLimits("address", concurrent=1)
    head = RequestHead(b"POST", b"/", 1)
    keys = [
        limits.key(head, client_network(address))
        for address in ("2001:db8::1", "2001:db8::ffff:2", "2001:db8:0:1::1", "::ffff:10.0.0.1", "::ffff:10.0.0.2")
    ]
    assert len(set(keys)) == 4
    assert keys[0] == keys[1]
    assert keys[3:] == [limits.key(head, client_network(address)) for address in ("10.0.0.1", "10.0.0.2")]


@pytest.mark.parametrize(("asked", "allowed"), [((16_384, 8_192), (968, 484)), ((16_384, 16_384), (968, 968))])
def test_the_limit_of_one_client_is_lowered_with_that_of_all(
    asked: tuple[int, int], allowed: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (2000, 2000))
    config = {"connections": asked[0], "connections_per_client": asked[1]}
    upstream = {"urls": ["http://127.0.0.1:1"], "max_connections": 2000}
    limits, _ = _within_descriptors({"worker": 0, "limits": config, "upstream": upstream})
    assert (limits.connections, limits.connections_per_client) == allowed


@given(
    gaps=st.lists(st.floats(min_value=0.0, max_value=3.0), min_size=1, max_size=60),
    rate=st.floats(min_value=0.1, max_value=20.0),
    burst=st.integers(min_value=1, max_value=8),
)
def test_no_window_admits_more_than_the_burst_and_the_rate(gaps: list[float], rate: float, burst: int) -> None:
    limits, now, admitted = ClientLimits(requests_per_second=rate, burst=burst), 100.0, []
    for gap in gaps:
        now += gap
        if (exceeded := limits.begin(b"a", now)) is None:
            admitted.append(now)
        else:
            assert limits.begin(b"a", now + exceeded.retry_after + 1e-6) is None, "Retry-After is enough"
            now += exceeded.retry_after + 1e-6
            admitted.append(now)
    for first, start in enumerate(admitted):
        for last in range(first, len(admitted)):
            assert last - first + 1 <= burst + rate * (admitted[last] - start) + 1e-3


def test_clients_are_forgotten_beyond_a_number_but_not_while_they_have_a_request(monkeypatch: Any) -> None:
    monkeypatch.setattr(client_limits, "MAX_CLIENTS", 100)
    limits = ClientLimits(concurrent=1)
    assert limits.begin(b"first", 0.0) is None
    kept = 0
    for n in range(1000):
        key = b"%d" % n
        assert limits.begin(key, 0.0) is None
        limits.end(key)
        kept = kept or (kept_bytes(limits) if n == 200 else 0)
    assert limits.begin(b"first", 0.0) is not None, "it still has one in progress"
    limits.end(b"first")
    assert limits.begin(b"first", 0.0) is None
    assert kept_bytes(limits) < 1.1 * kept
