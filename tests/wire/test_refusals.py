"""Refusals by the engine: sampling and profiles cause no error for a client."""

from __future__ import annotations

import gzip
import random
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from tests.support.fake_vllm import FakeVllm
from tests.support.wire import (
    VERSION,
    Wire,
    chat,
    content_fields,
    policy,
)

from hemostat.hooks import ExchangeHook, Refusal
from hemostat.interception.refusals import MIN_REFUSALS, PAUSE_SECONDS, VAIN_REPEAT_PAUSE_SECONDS
from hemostat.openai import json_splice
from hemostat.openai.errors import LeadingError
from hemostat.openai.routes import CHAT
from hemostat.scoring.capture_arrays import UnreadableLogprobsError, decode_capture


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
    assert wire.shadow("skipped", "request_refused") + wire.shadow("skipped", "invalid") == 1


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
    assert wire.shadow("skipped", "logprobs_refused") == wire.repeated("refused") == 1
    assert wire.counts.total() == 2
    for _ in range(MIN_REFUSALS - 1):
        assert wire.send(CHAT, chat(stream=stream)).replayed
    # Nothing more is asked for, for a while.
    assert not wire.send(CHAT, chat(stream=stream)).replayed
    assert wire.shadow("skipped", "logprobs_refused") == MIN_REFUSALS + 1
    wire.interceptor.policy = policy(generation=2, shadow_top_k=5)
    assert wire.send(CHAT, chat(stream=stream)).body == plain.body
    assert wire.shadow("shadowed") == len(wire.captures) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_sampling_pauses_only_after_several_refusals_in_a_row_and_comes_back(
    wire: Wire, fake: FakeVllm, stream: bool
) -> None:
    def ask(limit: int) -> bool:
        """Whether it was sampled, and refused."""
        fake.max_logprobs = limit
        return wire.send(CHAT, chat(stream=stream)).replayed

    assert [ask(limit) for limit in (5, 64, 5, 5, 64, 5, 5)] == [True, False, True, True, False, True, True]
    assert wire.shadow("shadowed") == 2, "a stray refusal changes nothing"
    assert ask(5)
    assert not ask(5)
    wire.now += PAUSE_SECONDS[0]
    assert ask(5)
    assert not ask(64)
    assert wire.shadow("shadowed") == 2
    wire.now += PAUSE_SECONDS[0]
    assert not ask(64)
    assert wire.shadow("shadowed") == 2, "the second pause is longer"
    wire.now += PAUSE_SECONDS[0]
    assert not ask(64)
    assert wire.shadow("shadowed") == 3
    assert ask(5), "an answer ends the doubt"


@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_after_the_head_was_sent_is_passed_on(wire: Wire, fake: FakeVllm, stream: bool) -> None:
    fake.max_logprobs = 5
    wire.replays = False
    for _ in range(MIN_REFUSALS):
        assert b"greater than max allowed" in wire.send(CHAT, chat(stream=stream)).body
    assert b"greater than max allowed" not in wire.send(CHAT, chat(stream=stream)).body
    assert wire.shadow("skipped", "logprobs_refused") == MIN_REFUSALS + 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_clients_invalid_request_does_not_stop_sampling(wire: Wire, stream: bool) -> None:
    wire.interceptor.policy = policy(scoring=False)
    plain = wire.send(CHAT, chat(stream=stream, temperature=-1))
    wire.interceptor.policy = policy()
    sampled = wire.send(CHAT, chat(stream=stream, temperature=-1))
    assert (sampled.status, sampled.body, sampled.replayed) == (400, plain.body, True)
    assert wire.counts.total() == 2
    assert wire.shadow("skipped", "request_refused") == wire.repeated("refused") == 1
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
    assert exchange.response_head(status, *content_fields(EVENT_STREAM if status == 200 else []))
    for at in range(0, len(REFUSAL_EVENT), 20):
        assert exchange.response_data(REFUSAL_EVENT[at : at + 20]) == b""
    assert exchange.replay()
    assert exchange.response_head(200, *content_fields(EVENT_STREAM))
    answer = b'data: {"choices":[{"index":0,"delta":{"content":"x"},"token_ids":[5]}]}\n\ndata: [DONE]\n\n'
    assert b"".join(exchange.response_data(answer[at : at + 7]) for at in range(0, len(answer), 7)) == answer
    assert exchange.response_end() == b""
    assert exchange.arm == "none", "its outcomes are not those of the profile"
    exchange.closed(complete=True)
    assert not wire.captures
    assert wire.calibration("none", "refused") == 1
    assert wire.shadow("skipped", "logprobs_refused") == shadow_rate
    assert wire.counts.total() == 2 + shadow_rate


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
    assert LeadingError().feed(start) == code
    error = LeadingError()
    codes = [error.feed(start[at : at + 1]) for at in range(len(start))]
    assert next((found for found in codes if found is not None), None) == code


