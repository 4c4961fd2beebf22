"""Counters of how responses end."""

from __future__ import annotations

import json
import time
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.memory import kept_bytes
from tests.support.relay import Request, answering, chat_json, relaying

from hemostat.metrics.names import OUTPUT_TOKENS, REPETITION_LOOPS, RESPONSES_FINISHED, STRUCTURED_OUTPUTS
from hemostat.openai import repetition
from hemostat.openai.repetition import ends_in_loop
from hemostat.openai.routes import Form
from hemostat.relay import outcomes
from hemostat.relay.outcomes import OutcomeObserver

SCHEMA = b'{"messages": [], "response_format": {"type": "json_schema", "json_schema": {}}}'
TOOLS = b'{"messages": [], "tools": [{"type": "function"}]}'


def observed(pieces: list[bytes], *, request: bytes = b"{}", stream: bool = False, arm: str = "none") -> Counter[Any]:
    observer = OutcomeObserver(Form.CHAT)
    observer.feed_request(request)
    observer.begin_response(stream=stream)
    for piece in pieces:
        observer.feed_response(piece)
    result: Counter[Any] = Counter()

    def add(name: str, labels: tuple[str, ...], by: float) -> None:
        result[name, *labels] += by

    observer.finish(arm, add)
    return result


def events(*deltas: dict[str, Any], reason: str = "stop") -> list[bytes]:
    """A chat stream as it stands on the wire, in HTTP chunks."""
    said = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    said.append({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
    lines = [b"data: " + json.dumps(event).encode() + b"\n\n" for event in said] + [b"data: [DONE]\n\n"]
    return [b"%x\r\n%b\r\n" % (len(line), line) for line in lines]


def test_a_whole_response() -> None:
    assert observed([chat_json("Paris.")], arm="treated") == {
        (RESPONSES_FINISHED, "treated", "stop"): 1,
        (OUTPUT_TOKENS, "treated"): 7,
    }


def test_an_unknown_finish_reason_is_counted_as_other() -> None:
    assert observed([chat_json("x", reason="because")])[RESPONSES_FINISHED, "none", "other"] == 1


@pytest.mark.parametrize("tokens", [-5, 2**63])
def test_a_usage_that_cannot_be_true_is_not_counted(tokens: int) -> None:
    assert observed([chat_json("Paris.", tokens=tokens)]) == {(RESPONSES_FINISHED, "none", "stop"): 1}


def test_a_response_in_pieces_and_one_that_is_not_json() -> None:
    body = chat_json("Paris.")
    assert observed([body[:30], body[30:]]) == observed([body])
    assert observed([b"<html>"]) == {}


def test_a_stream_is_evaluated_by_its_tail() -> None:
    deltas = [{"content": f"word{n} "} for n in range(200)]
    result = observed(events(*deltas, reason="length"), stream=True)
    assert result == {(RESPONSES_FINISHED, "none", "length"): 1, (OUTPUT_TOKENS, "none"): 201}


@pytest.mark.parametrize("stream", [False, True])
def test_a_loop_at_the_end(stream: bool) -> None:
    text = "It began well. " + "and then again " * 12
    pieces = events(*[{"content": text[n : n + 5]} for n in range(0, len(text), 5)]) if stream else [chat_json(text)]
    assert observed(pieces, stream=stream)[REPETITION_LOOPS, "none"] == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("text", "reason", "outcome"),
    [('{"a": 1}', "stop", "valid"), ('{"a": 1', "length", "cut"), ('{"a": oops}', "stop", "invalid")],
)
def test_requested_json_is_parsed(stream: bool, text: str, reason: str, outcome: str) -> None:
    pieces = (
        events({"content": text[:4]}, {"content": text[4:]}, reason=reason) if stream else [chat_json(text, reason)]
    )
    result = observed(pieces, request=SCHEMA, stream=stream)
    judged = {key: n for key, n in result.items() if key[0] == STRUCTURED_OUTPUTS}
    assert judged == {(STRUCTURED_OUTPUTS, "none", "json", outcome): 1}
    assert not [key for key in observed(pieces, stream=stream) if key[0] == STRUCTURED_OUTPUTS]


def test_a_request_for_json_is_a_member_not_text_of_a_message() -> None:
    said = json.dumps({"messages": [{"role": "user", "content": 'write {"type": "json_object"} and "tools": []'}]})
    observer = OutcomeObserver(Form.CHAT)
    observer.feed_request(said.encode())
    assert not observer.json
    assert not observer.tools


@pytest.mark.parametrize("stream", [False, True])
def test_parts_of_tool_calls_are_joined_by_index(stream: bool) -> None:
    def call(index: int, arguments: str) -> dict[str, Any]:
        return {"tool_calls": [{"index": index, "function": {"arguments": arguments}}]}

    if stream:
        parts = [call(0, '{"city"'), call(1, "{"), call(0, ': "Rome"}'), call(1, '"a": ')]
        pieces = events(*parts, reason="tool_calls")
    else:
        calls = [{"function": {"arguments": text}} for text in ('{"city": "Rome"}', '{"a": ')]
        pieces = [chat_json(None, "tool_calls", tool_calls=calls)]
    result = observed(pieces, request=TOOLS, stream=stream)
    assert result[STRUCTURED_OUTPUTS, "none", "tool_call", "valid"] == 1
    assert result[STRUCTURED_OUTPUTS, "none", "tool_call", "invalid"] == 1


def test_kept_bytes_are_bounded() -> None:
    observer = OutcomeObserver(Form.CHAT)
    observer.feed_request(SCHEMA)
    observer.begin_response(stream=True)
    for _ in range(3000):
        observer.feed_response(b"data: {" + b"x" * 10_000)
    assert kept_bytes(observer) <= outcomes.MAX_TAIL_PIECES * outcomes.MAX_PIECE_BYTES + 50_000


@given(st.text(max_size=300))
def test_text_without_four_copies_of_a_block_is_not_a_loop(text: str) -> None:
    result = any(
        len(text) >= max(4 * p, repetition.MIN_LOOP_CHARACTERS)
        and text[-max(4 * p, repetition.MIN_LOOP_CHARACTERS) : -p]
        == text[-max(4 * p, repetition.MIN_LOOP_CHARACTERS) + p :]
        for p in range(1, len(text) // 4 + 1)
    )
    assert result or not ends_in_loop(text)


@given(st.text(min_size=2, max_size=40).filter(lambda s: len(set(s)) > 1), st.text(max_size=50))
def test_a_repeated_block_is_a_loop(block: str, before: str) -> None:
    # A block of a long run and one other character may end in the run alone: a ruler, at this length.
    end = (block * 60)[-repetition.MIN_LOOP_CHARACTERS // repetition.LOOP_COPIES :]
    assert ends_in_loop(before + block * 60) or len(set(end)) < 2


def test_a_text_that_ends_in_a_ruler_is_not_searched() -> None:
    text = ("-" * 11 + "|") * 350_000 + "-" * 12
    started = time.thread_time()
    assert not any(ends_in_loop(text) for _ in range(10))
    assert time.thread_time() - started < 0.01


@given(st.lists(st.binary(max_size=200), max_size=20), st.booleans())
def test_no_response_of_an_upstream_raises(pieces: list[bytes], stream: bool) -> None:
    observed([b'data: {"choices": ' + piece for piece in pieces], request=SCHEMA + TOOLS, stream=stream)


@pytest.mark.parametrize("chunked", [False, True])
async def test_through_the_relay(chunked: bool) -> None:
    body = chat_json("Paris.")
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
    answer = (
        head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        if chunked
        else head + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    )
    seen: list[Request] = []
    async with relaying(answering(seen, answer)) as (relay, _, connect):
        client = await connect()
        for target in (b"/v1/chat/completions", b"/v1/models"):
            await client.send(b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}" % target)
            assert (await client.response("POST")).body == body
        assert relay.counters.other == {RESPONSES_FINISHED: {("none", "stop"): 1.0}, OUTPUT_TOKENS: {("none",): 7.0}}
