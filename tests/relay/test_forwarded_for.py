"""The address of a client behind proxies: only hops that are trusted may say it, whatever clients send."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from tests.support.relay import Client, Connect, Request, answering, budget_of, post, relaying
from tests.support.waiting import until

from hemostat.relay.access_log import AccessLog
from hemostat.relay.client_limits import ClientLimits
from hemostat.relay.forwarded_for import MAX_HOPS, TrustedProxies
from hemostat.relay.http.request import parse_request
from hemostat.relay.limits import Limits

PROXIES = TrustedProxies(["10.0.0.0/8", "192.0.2.7/32", "2001:db8:1::/48"])
CLIENT = b"203.0.113.9"


def named(peer: str, *lines: bytes, proxies: TrustedProxies = PROXIES) -> str:
    head = b"\r\n".join((b"POST /v1/completions HTTP/1.1", b"Host: a", b"Content-Length: 2", *lines))
    request = parse_request(head, 128)
    shown = proxies.name_client(peer, request)
    line = b"X-Forwarded-For: " + shown.encode()
    for kept in (request.lines, request.received):
        assert [own for own in kept if own.lower().startswith(b"x-forwarded-for")] == [line]
    assert request.lines[request.framing] == b"Content-Length: 2"
    return shown


def forwarded(*values: bytes) -> list[bytes]:
    return [b"x-FORWARDED-for:" + value for value in values]


@pytest.mark.parametrize(
    ("peer", "lines", "client"),
    [
        ("203.0.113.9", [b"1.2.3.4"], "203.0.113.9"),
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", [CLIENT], "203.0.113.9"),
        ("::ffff:10.0.0.1", [CLIENT], "203.0.113.9"),
        ("10.0.0.1", [b"1.2.3.4, 203.0.113.9"], "203.0.113.9"),
        ("10.0.0.1", [b"1.2.3.4", b"5.6.7.8", CLIENT], "203.0.113.9"),
        ("10.0.0.1", [b"1.2.3.4, 203.0.113.9,192.0.2.7 ,\t10.1.1.1"], "203.0.113.9"),
        ("10.0.0.1", [b"203.0.113.9:4711, [2001:db8:1::5]:80"], "203.0.113.9"),
        ("10.0.0.1", [b"2001:DB8:2:0::1"], "2001:db8:2::1"),
        ("10.0.0.1", [b"[2001:db8:2::1]"], "2001:db8:2::1"),
        ("10.0.0.1", [b"::ffff:203.0.113.9"], "203.0.113.9"),
        ("2001:db8:1::9", [CLIENT], "203.0.113.9"),
        ("2001:db8:2::9", [CLIENT], "2001:db8:2::9"),
        ("fe80::1%eth0", [CLIENT], "fe80::1"),
        # Every hop is trusted: the first of them is the client.
        ("10.0.0.1", [b"10.0.0.3, 10.0.0.2"], "10.0.0.3"),
        # What cannot be read was not written by a trusted hop: the last one that was read is the client.
        ("10.0.0.1", [b""], "10.0.0.1"),
        ("10.0.0.1", [b"203.0.113.9, unknown"], "10.0.0.1"),
        ("10.0.0.1", [b"203.0.113.9, , 10.0.0.2"], "10.0.0.2"),
        ("10.0.0.1", [b"203.0.113.9, 010.0.0.2"], "10.0.0.1"),
        ("10.0.0.1", [b"203.0.113.9, 10.0.0.2:99999999"], "10.0.0.1"),
        ("10.0.0.1", [b"203.0.113.9, 10.0.0.2;10.0.0.3"], "10.0.0.1"),
        ("10.0.0.1", [b"203.0.113.9, fe80::1%eth0"], "10.0.0.1"),
        ("10.0.0.1", [b"203.0.113.9, " + b"10.0.0.2," * MAX_HOPS + b"10.0.0.3"], "10.0.0.2"),
        ("10.0.0.1", [b"203.0.113.9, " + b"10.0.0.2," * (MAX_HOPS - 1) + b"10.0.0.3"], "203.0.113.9"),
    ],
)
def test_the_last_hop_that_is_not_trusted_is_the_client(peer: str, lines: list[bytes], client: str) -> None:
    assert named(peer, *forwarded(*lines)) == client


def test_without_trusted_networks_the_connection_says_who_the_client_is() -> None:
    nobody = TrustedProxies([])
    assert named("10.0.0.1", *forwarded(CLIENT), proxies=nobody) == "10.0.0.1"


def test_a_field_that_connection_names_is_read_all_the_same() -> None:
    """Else a client behind a gateway that passes Connection on could pass as the gateway."""
    assert named("10.0.0.1", *forwarded(CLIENT), b"Connection: X-Forwarded-For") == "203.0.113.9"


def invented(random_: random.Random) -> bytes:
    pieces = [
        b"10.0.0.1",
        b"2001:db8:1::1",
        b"[",
        b"]",
        b":",
        b",",
        b".",
        b" ",
        b"\t",
        b"%",
        b'"',
        b"::",
        b"1",
        b"for=",
    ]
    if random_.random() < 0.5:
        return b"".join(random_.choices(pieces, k=random_.randrange(12)))
    allowed = b"\t" + bytes(range(0x20, 0x7F)) + bytes(range(0x80, 0x100))
    return bytes(random_.choices(allowed, k=random_.randrange(40)))


def test_no_invented_value_raises_or_hides_the_client() -> None:
    random_ = random.Random(1)
    for _ in range(4_000):
        lines = [invented(random_) for _ in range(random_.randrange(1, 4))]
        # As HAProxy adds it, and as nginx does.
        behind = [*lines, CLIENT] if random_.random() < 0.5 else [*lines[:-1], lines[-1] + b", " + CLIENT]
        assert named("10.0.0.1", *forwarded(*behind)) == "203.0.113.9"
        assert named("203.0.113.8", *forwarded(*lines)) == "203.0.113.8"
        assert ip_address(named("10.0.0.1", *forwarded(*lines)))


async def ask(connect: Connect, clients: Sequence[bytes]) -> list[int]:
    """Sends requests of several clients on one connection of a gateway, and returns their statuses."""
    gateway = await connect()
    statuses = []
    for client in clients:
        await gateway.send(post(b"{}", *forwarded(client)))
        statuses.append((await gateway.response("POST")).status)
    await gateway.close()
    return statuses


async def test_clients_behind_a_gateway_have_limits_of_their_own_and_forged_addresses_buy_nothing(
    tmp_path: Path,
) -> None:
    seen: list[Request] = []
    limits = Limits(trusted_proxies=TrustedProxies(["127.0.0.1"]))
    rate = ClientLimits("address", requests_per_second=0.001, burst=1)
    with (tmp_path / "access.log").open("wb", buffering=0) as file:
        log = AccessLog(file.fileno(), "json", lambda _: None, clients=True)
        async with relaying(answering(seen), limits=limits, client_limits=rate, access_log=log) as (_, _, connect):
            assert await ask(connect, [b"192.0.2.1", b"192.0.2.2", b"192.0.2.1"]) == [200, 200, 429]
            assert await ask(connect, [b"192.0.2.3, 192.0.2.1", b"x, 192.0.2.2"]) == [429, 429]
            outside = await connect("127.0.0.2")
            for status, own in ((200, b"192.0.2.4"), (429, b"192.0.2.5")):
                await outside.send(post(b"{}", *forwarded(own)))
                assert (await outside.response("POST")).status == status
    assert [request.get(b"x-forwarded-for") for request in seen] == [[b"192.0.2.1"], [b"192.0.2.2"], [b"127.0.0.2"]]
    lines: list[dict[str, Any]] = [json.loads(line) for line in (tmp_path / "access.log").read_text().splitlines()]
    assert [line["client"][-9:] for line in lines] == [
        *("192.0.2.1", "192.0.2.2", "192.0.2.1", "192.0.2.1", "192.0.2.2", "127.0.0.2", "127.0.0.2"),
    ]


async def test_of_the_clients_behind_a_gateway_the_one_that_holds_most_gives_way() -> None:
    limits = Limits(buffered_bytes=50_000, trusted_proxies=TrustedProxies(["127.0.0.1"]))
    async with relaying(answering([]), limits=limits) as (relay, _, connect):

        async def begin(client: bytes) -> Client:
            connection = await connect()
            field = b"X-Forwarded-For: " + client
            await connection.send(post(b"x" * 16_000, field)[:-1])
            return connection

        honest = await begin(b"192.0.2.1")
        await until(lambda: budget_of(relay).held_bytes > 16_000)
        greedy = [await begin(b"192.0.2.2") for _ in range(3)]
        _, pending = await asyncio.wait(
            [asyncio.create_task(connection.response("POST")) for connection in greedy],
            return_when=asyncio.FIRST_COMPLETED,
        )
        assert len(pending) == 2
        await honest.send(b"x")
        assert (await honest.response("POST")).status == 200
        for task in pending:
            task.cancel()


async def test_without_the_setting_the_field_is_passed_on_and_not_read() -> None:
    seen: list[Request] = []
    rate = ClientLimits("address", requests_per_second=0.001, burst=1)
    async with relaying(answering(seen), client_limits=rate) as (_, _, connect):
        assert await ask(connect, [b"192.0.2.1", b"192.0.2.2"]) == [200, 429]
    assert [request.get(b"x-forwarded-for") for request in seen] == [[b"192.0.2.1"]]