@pytest.mark.parametrize("first", [b": keep-alive\n\n", b'data: {"error": {"code": 503}}\n\n', b"x" * 70_000])
def test_a_response_that_is_not_a_refusal_is_not_held_back(first: bytes) -> None:
    wire = Wire(httpx.Client())
    exchange = begun(wire)
    exchange.request(json_splice.encode(chat(stream=True)))
    exchange.response_head(200, *content_fields(EVENT_STREAM))
    out = exchange.response_data(first)
    assert out == first or first.startswith(b"x")
    assert not exchange.replay()
    assert out + exchange.response_end() == first


def test_a_large_refusal_is_passed_on(wire: Wire) -> None:
    exchange = begun(wire)
    exchange.request(json_splice.encode(chat()))
    assert exchange.response_head(400, *content_fields([]))
    assert exchange.response_data(b"y" * 70_000) + exchange.response_data(b"z") == b"y" * 70_000 + b"z"
    assert not exchange.replay()
    exchange.response_end()
    exchange.closed(complete=True)
    assert wire.shadow("skipped", "upstream_error") == 1


def test_an_interrupted_replay_is_incomplete(wire: Wire) -> None:
    exchange = begun(wire)
    exchange.request(json_splice.encode(chat(stream=True)))
    exchange.response_head(200, *content_fields(EVENT_STREAM))
    exchange.response_data(REFUSAL_EVENT)
    assert exchange.replay()
    exchange.closed(complete=False)
    assert wire.counts.total() == 2
    assert wire.shadow("skipped", "incomplete") == wire.repeated("refused") == 1


# --- errors and answers that what was added has caused ---------------------------------------------------------------


