"""The table of an exchange's states, and the paths that exchanges take through it."""

from __future__ import annotations

import pytest
from tests.support.hooks import HookSequence, SpyHook
from tests.support.relay import GET, OK, Request, answering, post, relaying

from hemostat.hooks import Refusal, Rewrite
from hemostat.relay.exchange import Exchange
from hemostat.relay.exchange_state import (
    DONE,
    FORWARDED,
    HEAD_HELD,
    QUEUED,
    STARTING,
    STREAMING,
    TRANSITIONS,
    ExchangeState,
)

BAD = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 2\r\n\r\nno"


def test_every_state_is_in_the_table_can_be_reached_and_can_end() -> None:
    assert set(TRANSITIONS) == set(ExchangeState)
    assert frozenset().union(*TRANSITIONS.values()) == set(ExchangeState) - {STARTING}
    assert all(DONE in following for state, following in TRANSITIONS.items() if state is not DONE)
    assert not TRANSITIONS[DONE]


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> list[ExchangeState]:
    """The states that exchanges enter, in order."""
    states: list[ExchangeState] = []
    enter = Exchange._enter

    def recorded(self: Exchange, state: ExchangeState) -> None:
        enter(self, state)
        states.append(state)

    monkeypatch.setattr(Exchange, "_enter", recorded)
    return states


@pytest.mark.interpreted
async def test_only_the_first_request_waits_for_a_connection(entered: list[ExchangeState]) -> None:
    async with relaying(answering([])) as (_, _, connect):
        client = await connect()
        for _ in range(2):
            await client.send(GET)
            await client.response()
    assert entered == [QUEUED, FORWARDED, HEAD_HELD, STREAMING, DONE, FORWARDED, HEAD_HELD, STREAMING, DONE]


@pytest.mark.interpreted
async def test_a_replayed_request_is_forwarded_twice(entered: list[ExchangeState]) -> None:
    def answer(request: Request) -> bytes:
        return BAD if request.body == b"rewritten" else OK

    hook = SpyHook(lambda _: Rewrite(b"rewritten"), wanted=True, replays=True)
    async with relaying(answering([], answer), hook=HookSequence([hook])) as (_, _, connect):
        client = await connect()
        await client.send(post(b"own"))
        assert (await client.response("POST")).status == 200
    # Both responses have a Content-Length and are collected: the head is not sent before the body is complete.
    assert entered == [QUEUED, FORWARDED, HEAD_HELD, FORWARDED, HEAD_HELD, DONE]


@pytest.mark.interpreted
async def test_a_refused_request_is_not_forwarded(entered: list[ExchangeState]) -> None:
    hook = HookSequence([Refusal(400, b"{}"), SpyHook(lambda _: Refusal(400, b"{}"))])
    async with relaying(answering([]), hook=hook) as (_, upstream, connect):
        client = await connect()
        for _ in range(2):
            await client.send(post(b"x"))
            assert (await client.response("POST")).status == 400
        assert upstream.connections == 0
    assert entered == [DONE, DONE]
