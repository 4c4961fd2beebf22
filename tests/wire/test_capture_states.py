"""The table of the states of an intercepted exchange, and the paths that exchanges take through it."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.support.slow import examples
from tests.support.wire import POLICY, VERSION, chat, policy

from hemostat.interception.capture_state import (
    ASKED,
    CAPTURED,
    SAMPLED,
    SKIPPED,
    TRANSITIONS,
    UNSAMPLED,
    CaptureState,
)
from hemostat.interception.client_headers import ClientOptions
from hemostat.interception.intercepted_exchange import InterceptedExchange
from hemostat.interception.reports import Reports
from hemostat.ipc.messages import Policy
from hemostat.metrics.names import SHADOW_REQUESTS
from hemostat.openai.routes import CHAT

READABLE = json.dumps(chat()).encode()
UNSCORABLE = json.dumps(chat(use_beam_search=True)).encode()
ROWS = [{"token": "token_id:5", "logprob": -0.1, "top_logprobs": [{"token": "token_id:5", "logprob": -0.1}]}]
ANSWER = json.dumps(
    {
        "id": "x",
        "model": "fake",
        "prompt_token_ids": [1, 2],
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "a"},
                "logprobs": {"content": ROWS},
                "finish_reason": "stop",
                "token_ids": [5],
            }
        ],
        "usage": {"prompt_tokens": 2, "completion_tokens": 1},
    }
).encode()
TREATING = policy(served=VERSION, control_fraction=0.0, shadow_top_k=1)


@dataclass
class Told:
    """The reports of an exchange."""

    captures: int = 0
    sampled: Counter[tuple[str, ...]] = field(default_factory=Counter)
    """Sampled requests by outcome and reason."""

    def exchange(self, applied: Policy = POLICY, *, sampled: bool = True) -> InterceptedExchange:
        def emit(capture: object) -> bool:
            self.captures += 1
            return True

        def count(metric: str, labels: tuple[str, ...]) -> None:
            if metric == SHADOW_REQUESTS:
                self.sampled[labels] += 1

        def tally(kind: str, outcome: str, reason: str, tokens: int | None, requests: float = 1.0) -> None:
            pass

        reports = Reports(emit, count, tally, nonce=lambda: "nonce")
        return InterceptedExchange(
            reports, applied, CHAT, "r", ClientOptions(), sampled=sampled, client=b"", traceparent=""
        )


def answered(exchange: InterceptedExchange, status: int = 200, data: bytes = ANSWER) -> None:
    exchange.response_head(status, b"application/json", b"identity")
    exchange.response_data(data)
    exchange.response_end()


Step = Callable[[InterceptedExchange], Any]


def read(body: bytes | None) -> Step:
    return lambda exchange: exchange.request(body)


def closed(*, complete: bool = True) -> Step:
    return lambda exchange: exchange.closed(complete=complete)


PATHS: dict[str, tuple[list[Step], list[CaptureState], str]] = {
    # the calls -> the states after them, the reason that is counted
    "captured": ([read(READABLE), answered, closed()], [ASKED, ASKED, CAPTURED], ""),
    "the client has gone early": ([closed(complete=False)], [SKIPPED], "incomplete"),
    "the client has gone": ([read(READABLE), closed(complete=False)], [ASKED, SKIPPED], "incomplete"),
    "no tokens": (
        [read(READABLE), lambda exchange: answered(exchange, 500), closed()],
        [ASKED, ASKED, SKIPPED],
        "upstream_error",
    ),
    "no JSON": ([read(b"{"), closed()], [SKIPPED, SKIPPED], "bad_json"),
    "too large": ([read(None), closed()], [SKIPPED, SKIPPED], "body_too_large"),
    "cannot be scored": ([read(UNSCORABLE), closed()], [SKIPPED, SKIPPED], "beam_search"),
}


@pytest.mark.parametrize("name", PATHS)
def test_the_paths_that_sampled_exchanges_take(name: str) -> None:
    calls, expected, reason = PATHS[name]
    told = Told()
    exchange = told.exchange()
    states = [exchange.state]
    for call in calls:
        call(exchange)
        states.append(exchange.state)
        assert exchange.draws_engine == (exchange.state in {SAMPLED, ASKED})
    assert states == [SAMPLED, *expected]
    assert told.sampled == {("skipped", reason) if reason else ("shadowed", ""): 1}
    assert told.captures == (not reason)


def test_every_state_is_in_the_table_and_every_path_is_taken() -> None:
    assert set(TRANSITIONS) == set(CaptureState)
    taken = {
        pair
        for _, states, _ in PATHS.values()
        for pair in itertools.pairwise([SAMPLED, *states])
        if pair[0] is not pair[1]
    }
    assert taken == {(before, after) for before, following in TRANSITIONS.items() for after in following}


@pytest.mark.parametrize("name", PATHS)
def test_an_exchange_that_is_not_sampled_takes_none(name: str) -> None:
    told = Told()
    exchange = told.exchange(TREATING, sampled=False)
    for call in PATHS[name][0]:
        call(exchange)
        assert exchange.state is UNSAMPLED
        assert not exchange.draws_engine
    assert (told.captures, told.sampled.total()) == (0, 0)


def test_what_is_not_in_the_table_is_an_error() -> None:
    exchange = Told().exchange()
    with pytest.raises(AssertionError, match="no transition"):
        exchange._enter(CAPTURED)


class Calls(RuleBasedStateMachine):
    """The calls of `hooks.ExchangeHook` in every order that the relay may make them in."""

    @initialize(sampled=st.booleans(), applied=st.sampled_from([POLICY, TREATING]), far=st.integers(0, 2))
    def begin(self, sampled: bool, applied: Policy, far: int) -> None:
        """far: how far the exchange has got at the beginning; hypothesis often leaves out whole rules."""
        self.told = Told()
        self.sampled = sampled
        self.exchange = self.told.exchange(applied, sampled=sampled)
        self.read = self.rewritten = self.awaited = self.transforms = self.replayed = self.closed = False
        self.before = self.exchange.state
        if far > 0:
            self.request(READABLE)
            self.every_transition_is_in_the_table()
        if far > 1 and self.awaited:
            self.whole_response()

    @precondition(lambda self: not self.read and not self.closed)
    @rule(drawn=st.booleans())
    def sent_to(self, drawn: bool) -> None:
        self.exchange.sent_to("engine:1", drawn=drawn)

    @precondition(lambda self: self.closed)
    @rule()
    def look(self) -> None:
        """The relay reads these when the exchange has ended."""
        assert (self.exchange.comparison is not None) <= (self.exchange.arm != "none")

    @precondition(lambda self: not self.read and not self.closed)
    @rule(body=st.just(READABLE) | st.sampled_from([UNSCORABLE, b"{", None]))
    def request(self, body: bytes | None) -> None:
        self.rewritten = self.exchange.request(body) is not None
        self.read = self.awaited = True

    @precondition(lambda self: self.awaited and not self.closed)
    @rule(status=st.sampled_from([200, 400, 429, 500]), coding=st.sampled_from([b"identity", b"zstd"]))
    def response_head(self, status: int, coding: bytes) -> None:
        self.transforms = self.exchange.response_head(status, b"application/json", coding)
        self.awaited = False

    @precondition(lambda self: self.awaited and not self.closed)
    @rule()
    def whole_response(self) -> None:
        self.response_head(200, b"identity")
        if self.transforms:
            self.response_data(ANSWER)
            self.response_end()

    @precondition(lambda self: self.transforms and not self.closed)
    @rule(data=st.sampled_from([ANSWER, ANSWER[:20], ANSWER[20:], b"{}"]))
    def response_data(self, data: bytes) -> None:
        self.exchange.response_data(data)

    @precondition(lambda self: self.transforms and not self.closed)
    @rule()
    def response_end(self) -> None:
        self.transforms = False
        if self.rewritten and not self.replayed and self.exchange.replay():
            self.replayed = self.awaited = True
        else:
            self.exchange.response_end()

    @precondition(lambda self: not self.closed)
    @rule(complete=st.booleans(), own_status=st.sampled_from([0, 502]))
    def close(self, complete: bool, own_status: int) -> None:
        self.exchange.closed(complete=complete and self.read, own_status=own_status)
        self.closed = True

    @invariant()
    def every_transition_is_in_the_table(self) -> None:
        state = self.exchange.state
        assert state is self.before or state in TRANSITIONS[self.before]
        self.before = state

    @invariant()
    def it_is_counted_once_when_it_is_closed(self) -> None:
        assert self.told.sampled.total() == (self.closed and self.sampled)
        assert self.told.captures == (self.exchange.state is CAPTURED)
        if self.closed and self.sampled:
            assert not TRANSITIONS[self.exchange.state]


Calls.TestCase.settings = settings(max_examples=examples(300), stateful_step_count=12)
TestCalls = Calls.TestCase
