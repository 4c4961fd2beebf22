"""Limits for each client: a rate and a number of requests in progress, by its Authorization header or its address."""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from tests.support.relay import GET, OK, Request, Response, UpstreamConnection, answering, post, relaying
from tests.support.waiting import until

from hemostat.metrics import names
from hemostat.relay import client_limits
from hemostat.relay.client_limits import ClientLimits

ANNA, BERT = b"Authorization: Bearer anna", b"Authorization: Bearer bert"


def limited(relay: Any) -> dict[tuple[str, ...], float]:
    found: dict[tuple[str, ...], float] = relay.counters.other.get(names.CLIENT_LIMITED_REQUESTS, {})
    return found


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
    for n in range(1000):
        key = b"%d" % n
        assert limits.begin(key, 0.0) is None
        limits.end(key)
    assert limits.begin(b"first", 0.0) is not None, "it still has one in progress"
    limits.end(b"first")
    assert limits.begin(b"first", 0.0) is None
    assert len(limits._clients) <= 100