@dataclass
class Scripted:
    """Answers what was added to by `injected`, and every other request by `own`: status, fields, body."""

    injected: tuple[int, list[tuple[bytes, bytes]], bytes]
    own: tuple[int, list[tuple[bytes, bytes]], bytes]
    asked: list[bool] = field(default_factory=list)
    """Of each request, whether it had been added to."""

    def answer(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(b"return_token_ids" in request.read())
        status, fields, body = self.injected if self.asked[-1] else self.own
        # As a stream, httpx does not decode it.
        return httpx.Response(status, headers=fields, stream=httpx.ByteStream(body))


JSON = [(b"content-type", b"application/json")]
OWN = (200, JSON, b'{"choices":[{"index":0,"message":{"content":"own"},"finish_reason":"stop"}]}')


def scripted(injected: tuple[int, list[tuple[bytes, bytes]], bytes], own: Any = OWN) -> tuple[Wire, Scripted]:
    upstream = Scripted(injected, own)
    return Wire(httpx.Client(transport=httpx.MockTransport(upstream.answer), base_url="http://upstream")), upstream


@pytest.mark.parametrize(("status", "reason"), [(500, "server_error"), (413, "too_large")])
def test_an_error_that_what_was_added_causes_does_not_reach_the_client(status: int, reason: str) -> None:
    wire, upstream = scripted((status, JSON, b'{"error":{"code":500}}'))
    answer = wire.send(CHAT, chat())
    assert (answer.status, answer.body, upstream.asked) == (200, OWN[2], [True, False])
    assert wire.repeated(reason) == wire.shadow("skipped", "logprobs_refused") == 1


@pytest.mark.parametrize("status", [500, 413])
def test_nothing_that_could_fail_is_added_where_the_plugin_reports_the_tokens(status: int) -> None:
    wire, upstream = scripted((status, JSON, b'{"error":{"code":500}}'))
    wire.interceptor.policy = policy(tap=True, tap_tokens=True, prefer_plugin=True)
    assert (wire.send(CHAT, chat()).body, upstream.asked) == (OWN[2], [False])
    assert wire.shadow("shadowed") == wire.counts.total() == 1


@pytest.mark.parametrize("body", [b'data: {"error": {"code": 500}}\n\n', b'data: {"error": "gone"}\n\n'])
def test_a_stream_that_begins_with_a_server_error_is_asked_for_again(body: bytes) -> None:
    own = b'data: {"choices":[{"index":0,"delta":{"content":"x"}}]}\n\n'
    wire, upstream = scripted((200, EVENT_STREAM, body), (200, EVENT_STREAM, own))
    answer = wire.send(CHAT, chat(stream=True))
    assert (answer.status, answer.body, upstream.asked) == (200, own, [True, False])


def sampled_stream(*logprobs: str, error: bool = False) -> bytes:
    """A chat's stream of one token per value (JSON of its log-probability), as vLLM 0.32 writes it."""
    begin = '{"id":"c","object":"chat.completion.chunk","created":1,"model":"m","choices":['
    events = [begin + '{"index":0,"delta":{"role":"assistant","content":""}}],"prompt_token_ids":[1]}']
    for position, value in enumerate(logprobs):
        entry = f'{{"token":"token_id:{position}","logprob":{value},"bytes":[116]'
        events.append(
            f'{begin}{{"index":0,"delta":{{"content":"t{position}"}},"logprobs":{{"content":[{entry},"top_logprobs":['
            f'{entry}}}]}}]}},"finish_reason":null,"token_ids":[{position}]}}]}}'
        )
    if error:
        events.append('{"error":{"message":"Internal server error","type":"InternalServerError","code":500}}')
    else:
        events.append(begin + '{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop","token_ids":[]}]}')
        usage = f'"usage":{{"prompt_tokens":1,"total_tokens":9,"completion_tokens":{len(logprobs)}}}}}'
        events.append(begin + "]," + usage)
    return "".join(f"data: {event}\n\n" for event in [*events, "[DONE]"]).encode()


def test_nan_within_a_stream_is_the_end_of_its_capture_and_not_of_the_stream() -> None:
    """vLLM writes NaN as null there (`tests/wire/test_real_vllm.py`), where a whole response of it is an error."""
    wire, upstream = scripted((200, EVENT_STREAM, sampled_stream("-0.5", "null", "-0.25")))
    answer = wire.send(CHAT, chat(stream=True))
    assert (answer.status, upstream.asked) == (200, [True])
    assert [text in answer.body for text in (b'"t0"', b'"t1"', b'"t2"', b"[DONE]")] == [True] * 4
    assert b"token_id:" not in answer.body
    (capture,) = wire.captures
    with pytest.raises(UnreadableLogprobsError):
        decode_capture(capture)


def test_sampling_pauses_after_several_answers_that_end_in_an_error() -> None:
    """An answer that has begun cannot be sent again, so what was added harms this often at most."""
    wire, upstream = scripted((200, EVENT_STREAM, sampled_stream("-0.5", error=True)))
    for _ in range(MIN_REFUSALS + 1):
        wire.send(CHAT, chat(stream=True))
    assert upstream.asked == [True] * MIN_REFUSALS + [False]
    assert wire.shadow("skipped", "upstream_error") == MIN_REFUSALS
    assert wire.shadow("skipped", "logprobs_refused") == 1
    upstream.injected = (200, EVENT_STREAM, sampled_stream("-0.5"))
    wire.now += PAUSE_SECONDS[0]
    wire.send(CHAT, chat(stream=True))
    assert len(wire.captures) == 1, "then it is tried again"


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_an_upstream_that_is_overloaded_is_not_asked_again(status: int) -> None:
    wire, upstream = scripted((status, JSON, b"busy"))
    assert (wire.send(CHAT, chat()).status, upstream.asked) == (status, [True])
    assert wire.shadow("skipped", "upstream_error") == 1


def test_a_server_that_is_broken_is_not_asked_everything_twice() -> None:
    broken = (500, JSON, b'{"error":{"code":500}}')
    wire, upstream = scripted(broken, broken)
    assert [wire.send(CHAT, chat()).status for _ in range(3)] == [500] * 3
    assert upstream.asked == [True, False, True, True]
    wire.now += VAIN_REPEAT_PAUSE_SECONDS
    upstream.own = OWN
    assert wire.send(CHAT, chat()).status == 200
    assert wire.shadow("skipped", "upstream_error") == 3


def test_an_answer_of_a_route_that_keeps_state_is_not_generated_twice() -> None:
    wire, upstream = scripted((500, JSON, b"{}"), (500, JSON, b"{}"))
    wire.interceptor.policy = policy(tap=True, tap_tokens=True)
    assert wire.send("/v1/responses", {"model": "fake", "input": "x"}).status == 500
    assert len(upstream.asked) == 1


SAMPLED = (
    b'{"id":"c","model":"m","choices":[{"index":0,"message":{"role":"assistant","content":"x"},"logprobs":{"content":['
    b'{"token":"token_id:5","logprob":-0.5,"bytes":[120],"top_logprobs":[{"token":"token_id:5","logprob":-0.5,"bytes":'
    b'[53]}]}]},"finish_reason":"stop","token_ids":[5]}],"usage":{"prompt_tokens":1,"completion_tokens":1},'
    b'"prompt_token_ids":[7]}'
)
PLAIN = re.sub(
    rb'"logprobs":.*?,"finish|"(?:prompt_)?token_ids":\[.\]',
    lambda m: b'"logprobs":null,"finish' if m[0].startswith(b'"logprobs') else m[0].partition(b":")[0] + b":null",
    SAMPLED,
)


@pytest.mark.parametrize(
    "packed",
    [gzip.compress(SAMPLED), gzip.compress(SAMPLED[:99]) + gzip.compress(SAMPLED[99:]), gzip.compress(SAMPLED) + b"\0"],
    ids=["one member", "two members", "padded"],
)
@pytest.mark.parametrize("size", [1, 10_000])
def test_an_answer_that_is_compressed_unasked_is_stripped_inside(packed: bytes, size: int) -> None:
    fields = [*JSON, (b"content-encoding", b"gzip")]
    wire = Wire(httpx.Client())
    exchange = begun(wire)
    exchange.request(json_splice.encode(chat()))
    assert exchange.response_head(200, *content_fields(fields))
    out = b"".join(exchange.response_data(packed[at : at + size]) for at in range(0, len(packed), size))
    out += exchange.response_end()
    assert gzip.decompress(out) == PLAIN
    exchange.closed(complete=True)
    assert wire.shadow("shadowed") == len(wire.captures) == 1


def test_each_event_of_a_compressed_stream_goes_out_at_once() -> None:
    wire = Wire(httpx.Client())
    exchange = begun(wire)
    exchange.request(json_splice.encode(chat(stream=True)))
    exchange.response_head(200, *content_fields([*EVENT_STREAM, (b"Content-Encoding", b"gzip")]))
    packer, unpacker = zlib.compressobj(wbits=31), zlib.decompressobj(31)
    for text in (b"data: one\n\n", b": two\n\n"):
        data = packer.compress(text) + packer.flush(zlib.Z_SYNC_FLUSH)
        assert unpacker.decompress(exchange.response_data(data)) == text
    assert unpacker.decompress(exchange.response_data(packer.flush()) + exchange.response_end()) == b""
    assert unpacker.eof


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: data[:20] + b"x" + data[21:]])
def test_what_is_left_of_a_damaged_compressed_answer_holds_nothing_injected(damage: Callable[[bytes], bytes]) -> None:
    wire, _ = scripted((200, [*JSON, (b"content-encoding", b"gzip")], damage(gzip.compress(SAMPLED))))
    answer = wire.send(CHAT, chat())
    assert b"token_id" not in zlib.decompressobj(31).decompress(answer.body).replace(b'token_ids":null', b"")
    assert wire.shadow("skipped", "encoded") + wire.shadow("skipped", "unreadable") == 1


@pytest.mark.parametrize("coding", [b"br", b"deflate"])
def test_an_answer_in_a_coding_that_cannot_be_read_is_replaced(coding: bytes) -> None:
    wire, upstream = scripted((200, [*JSON, (b"content-encoding", coding)], b"\x8b\x02\x80"))
    exchange = begun(wire)
    exchange.request(json_splice.encode(chat()))
    assert exchange.response_head(200, *content_fields([*JSON, (b"content-encoding", coding)]))
    assert exchange.withholds
    exchange.closed(complete=False)
    for _ in range(MIN_REFUSALS):
        answer = wire.send(CHAT, chat())
        assert (answer.status, answer.body) == (200, OWN[2])
    assert wire.repeated("encoded") == MIN_REFUSALS
    upstream.asked.clear()
    wire.send(CHAT, chat())
    assert upstream.asked == [False], "it is not asked for what cannot be read"


def test_an_answer_of_another_type_loses_what_was_injected() -> None:
    wire, _ = scripted((200, [(b"content-type", b"text/plain")], SAMPLED))
    assert wire.send(CHAT, chat()).body == PLAIN
    assert wire.shadow("skipped", "unreadable") == 1
