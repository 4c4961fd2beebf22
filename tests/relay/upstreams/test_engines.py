"""A relay before several engines: which one is asked, what their failures do to clients.

The engines have any free ports, and which one a conversation falls to depends on these: a test that needs requests at
each engine sends so many that none is left out, or none that belongs to a conversation (`affinity`).
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from tests.support.engines import FakeEngine, balancing
from tests.support.hooks import HookSequence, SpyHook
from tests.support.relay import OK, Client, Request, post
from tests.support.waiting import until

from hemostat.ipc.origin import parse_origin
from hemostat.relay.upstreams.group import Upstreams
from hemostat.relay.upstreams.health import FAILURES, HOLD_SECONDS, HealthState

CHAT = b"/v1/chat/completions"


def status(code: int) -> bytes:
    return b"HTTP/1.1 %d Reason\r\nContent-Length: 2\r\n\r\nno" % code


def chat(*turns: str, **members: Any) -> bytes:
    """A request of a conversation whose user and assistant take turns."""
    roles = ("user", "assistant")
    messages = [{"role": "system", "content": 'Be brief. {"}'}]
    messages += [{"role": roles[n % 2], "content": turn} for n, turn in enumerate(turns)]
    return post(json.dumps({"messages": messages, **members}).encode(), path=CHAT)


async def ask(client: Client, request: bytes) -> int:
    await client.send(request)
    return (await client.response("POST")).status


async def test_all_turns_of_a_conversation_reach_one_engine_and_conversations_all_engines() -> None:
    engines = [FakeEngine() for _ in range(4)]
    async with balancing(engines) as (_, connect):
        client = await connect()
        for number in range(120):
            before = [len(engine.asked) for engine in engines]
            first = f"question {number}"
            for turns in ([first], [first, "answer", "and then?"], [first, "answer", "and then?", "this", "why?"]):
                assert await ask(client, chat(*turns, stream=False, seed=len(turns))) == 200
            asked = [len(engine.asked) - count for engine, count in zip(engines, before, strict=True)]
            assert sorted(asked) == [0, 0, 0, 3]
        assert all(engine.asked for engine in engines)


@pytest.mark.parametrize("code", [502, 503])
async def test_a_generation_that_three_engines_refuse_is_answered_by_the_other(code: int) -> None:
    failing = [FakeEngine(status(code)) for _ in range(3)]
    async with balancing([*failing, FakeEngine()], upstream={"affinity": False}) as (relay, connect):
        client = await connect()
        for number in range(40):
            assert await ask(client, chat(f"question {number}")) == 200
        assert [engine.health.state for engine in relay.upstreams.engines] == [HealthState.EJECTED] * 3 + [
            HealthState.UP
        ]


@pytest.mark.parametrize(("code", "path"), [(504, CHAT), (429, CHAT), (500, b"/v1/responses"), (503, b"/v1/responses")])
async def test_what_may_not_be_sent_twice_is_not(code: int, path: bytes) -> None:
    engines = [FakeEngine(status(code)), FakeEngine(status(code))]
    async with balancing(engines) as (_, connect):
        assert await ask(await connect(), post(b"{}", path=path)) == code
        assert sum(len(engine.asked) for engine in engines) == 1


async def test_a_request_is_not_sent_again_without_end() -> None:
    engines = [FakeEngine(status(503)) for _ in range(8)]
    async with balancing(engines) as (relay, connect):
        assert await ask(await connect(), chat("hello")) == 503
        assert sum(len(engine.asked) for engine in engines) == 4
        assert sum(engine.resent for engine in relay.upstreams.engines) == 3, "each is counted once"


@pytest.mark.parametrize("path", [CHAT, b"/v1/responses", b"/anything"])
async def test_an_engine_that_cannot_be_reached_costs_no_client_an_error(path: bytes) -> None:
    engines = [FakeEngine() for _ in range(4)]
    async with balancing(engines) as (relay, connect):
        for engine in engines[1:]:
            await engine.stop()
        client = await connect()
        for _ in range(20):
            assert await ask(client, post(b"{}", path=path)) == 200
        assert sum(len(engine.asked) for engine in engines) == 20
        assert relay.upstreams.engines[0].health.state is HealthState.UP


async def test_where_all_engines_are_ejected_requests_still_reach_one_that_is_back() -> None:
    engines = [FakeEngine(), FakeEngine()]
    async with balancing(engines) as (relay, connect):
        client = await connect()
        for engine in engines:
            await engine.stop()
        for _ in range(FAILURES):
            assert await ask(client, chat("hello")) == 502
        assert {engine.health.state for engine in relay.upstreams.engines} == {HealthState.EJECTED}
        await engines[1].start()
        assert await ask(client, chat("hello")) == 200


async def test_where_all_engines_are_ejected_those_that_can_be_reached_are_asked_first() -> None:
    engines = [FakeEngine() for _ in range(4)]
    async with balancing(engines, upstream={"affinity": False}) as (relay, connect):
        for engine in relay.upstreams.engines:
            engine.health.eject(asyncio.get_running_loop().time())
        relay.upstreams.engines[0].health.connection_failed(0.0)
        client = await connect()
        for _ in range(12):
            assert await ask(client, chat("hello")) == 200
        assert not engines[0].asked
        assert sum(len(engine.asked) for engine in engines) == 12


class Poison:
    """An engine's answers, as vLLM's to a request that it cannot compute: `fails` to requests with the word poison,
    b"" closes the connection. 200 to all others."""

    def __init__(self, fails: bytes) -> None:
        self.fails = fails

    def __call__(self, request: Request) -> bytes:
        if b"poison" not in request.body:
            return OK
        if not self.fails:
            raise ConnectionError
        return self.fails


@pytest.mark.parametrize("affinity", [True, False])
@pytest.mark.parametrize("others", [1, 3])
async def test_an_engine_that_answers_500_at_once_is_ejected_and_its_requests_are_answered_by_others(
    others: int, affinity: bool
) -> None:
    """Without affinity, most requests would go to it: it has the fewest in progress."""
    engines = [FakeEngine(status(500)), *(FakeEngine() for _ in range(others))]
    async with balancing(engines, upstream={"affinity": affinity}) as (relay, connect):
        client = await connect()
        for number in range(200):
            assert await ask(client, chat(f"question {number}")) == 200
        health = [engine.health for engine in relay.upstreams.engines]
        assert [each.ejections > 0 for each in health] == [True] + [False] * others
        assert health[0].state is not HealthState.UP
        assert len(engines[0].asked) <= 40


async def test_an_engine_that_closes_connections_is_ejected_by_the_clients_whom_others_answer() -> None:
    """A request is not sent again then, since it may be what ends the engine."""
    engines = [FakeEngine(), FakeEngine(Poison(b"")), FakeEngine(), FakeEngine()]
    async with balancing(engines) as (relay, connect):
        health = relay.upstreams.engines[1].health
        client = await connect()
        for number in range(400):
            assert await ask(client, chat(f"question {number}, poison for one engine")) in {200, 502}
            if health.state is HealthState.EJECTED:
                break
        assert health.state is HealthState.EJECTED
        assert sum(engine.health.ejections for engine in relay.upstreams.engines) == 1


@pytest.mark.parametrize("fails", [b"", status(500)], ids=["closes", "500"])
async def test_a_client_whose_requests_fail_at_every_engine_has_none_ejected(fails: bytes) -> None:
    """All of them in a conversation that falls to one engine; another client's requests between them."""
    engines = [FakeEngine(Poison(fails)) for _ in range(4)]
    async with balancing(engines) as (relay, connect):
        bad, good = await connect(), await connect()
        for number in range(150):
            await bad.send(chat("poison", seed=number).replace(b"Host: a", b"Host: a\r\nAuthorization: Bearer bad", 1))
            assert (await bad.response("POST")).status in {500, 502}
            assert await ask(good, chat(f"question {number}")) == 200
        assert {engine.health.state for engine in relay.upstreams.engines} == {HealthState.UP}
        assert not sum(engine.health.ejections for engine in relay.upstreams.engines)


