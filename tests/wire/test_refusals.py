"""Refusals by the engine: sampling and profiles cause no error for a client."""

from __future__ import annotations

import random
from typing import Any

import httpx
import pytest
from tests.support.fake_vllm import FakeVllm
from tests.support.wire import (
    VERSION,
    Wire,
    chat,
    policy,
)

from hemostat.hooks import ExchangeHook, Refusal
from hemostat.openai import json_splice
from hemostat.openai.errors import leading_error_code
from hemostat.openai.routes import CHAT


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "body",
    [
        chat(model="nope"),
        chat(temperature=-1),
        {"model": "fake"},
        {"model": "fake", "prompt": "x"},
        chat("x" * 3000),
    ],
)
def test_sampling_does_not_change_errors(wire: Wire, body: dict[str, Any], stream: bool) -> None:
    body = body | {"stream": stream}
    wire.interceptor.policy = policy(scoring=False)
    plain = wire.send(CHAT, body)
    wire.interceptor.policy = policy()
    sampled = wire.send(CHAT, body)
    assert plain.status == sampled.status >= 400
    assert plain.body == sampled.body
    assert wire.shadow("skipped", "upstream_error") + wire.shadow("skipped", "invalid") == 1


@pytest.mark.parametrize("stream", [False, True])
def test_refused_logprobs_cause_no_error_for_the_client(wire: Wire, fake: FakeVllm, stream: bool) -> None:
    wire.interceptor.policy = policy(scoring=False)
    plain = wire.send(CHAT, chat(stream=stream))
    fake.max_logprobs = 5
    wire.interceptor.policy = policy()
    first = wire.send(CHAT, chat(stream=stream), splits=random.Random(3))
    assert (first.status, first.body, first.replayed) == (200, plain.body, True)
    assert json_splice.encode(fake.requests[-1]) == plain.sent
    assert fake.headers[-1][b"accept-encoding"] == b"gzip"
    assert wire.counts.total() == wire.shadow("skipped", "logprobs_refused") == 1
    # Nothing more is asked for until the next policy.
    assert not wire.send(CHAT, chat(stream=stream)).replayed
    assert wire.shadow("skipped", "logprobs_refused") == 2
    wire.interceptor.policy = policy(generation=2, shadow_top_k=5)
    assert wire.send(CHAT, chat(stream=stream)).body == plain.body
    assert wire.shadow("shadowed") == len(wire.captures) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_after_the_head_was_sent_is_passed_on_and_stops_sampling(
    wire: Wire, fake: FakeVllm, stream: bool
) -> None:
    fake.max_logprobs = 5
    wire.replays = False
    assert b"greater than max allowed" in wire.send(CHAT, chat(stream=stream)).body
    assert wire.shadow("skipped", "logprobs_refused") == 1
    assert b"greater than max allowed" not in wire.send(CHAT, chat(stream=stream)).body
    assert wire.shadow("skipped", "logprobs_refused") == 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_clients_invalid_request_does_not_stop_sampling(wire: Wire, stream: bool) -> None:
    wire.interceptor.policy = policy(scoring=False)
    plain = wire.send(CHAT, chat(stream=stream, temperature=-1))
    wire.interceptor.policy = policy()
    sampled = wire.send(CHAT, chat(stream=stream, temperature=-1))
    assert (sampled.status, sampled.body, sampled.replayed) == (400, plain.body, True)
    assert wire.counts.total() == wire.shadow("skipped", "upstream_error") == 1
    assert wire.send(CHAT, chat(stream=stream)).status == 200
    assert wire.shadow("shadowed") == 1


def begun(wire: Wire) -> ExchangeHook:
    exchange = wire.interceptor.begin("POST", CHAT.encode(), [], "r")
    assert exchange is not None
    assert not isinstance(exchange, Refusal)
    return exchange


EVENT_STREAM = [(b"Content-Type", b"text/event-stream")]
REFUSAL_EVENT = b'data: {"error": {"message": "no such xarg", "code": 400}}\n\ndata: [DONE]\n\n'


