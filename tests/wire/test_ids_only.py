"""Responses that are asked for the ids of their tokens, and nothing else: byte for byte what the client asked for."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from tests.support.fake_vllm import FakeVllm, serving
from tests.support.wire import TOOLS, Wire, policy, user

from hemostat.openai import json_splice
from hemostat.openai.routes import CHAT, COMPLETIONS, MESSAGES, RESPONSES, Form

FORMS = frozenset({Form.CHAT, Form.COMPLETIONS, Form.RESPONSES})
SCORED_AGAIN = policy(scored_again=FORMS)
IDS = {"return_token_ids": True}
MESSAGES_WITH_IDS = {"enable_response_messages": True}
CALL = 'say: Let me see. <tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
FLAT = [{"type": "function", **TOOLS[0]["function"]}]
LONG = {"max_tokens": 150}
CHOICES = {"n": 2, "temperature": 1.0, "seed": 3}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, {"logprobs": True, "top_logprobs": 3}),
    "chat, ids by name": (CHAT, {"logprobs": True, "top_logprobs": 3, "return_tokens_as_token_ids": True}),
    "chat, own ids": (CHAT, {"logprobs": True, "top_logprobs": 3, "return_token_ids": True}),
    "chat, choices": (CHAT, {"logprobs": True, "top_logprobs": 2} | CHOICES),
    "chat, a tool call": (CHAT, {"logprobs": True, "top_logprobs": 2, "tools": TOOLS, "messages": [user(CALL)]} | LONG),
    "completions": (COMPLETIONS, {"logprobs": 3}),
    "completions, texts": (COMPLETIONS, {"logprobs": 0}),
    "completions, choices": (COMPLETIONS, {"logprobs": 2} | CHOICES),
    "completions, prompts": (COMPLETIONS, {"logprobs": 2, "prompt": ["Hi", "say: Grüße 🎉"]}),
    "responses": (RESPONSES, {}),
    "responses, unicode": (RESPONSES, {"input": "say: Zażółć 日本語 🎉 ☃!", "max_output_tokens": 60}),
    "responses, own ids": (RESPONSES, MESSAGES_WITH_IDS),
    "responses, their words": (RESPONSES, {"input": 'say: {"output_messages": [1], "input_messages": [2]}'}),
    "responses, a tool call": (RESPONSES, {"input": CALL, "tools": FLAT, "max_output_tokens": 150}),
    "responses, own logprobs": (RESPONSES, {"include": ["message.output_text.logprobs"], "top_logprobs": 2}),
}


@pytest.fixture
def fake() -> FakeVllm:
    return FakeVllm(seed=5)


@pytest.fixture
def wire(fake: FakeVllm) -> Iterator[Wire]:
    with serving(fake) as url, httpx.Client(base_url=url, timeout=20) as client:
        yield Wire(client)


def ask(path: str, **more: Any) -> dict[str, Any]:
    given = {CHAT: {"messages": [user("Hello")]}, COMPLETIONS: {"prompt": "Hello"}, RESPONSES: {"input": "Hello"}}
    limit = "max_output_tokens" if path == RESPONSES else "max_tokens"
    return {"model": "fake", limit: 40, "temperature": 0} | given[path] | more


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_response_is_the_same_and_its_ids_are_captured(wire: Wire, fake: FakeVllm, case: str, stream: bool) -> None:
    path, more = CASES[case]
    if stream and case == "chat, a tool call":
        more = more | {"stream_options": {"include_usage": True}}
    body = ask(path, **more) | ({"stream": True} if stream else {})
    wire.interceptor.policy = policy(scoring=False)
    plain = wire.send(path, body)
    wire.interceptor.policy = SCORED_AGAIN
    for seed in range(3):
        wire.captures.clear()
        sampled = wire.send(path, body, splits=random.Random(seed) if seed else None)
        assert (sampled.status, sampled.body) == (plain.status, plain.body) == (200, plain.body)
    sent = json.loads(sampled.sent)
    usage = {"stream_options": sent["stream_options"]} if "stream_options" in sent else {}
    assert sent == body | usage | (MESSAGES_WITH_IDS if path == RESPONSES else IDS)
    assert [(ids(c.prompt_token_ids), ids(c.output_token_ids)) for c in wire.captures] == generated(fake, sent)
    for capture in wire.captures:
        assert (capture.ids_only, capture.top_k, capture.logprobs, capture.candidate_ids) == (True, 0, [], b"")
        assert capture.choices == len(wire.captures)
    assert not [labels for labels in wire.counts if labels[1] == "skipped"]


def ids(data: bytes) -> list[int]:
    return [int.from_bytes(data[at : at + 4], "little") for at in range(0, len(data), 4)]


def generated(fake: FakeVllm, body: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """Prompt and output of each choice, as the model generates them."""
    given = body.get("messages") or body.get("input") or body["prompt"]
    if "prompt" in body:
        prompts = [fake.encode(text) for text in ([given] if isinstance(given, str) else given)]
    else:
        prompts = [fake.render([user(given)] if isinstance(given, str) else given)]
    limit = body.get("max_tokens") or body["max_output_tokens"]
    return [
        (prompt, [step.token for step in fake.steps(prompt, body | {"seed": (body.get("seed") or 0) + child}, limit)])
        for prompt in prompts
        for child in range(body.get("n") or 1)
    ]


@pytest.mark.parametrize(
    ("path", "more", "reason"),
    [
        (CHAT, {"logprobs": True, "top_logprobs": 3, "return_token_ids": "x"}, "client_logprobs"),
        (CHAT, {"logprobs": True, "top_logprobs": None}, "client_logprobs"),
        (CHAT, {"top_logprobs": 2}, "client_logprobs"),
        (CHAT, {"logprobs": True, "top_logprobs": 2, "include_reasoning": False}, "hidden_reasoning"),
        (CHAT, {"logprobs": True, "top_logprobs": 2, "response_format": {"type": "json_object"}}, "grammar"),
        (COMPLETIONS, {"logprobs": 3, "echo": True}, "echo"),
        (COMPLETIONS, {"logprobs": 3, "structured_outputs": {"regex": "a"}}, "grammar"),
        (RESPONSES, {"text": {"format": {"type": "json_object"}}}, "grammar"),
        (RESPONSES, {"enable_response_messages": "yes"}, "no_token_ids"),
        (RESPONSES, {"background": True}, "background"),
    ],
)
def test_what_ids_do_not_help_is_sent_as_it_is(wire: Wire, path: str, more: dict[str, Any], reason: str) -> None:
    body = ask(path, **more)
    wire.interceptor.policy = SCORED_AGAIN
    assert wire.send(path, body).sent == json_splice.encode(body)
    assert wire.shadow("skipped", reason) == 1


def test_without_an_engine_that_scores_again_nothing_is_added(wire: Wire) -> None:
    for path, more in ((CHAT, {"logprobs": True, "top_logprobs": 3}), (COMPLETIONS, {"logprobs": 3}), (RESPONSES, {})):
        wire.interceptor.policy = policy()
        assert wire.send(path, ask(path, **more)).sent == json_splice.encode(ask(path, **more))
    body = {"model": "fake", "messages": [user("Hello")], "max_tokens": 5}
    wire.interceptor.policy = SCORED_AGAIN
    assert wire.send(MESSAGES, body).sent == json_splice.encode(body)
    assert (wire.shadow("skipped", "client_logprobs"), wire.shadow("skipped", "no_token_ids")) == (2, 2)


def test_the_plugin_is_asked_where_there_is_one(wire: Wire) -> None:
    wire.interceptor.policy = policy(scored_again=FORMS, tap=True, tap_tokens=True)
    assert b"enable_response_messages" not in wire.send(RESPONSES, ask(RESPONSES)).sent
    assert (wire.captures[-1].from_tap, wire.captures[-1].ids_only) == (True, False)


def whole(**changes: Any) -> bytes:
    response = {
        "id": "resp_1",
        "model": "fake",
        "status": "completed",
        "output": [],
        "usage": {"input_tokens": 2, "output_tokens": 1},
        "input_messages": [{"message": "", "tokens": [1, 2], "type": "raw_message_tokens"}],
        "output_messages": [{"message": "", "tokens": [3], "type": "raw_message_tokens"}],
    }
    return json.dumps(response | changes).encode()


HARMONY = [{"role": "user", "content": "Hello"}]
TWICE = [{"tokens": [3]}, {"tokens": [1, 2, 3]}, {"tokens": [4]}]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"input_messages": HARMONY, "output_messages": HARMONY}, "no_token_ids"),
        ({"input_messages": None, "output_messages": None}, "no_token_ids"),
        ({"output_messages": TWICE}, "token_count_mismatch"),
        ({"output_messages": []}, "empty"),
        ({"usage": {"input_tokens": 2, "output_tokens": 9}}, "token_count_mismatch"),
        ({"usage": {"input_tokens": 3, "output_tokens": 1}}, "token_count_mismatch"),
        ({"output_messages": [{"tokens": ["x"]}]}, "unreadable"),
        ({"status": "failed"}, "upstream_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_response_without_the_ids_of_one_answer_is_skipped(
    wire: Wire, fake: FakeVllm, changes: dict[str, Any], reason: str, stream: bool
) -> None:
    """Whatever it has in these members, the client gets null."""
    given = whole(**changes)
    expected = json.loads(given) | {"input_messages": None, "output_messages": None}
    fake.replace_body = given.decode()
    body = ask(RESPONSES)
    if stream:
        event = b'event: response.completed\ndata: {"type":"response.completed","response":' + given + b"}\n\n"
        head = {"content-type": "text/event-stream"}
        answer = httpx.MockTransport(lambda request: httpx.Response(200, headers=head, content=iter([event])))
        wire.client = httpx.Client(base_url="http://fake", transport=answer)
        body["stream"] = True
    wire.interceptor.policy = SCORED_AGAIN
    result = wire.send(RESPONSES, body).body
    if stream:
        result = json.dumps(json.loads(result.partition(b"data: ")[2])["response"]).encode()
    assert json.loads(result) == expected
    assert wire.shadow("skipped", reason) == 1, wire.counts


def test_ids_are_taken_out_of_what_is_no_json(wire: Wire, fake: FakeVllm) -> None:
    fake.replace_body = whole().decode()[:-30]
    wire.interceptor.policy = SCORED_AGAIN
    result = wire.send(RESPONSES, ask(RESPONSES)).body
    assert b'"input_messages": null' in result
    assert b"[1, 2]" not in result
    assert wire.shadow("skipped", "unreadable") == 1