@pytest.mark.parametrize("clients", [1, 400])
async def test_engines_that_all_answer_503_get_hardly_more_requests_than_clients_send(clients: int) -> None:
    engines = [FakeEngine(status(503)) for _ in range(4)]
    async with balancing(engines) as (_, connect):
        client = await connect()
        for number in range(400):
            key = b"Host: a\r\nAuthorization: Bearer %d" % (number % clients)
            await client.send(chat(f"question {number}").replace(b"Host: a", key, 1))
            assert (await client.response("POST")).status == 503
        assert sum(len(engine.asked) for engine in engines) <= 1.15 * 400


async def test_a_request_that_two_engines_fail_is_not_sent_to_a_third() -> None:
    engines = [FakeEngine(Poison(status(500))) for _ in range(4)]
    async with balancing(engines) as (_, connect):
        assert await ask(await connect(), chat("poison")) == 500
        assert sum(len(engine.asked) for engine in engines) == 2


async def test_an_answer_with_an_error_is_not_given_up_for_an_engine_that_is_out_of_reach() -> None:
    engines = [FakeEngine(Poison(status(500))), FakeEngine()]
    async with balancing(engines) as (relay, connect):
        await engines[1].stop()
        client = await connect()
        for number in range(40):
            assert await ask(client, chat(f"question {number}")) == 200
        assert not relay.upstreams.engines[1].health.reachable
        assert await ask(client, chat("poison")) == 500