@pytest.mark.parametrize("status", [200, 400, 422])
@pytest.mark.parametrize("shadow_rate", [0.0, 1.0])
def test_a_request_whose_profile_is_refused_is_sent_again_without_it(shadow_rate: float, status: int) -> None:
    wire = Wire(httpx.Client())
    wire.interceptor.policy = policy(served=VERSION, control_fraction=0.0, shadow_rate=shadow_rate)
    exchange = begun(wire)
    assert exchange.request(json_splice.encode(chat(stream=True))) is not None
    assert exchange.arm == "treated"
    assert exchange.response_head(status, EVENT_STREAM if status == 200 else [])
    for at in range(0, len(REFUSAL_EVENT), 20):
        assert exchange.response_data(REFUSAL_EVENT[at : at + 20]) == b""
    assert exchange.replay()
    assert exchange.response_head(200, EVENT_STREAM)
    answer = b'data: {"choices":[{"index":0,"delta":{"content":"x"},"token_ids":[5]}]}\n\ndata: [DONE]\n\n'
    assert b"".join(exchange.response_data(answer[at : at + 7]) for at in range(0, len(answer), 7)) == answer
    assert exchange.response_end() == b""
    assert exchange.arm == "none", "its outcomes are not those of the profile"
    exchange.closed(complete=True)
    assert not wire.captures
    assert wire.calibration("none", "refused") == 1
    assert wire.shadow("skipped", "logprobs_refused") == shadow_rate
    assert wire.counts.total() == 1 + shadow_rate


@pytest.mark.parametrize(
    ("start", "code"),
    [
        (b"", None),
        (b"data: {", None),
        (b'data: {"error": {"code": 400}}\n', None),
        (b'data: {"error": {"code": 400}}\n\n', 400),
        (b'data: {"error": {"code": "x"}}\r\n\r\ndata: 1', 500),
        (b'data: {"error": "gone"}\n\n', 500),
        (b'data: {"error": \n\n', 500),
        (b'data: {"error": null, "choices": []}\n\n', 0),
        (b": keep-alive\n\n", 0),
        (b'data: {"choices": [{"text": "{\\"error\\": {}}"}]}\n\n', 0),
        (b"data: [DONE]\n\n", 0),
    ],
)
def test_leading_error_code(start: bytes, code: int | None) -> None:
    assert leading_error_code(start) == code


@pytest.mark.parametrize("first", [b": keep-alive\n\n", b'data: {"error": {"code": 500}}\n\n', b"x" * 70_000])
def test_a_response_that_is_not_a_refusal_is_not_held_back(first: bytes) -> None:
    wire = Wire(httpx.Client())
    exchange = begun(wire)
    exchange.request(json_splice.encode(chat(stream=True)))
    exchange.response_head(200, EVENT_STREAM)
    out = exchange.response_data(first)
    assert out == first or first.startswith(b"x")
    assert not exchange.replay()
    assert out + exchange.response_end() == first


def test_a_large_refusal_is_passed_on(wire: Wire) -> None:
    exchange = begun(wire)
    exchange.request(json_splice.encode(chat()))
    assert exchange.response_head(400, [])
    assert exchange.response_data(b"y" * 70_000) + exchange.response_data(b"z") == b"y" * 70_000 + b"z"
    assert not exchange.replay()
    exchange.response_end()
    exchange.closed(complete=True)
    assert wire.shadow("skipped", "upstream_error") == 1


def test_an_interrupted_replay_is_incomplete(wire: Wire) -> None:
    exchange = begun(wire)
    exchange.request(json_splice.encode(chat(stream=True)))
    exchange.response_head(200, EVENT_STREAM)
    exchange.response_data(REFUSAL_EVENT)
    assert exchange.replay()
    exchange.closed(complete=False)
    assert wire.counts.total() == wire.shadow("skipped", "incomplete") == 1
