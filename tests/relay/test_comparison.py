"""What a relay reports of an answer to a request in an arm of a comparison."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from msgspec.structs import replace
from tests.support.hooks import HookSequence, SpyHook
from tests.support.relay import Request, UpstreamConnection, answering, chat_json, post, relaying, reset
from tests.support.waiting import HANG_SECONDS, until

from hemostat.hooks import Comparison
from hemostat.ipc.messages import OutcomeReport
from hemostat.metrics.names import INTERNAL_ERRORS
from hemostat.openai.routes import Form
from hemostat.relay.answer_format import AnswerFormat
from hemostat.relay.outcomes import OutcomeObserver

PERSON = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
FIND = {"type": "function", "function": {"name": "find", "parameters": PERSON}}
COMPARISON = Comparison(
    "chat json greedy", "v", True, b"c" * 16, b"k" * 8, json_in_words=True, streamed=False, drawn=0.25
)


def stream(*deltas: dict[str, Any], reason: str = "stop") -> bytes:
    said = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    said.append({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
    return b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in said) + b"data: [DONE]\n\n"


def bad(answer: bytes, *, streamed: bool = False, in_words: bool = False, **request: Any) -> dict[str, bool] | None:
    body = json.dumps({"messages": [], **request}).encode()
    observer = OutcomeObserver(Form.CHAT)
    observer.feed_request(body)
    observer.compare(body, json_in_words=in_words)
    observer.begin_response(stream=streamed)
    observer.feed_response(answer)
    return observer.finish("treated", lambda *_: None).bad


GOOD = {"loop": False, "cut": False, "empty": False, "given_up": False, "broken_off": False}


def test_what_is_judged_of_any_answer() -> None:
    assert bad(chat_json("Paris.")) == GOOD
    assert bad(chat_json("Paris and", "length")) == GOOD | {"cut": True}
    assert bad(chat_json("So. " + "and then again " * 12)) == GOOD | {"loop": True}
    assert bad(chat_json(" \n")) == GOOD | {"empty": True}
    assert bad(chat_json(None)) == GOOD | {"empty": True}


def test_what_is_judged_of_a_stream() -> None:
    assert bad(stream({"content": "Paris"}, {"content": "."}), streamed=True) == GOOD
    assert bad(stream({"content": "\n"}), streamed=True) == GOOD | {"empty": True}
    assert bad(stream({"role": "assistant", "content": ""}, reason="length"), streamed=True) == GOOD | {
        "cut": True,
        "empty": True,
    }
    call = {"tool_calls": [{"index": 0, "function": {"name": "find", "arguments": "{}"}}]}
    assert bad(stream(call), streamed=True) == GOOD


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("text", "request_", "expected"),
    [
        ('Here: {"age": 3}', {"in_words": True}, False),
        ("It is 3.", {"in_words": True}, True),
        ('{"age": 3}', {"guided_json": PERSON}, False),
        ('{"age": "3"}', {"guided_json": PERSON}, True),
        ("", {"in_words": True}, True),
    ],
)
def test_json(streamed: bool, text: str, request_: dict[str, Any], expected: bool) -> None:
    answer = stream({"content": text[:3]}, {"content": text[3:]}) if streamed else chat_json(text)
    result = bad(answer, streamed=streamed, **request_)
    assert result is not None
    assert result["json"] is expected


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [("find", '{"age": 3}', False), ("find", '{"age": "3"}', True), ("lose", '{"age": 3}', True), ("find", "{", True)],
)
def test_tool_calls(streamed: bool, name: str, arguments: str, expected: bool) -> None:
    first = {"index": 0, "function": {"name": name, "arguments": arguments[:4]}}
    rest = {"index": 0, "function": {"arguments": arguments[4:]}}
    if streamed:
        answer = stream({"tool_calls": [first]}, {"tool_calls": [rest]}, reason="tool_calls")
    else:
        first["function"]["arguments"] = arguments  # type: ignore[index]
        answer = chat_json(None, "tool_calls", tool_calls=[first])
    assert bad(answer, streamed=streamed, tools=[FIND]) == GOOD | {"tool_call": expected}


def test_an_answer_without_a_call_is_a_good_one_of_a_request_with_tools() -> None:
    assert bad(chat_json("Paris."), tools=[FIND]) == GOOD | {"tool_call": False}


def test_an_answer_that_is_too_long_to_be_parsed() -> None:
    pieces = [{"content": f"word{n} "} for n in range(6000)]
    result = bad(stream(*pieces, reason="length"), streamed=True, in_words=True)
    assert result == GOOD | {"cut": True, "json": True}
    assert bad(stream(*pieces), streamed=True, in_words=True) == GOOD, "it may be JSON"


def test_nothing_is_judged_without_a_comparison() -> None:
    observer = OutcomeObserver(Form.CHAT)
    observer.feed_response(chat_json("Paris."))
    assert observer.finish("none", lambda *_: None).bad is None


def answer(body: bytes, status: bytes = b"200 OK") -> bytes:
    return b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body)


async def relayed(hook: SpyHook, reply: bytes) -> tuple[list[OutcomeReport], dict[Any, Any], bytes]:
    """The reports, the counters and what the client got."""
    reports: list[OutcomeReport] = []

    def take(report: OutcomeReport) -> bool:
        reports.append(report)
        return True

    seen: list[Request] = []
    async with relaying(answering(seen, reply), hook=HookSequence([hook]), report_outcome=take) as (relay, _, connect):
        client = await connect()
        await client.send(post(b'{"messages": []}', path=b"/v1/chat/completions"))
        got = (await client.response("POST")).body
        return reports, relay.counters.other, got


async def test_a_report_through_the_relay() -> None:
    body = chat_json('{"age": 3}')
    reports, _, got = await relayed(SpyHook(arm="treated", comparison=COMPARISON), answer(body))
    assert got == body
    assert reports == [
        OutcomeReport(
            "chat json greedy", "v", True, b"c" * 16, b"k" * 8, GOOD | {"json": False}, output_tokens=7, drawn=0.25
        )
    ]


async def test_an_error_is_no_outcome() -> None:
    hook = SpyHook(arm="treated", comparison=COMPARISON)
    reports, _, _ = await relayed(hook, answer(b"{}", b"500 Internal Server Error"))
    assert reports == []


def head(content_type: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nTransfer-Encoding: chunked\r\n\r\n" % content_type


def in_chunks(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)


STREAMED = replace(COMPARISON, streamed=True)
FIRST_TOKEN = head(b"text/event-stream") + in_chunks(stream({"content": "So "}).split(b"\n\n")[0] + b"\n\n")
WHOLE_ANSWER = head(b"text/event-stream") + in_chunks(stream({"content": "So."}))
LOOPING = stream(*[{"content": "and then again "}] * 12).split(b'data: {"choices": [{"index": 0, "delta": {}')[0]


async def ended_early(
    comparison: Comparison | None, start: bytes, *, by_engine: bool = False, status: int | None = None
) -> list[OutcomeReport]:
    """The reports of a request whose client closes the connection, or whose engine does, after `start` of the answer.
    status: what the relay answers then."""
    reports: list[OutcomeReport] = []

    def take(report: OutcomeReport) -> bool:
        reports.append(report)
        return True

    asked, ended = asyncio.Event(), asyncio.Event()

    async def script(connection: UpstreamConnection) -> None:
        await connection.request()
        if start:
            await connection.send(start)
        asked.set()
        if not by_engine:
            await connection.reader.read()
        ended.set()

    hook = HookSequence([SpyHook(arm="treated", comparison=comparison)])
    async with relaying(script, hook=hook, report_outcome=take) as (relay, _, connect):
        client = await connect()
        await client.send(post(b'{"messages": []}', path=b"/v1/chat/completions"))
        await asyncio.wait_for(asked.wait(), HANG_SECONDS)
        if by_engine:
            await asyncio.wait_for(client.reader.read(), HANG_SECONDS)
        elif start:
            await asyncio.wait_for(client.reader.readuntil(start[-20:]), HANG_SECONDS)
        reset(client.writer)
        await asyncio.wait_for(ended.wait(), HANG_SECONDS)
        await until(lambda: not relay.clients)
    return reports


EARLY = GOOD | {"given_up": True}


@pytest.mark.parametrize(
    ("comparison", "start", "expected", "tokens"),
    [
        (STREAMED, FIRST_TOKEN, EARLY, 1),
        (STREAMED, head(b"text/event-stream") + in_chunks(LOOPING), EARLY | {"loop": True}, 12),
        (COMPARISON, b"", EARLY, None),
    ],
    ids=["after the first token", "in a loop", "no stream: nothing is seen before the answer is complete"],
)
async def test_an_answer_that_the_client_gives_up(
    comparison: Comparison, start: bytes, expected: dict[str, bool], tokens: int | None
) -> None:
    (report,) = await ended_early(comparison, start)
    assert report.bad == expected | {"json": False}
    assert (report.treated, report.output_tokens) == (True, tokens)


async def test_a_stream_that_is_given_up_before_its_first_token_is_no_outcome() -> None:
    assert await ended_early(STREAMED, b"") == []
    assert await ended_early(STREAMED, head(b"text/event-stream") + in_chunks(b": wait\n\n")) == []


async def test_an_answer_whose_last_event_was_sent_is_complete() -> None:
    """A client may close its connection as soon as it has read it."""
    (report,) = await ended_early(STREAMED, WHOLE_ANSWER)
    assert report.bad == GOOD | {"json": True}


async def test_an_answer_that_the_engine_breaks_off() -> None:
    (report,) = await ended_early(STREAMED, FIRST_TOKEN, by_engine=True)
    assert report.bad == GOOD | {"broken_off": True, "json": False}


async def test_a_stream_without_a_finish_reason_broke_off() -> None:
    """vLLM reports an error in the midst of a stream as an event, and ends the stream."""
    said, _, _ = stream({"content": "So "}).partition(b"\n\n")
    assert bad(said + b'\n\ndata: {"error": {}}\n\ndata: [DONE]\n\n', streamed=True) == GOOD | {"broken_off": True}


async def test_nothing_that_ends_early_is_reported_without_a_comparison() -> None:
    assert await ended_early(None, FIRST_TOKEN) == []


async def test_no_report_without_a_comparison() -> None:
    reports, _, _ = await relayed(SpyHook(), answer(chat_json("Paris.")))
    assert reports == []


async def test_an_error_in_the_evaluation_does_not_reach_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **more: Any) -> None:
        raise RuntimeError

    monkeypatch.setattr(AnswerFormat, "read", fail)
    body = chat_json("Paris.")
    reports, counted, got = await relayed(SpyHook(arm="treated", comparison=COMPARISON), answer(body))
    assert (reports, got) == ([], body)
    assert counted[INTERNAL_ERRORS] == {("outcome",): 1}