async def test_a_request_that_failed_is_not_sent_to_a_drained_engine() -> None:
    engines = [FakeEngine(status(503)), FakeEngine()]
    async with balancing(engines) as (relay, connect):
        relay.upstreams.set_drained({engines[1].name})
        assert await ask(await connect(), chat("hello")) == 503
        assert not engines[1].asked


async def test_a_killed_engine_is_ejected_by_its_checks_and_returns_when_it_is_back() -> None:
    engines = [FakeEngine(), FakeEngine()]
    async with balancing(engines, upstream={"health_seconds": 0.05}) as (relay, connect):
        first = relay.upstreams.engines[0]
        await engines[0].stop()
        await until(lambda: first.health.state is HealthState.EJECTED)
        client = await connect()
        for number in range(20):
            assert await ask(client, chat(f"question {number}")) == 200
        assert not engines[0].asked
        await engines[0].start()
        await until(lambda: first.health.state is HealthState.UP)
        for number in range(60):
            assert await ask(client, chat(f"question {number}")) == 200
        assert engines[0].asked


async def test_a_lone_engine_that_has_ended_counts_as_up_only_after_it_is_back() -> None:
    engine = FakeEngine()
    async with balancing([engine], upstream={"health_seconds": 0.05}) as (relay, connect):
        health = relay.upstreams.engines[0].health
        await engine.stop()
        await until(lambda: health.state is HealthState.EJECTED)
        relay.upstreams.sweep(asyncio.get_running_loop().time() + HOLD_SECONDS[-1])
        assert relay.upstreams.report()[0].state == "ejected"
        client = await connect()
        await client.send(chat("hello"))
        failed = await client.response("POST")
        assert (failed.status, failed.get(b"retry-after")) == (502, [b"1"])
        await engine.start()
        assert await ask(client, chat("hello")) == 200, "it is asked all the same"
        await until(lambda: health.state is HealthState.UP)


async def test_a_lone_engine_without_checks_counts_as_up_only_after_a_request_succeeds() -> None:
    engine = FakeEngine()
    async with balancing([engine]) as (relay, connect):
        await engine.stop()
        client = await connect()
        for _ in range(FAILURES):
            assert await ask(client, chat("hello")) == 502
        relay.upstreams.sweep(asyncio.get_running_loop().time() + HOLD_SECONDS[-1])
        assert relay.upstreams.report()[0].state != "up"
        await engine.start()
        assert await ask(client, chat("hello")) == 200
        assert relay.upstreams.report()[0].state == "up"


async def test_an_engine_whose_health_check_fails_gets_no_requests() -> None:
    engines = [FakeEngine(), FakeEngine()]
    async with balancing(engines, upstream={"health_seconds": 0.05}) as (relay, connect):
        engines[1].healthy = False
        await until(lambda: relay.upstreams.engines[1].health.state is HealthState.EJECTED)
        client = await connect()
        for number in range(20):
            assert await ask(client, chat(f"question {number}")) == 200
        assert not engines[1].asked


async def test_a_drained_engine_finishes_what_it_has_and_gets_nothing_new() -> None:
    release = asyncio.Event()

    def held(_: Request) -> Awaitable[bytes]:
        async def answer() -> bytes:
            await release.wait()
            return OK

        return answer()

    engines = [FakeEngine(held), FakeEngine(held)]
    async with balancing(engines) as (relay, connect):
        waiting = [await connect(), await connect()]
        for client in waiting:
            await client.send(post(b"{}", path=b"/anything"))
        await until(lambda: [len(engine.asked) for engine in engines] == [1, 1])
        relay.upstreams.set_drained({engines[0].name})
        release.set()
        for client in waiting:
            assert (await client.response("POST")).status == 200
        for number in range(10):
            assert await ask(waiting[0], chat(f"question {number}")) == 200
        assert len(engines[0].asked) == 1
        report = relay.upstreams.report()[0]
        assert (report.drained, report.outstanding) == (True, 0)
        relay.upstreams.set_drained(())
        for number in range(60):
            assert await ask(waiting[0], chat(f"question {number}")) == 200
        assert len(engines[0].asked) > 1


async def test_a_wait_for_a_connection_ends_with_503_and_when_to_try_again() -> None:
    release = asyncio.Event()

    async def never() -> bytes:
        await release.wait()
        return OK

    engine = FakeEngine(lambda _: never())
    async with balancing([engine], upstream={"max_connections": 1, "queue_seconds": 0.2}) as (_, connect):
        first, second = await connect(), await connect()
        await first.send(chat("hello"))
        await until(lambda: len(engine.asked) == 1)
        await second.send(chat("hello"))
        refused = await second.response("POST")
        assert refused.status == 503
        assert refused.get(b"retry-after") == [b"1"]
        release.set()
        assert (await first.response("POST")).status == 200
        assert await ask(second, chat("hello")) == 200, "the connection to the client stays open"


@pytest.mark.parametrize("kill", ["stop", "stop_and_start"])
async def test_engines_rolled_under_load_cost_no_request_that_was_not_theirs(kill: str) -> None:
    """One engine after the other ends and returns, while clients ask without a pause. A request that was sent to an
    engine as it ended may fail, since nobody knows whether it was begun: one of each client at each end."""
    engines = [FakeEngine() for _ in range(4)]
    statuses: list[int] = []
    done = asyncio.Event()

    async def keep_asking(connect: Callable[[], Awaitable[Client]], name: str) -> None:
        client, number = await connect(), 0
        while not done.is_set():
            number += 1
            statuses.append(await ask(client, chat(f"{name} {number}")))

    async with balancing(engines, upstream={"health_seconds": 0.05}) as (relay, connect):
        asking = [asyncio.create_task(keep_asking(connect, str(number))) for number in range(4)]
        for index, engine in enumerate(engines[:2]):
            await engine.stop()
            await until(lambda at=index: relay.upstreams.engines[at].health.state is HealthState.EJECTED)  # type: ignore[misc]
            if kill == "stop_and_start":
                await engine.start()
                await until(lambda at=index: relay.upstreams.engines[at].health.state is HealthState.UP)  # type: ignore[misc]
        done.set()
        await asyncio.gather(*asking)
    assert set(statuses) <= {200, 502}
    assert statuses.count(502) <= 2 * len(asking) < statuses.count(200)


@pytest.mark.parametrize("reached", [True, False])
async def test_the_hook_learns_the_engine_before_the_request_and_when_another_answers(reached: bool) -> None:
    """`hooks.ExchangeHook.sent_to`: what may be asked for depends on the engine."""
    engines = [FakeEngine(status(503)), FakeEngine()]
    spies = [SpyHook() for _ in range(10)]
    hook = HookSequence(list(spies))
    async with balancing(engines, upstream={"affinity": False}, hook=hook) as (_, connect):
        names = [engine.name for engine in engines]
        if not reached:
            await engines[0].stop()
        client = await connect()
        for number, spy in enumerate(spies):
            assert await ask(client, chat(f"question {number}")) == 200
            assert spy.engines in ([names[1]], names)
        assert spies[0].calls[0][0] == "request"
        assert any(spy.engines == names for spy in spies)


@pytest.mark.parametrize(("affinity", "draws"), [(False, True), (False, False), (True, True)])
async def test_the_engine_of_a_sampled_request_is_drawn_where_none_is_preferred(affinity: bool, draws: bool) -> None:
    """Alike requests, none of which has to wait: without a draw all go to one engine, or to each in turn."""
    engines = [FakeEngine(), FakeEngine()]
    spies = [SpyHook(draws_engine=draws) for _ in range(40)]
    async with balancing(engines, upstream={"affinity": affinity}, hook=HookSequence(list(spies))) as (_, connect):
        client = await connect()
        for _ in spies:
            assert await ask(client, chat("the same question")) == 200
    chosen, drawn = [spy.engines[0] for spy in spies], {index for spy in spies for index in spy.drawn}
    in_turn = [here != there for here, there in itertools.pairwise(chosen)]
    assert drawn == {draws and not affinity}
    assert (len(set(chosen)) == 1) == affinity
    assert all(in_turn) == (not affinity and not draws)


async def test_no_engine_is_drawn_while_one_has_no_free_connection() -> None:
    """The request would wait there, because it is sampled."""
    origins = [parse_origin(f"http://127.0.0.1:{port}") for port in (1, 2)]
    upstreams = Upstreams(asyncio.get_running_loop(), origins, limit=2, queue_seconds=1.0, affinity=False)
    assert [upstreams.draw(number) for number in (0.0, 0.9)] == upstreams.engines
    upstreams.engines[0].outstanding = 2
    assert upstreams.draw(0.9) is None


async def test_an_engine_that_replaces_one_that_was_drawn_is_not() -> None:
    engines = [FakeEngine(status(503)), FakeEngine()]
    spies = [SpyHook(draws_engine=True) for _ in range(20)]
    async with balancing(engines, upstream={"affinity": False}, hook=HookSequence(list(spies))) as (_, connect):
        client = await connect()
        for number, _ in enumerate(spies):
            assert await ask(client, chat(f"question {number}")) == 200
    assert [True, False] in [spy.drawn for spy in spies]
    assert all(spy.drawn in ([True], [True, False]) for spy in spies)


async def test_a_hook_that_fails_when_it_learns_the_engine_is_ignored() -> None:
    engines = [FakeEngine(), FakeEngine()]
    async with balancing(engines, hook=HookSequence([SpyHook(fails="sent_to")])) as (_, connect):
        assert await ask(await connect(), chat("hello")) == 200
