"""`/v1/responses` and `/v1/messages`: the response is never changed, and the tokens are what the plugin hands out."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import httpx
import httpx2
import msgspec
import numpy as np
import openai as openai_sdk
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.fake_lora import FakeLora
from tests.support.fake_vllm import FakeVllm, render, serving
from tests.support.slow import examples
from tests.support.wire import VERSION, ThroughWire, Wire, httpx2_transport, policy, rows

from hemostat.metrics.reasons import Unscored
from hemostat.openai import json_splice
from hemostat.openai.kinds import kind_name
from hemostat.openai.reading import read_request
from hemostat.openai.routes import CHAT, MESSAGES, RESPONSES, Form
from hemostat.scoring.intake import UnusableAnswer, captures_from_tap

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = {
    RESPONSES: [{"type": "function", "name": "get_weather", "parameters": PARAMETERS}],
    MESSAGES: [{"name": "get_weather", "input_schema": PARAMETERS}],
}
LIMIT = {RESPONSES: "max_output_tokens", MESSAGES: "max_tokens"}
FORM = {RESPONSES: Form.RESPONSES, MESSAGES: Form.MESSAGES}
BOTH = pytest.mark.parametrize("path", [RESPONSES, MESSAGES])


@pytest.fixture
def fake() -> FakeVllm:
    return FakeVllm(seed=5, plugin=True)


@pytest.fixture
def wire(fake: FakeVllm) -> Iterator[Wire]:
    with serving(fake) as url, httpx.Client(base_url=url, timeout=20) as client:
        yield Wire(client)


def ask(path: str, text: str = "Hello", *, limit: int = 12, **more: Any) -> dict[str, Any]:
    given = [{"role": "user", "content": text}]
    return {
        "model": "fake",
        ("input" if path == RESPONSES else "messages"): given,
        LIMIT[path]: limit,
        "temperature": 0,
    } | more


def tapping(**more: Any) -> Any:
    return policy(tap=True, tap_tokens=True, **more)


FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one token": {"limit": 1},
    "unicode": {"text": "say: Zażółć 日本語 🎉☃!", "limit": 60},
    "ends": {"text": "say: short", "limit": 30},
    "sampled": {"temperature": 0.9},
    "a tool call": {"text": "say: Let me see. " + CALL, "limit": 150, "tools": TOOLS},
    "an error's words": {"text": 'say: {"error": {"code": 400}} data: {"error"', "limit": 60},
}


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("stream", [False, True])
@BOTH
def test_the_response_is_byte_for_byte_the_same_and_the_tokens_are_those_of_the_same_chat(
    wire: Wire, fake: FakeVllm, path: str, stream: bool, feature: str
) -> None:
    asked = dict(FEATURES[feature])
    if "tools" in asked:
        asked["tools"] = TOOLS[path]
    body = ask(path, **asked) | ({"stream": True} if stream else {})
    wire.interceptor.policy = policy(scoring=False)
    plain = wire.send(path, body)
    wire.interceptor.policy = tapping()
    for seed in range(3):
        sampled = wire.send(path, body, splits=random.Random(seed) if seed else None)
        assert (sampled.status, sampled.body) == (plain.status, plain.body) == (200, plain.body)
    xargs = {"hemostat_tap": "nonce", "hemostat_tap_top": "8"}
    assert json.loads(sampled.sent) == body | {"vllm_xargs": xargs}
    assert wire.shadow("shadowed") == 3
    capture, answer = wire.captures[-1], fake.handed_out[-1]
    assert (capture.from_tap, capture.choices, capture.nonce, capture.model) == (True, 1, "nonce", "fake")
    assert capture.generated == answer.tokens
    (completed,) = captures_from_tap(capture, [answer], 1024)
    chat = {"model": "fake", "messages": body.get("messages") or body["input"], "max_tokens": body[LIMIT[path]]}
    wire.interceptor.policy = policy()
    wire.send(CHAT, chat | {"temperature": body["temperature"]})
    prompt, output, ids, logprobs, emitted = rows(completed)
    expected = rows(wire.captures[-1])
    assert (prompt, output) == expected[:2] == (render(chat["messages"]), expected[1])
    np.testing.assert_array_equal(emitted, expected[4])
    for position, token in enumerate(output):
        truth = fake.logprobs(prompt + output[:position]).astype(np.float32)
        most_likely = np.argsort(-truth, kind="stable")[:8].tolist()
        assert ids[position].tolist() == [*most_likely, -1 if token in most_likely else token]
        np.testing.assert_array_equal(logprobs[position][:8], truth[most_likely])
    assert (completed.from_tap, completed.choice, completed.conversation) == (False, 0, capture.conversation)


@BOTH
def test_without_the_plugin_nothing_is_changed_and_the_skip_is_counted(wire: Wire, path: str) -> None:
    body = ask(path)
    for changes in ({}, {"tap": True}, {"tap_tokens": True}):
        wire.interceptor.policy = policy(**changes)
        assert wire.send(path, body).sent == json_splice.encode(body)
    assert wire.shadow("skipped", "no_token_ids") == 3
    wire.interceptor.policy = tapping()
    assert not wire.captures
    wire.send(path, body | {"vllm_xargs": {"hemostat_tap": "theirs"}})
    assert [capture.nonce for capture in wire.captures] == ["nonce"], "a client's own tap is removed"


IMAGE = {"role": "user", "content": [{"type": "input_image", "image_url": "data:,"}]}
ANTHROPIC_IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
REASONS: dict[str, tuple[str, Unscored, dict[str, Any]]] = {
    "in the background": (RESPONSES, Unscored.BACKGROUND, {"background": True}),
    "an earlier response": (RESPONSES, Unscored.SERVER_STATE, {"previous_response_id": "resp_1"}),
    "earlier messages": (RESPONSES, Unscored.SERVER_STATE, {"previous_input_messages": [{}]}),
    "an image": (RESPONSES, Unscored.MULTIMODAL, {"input": [IMAGE]}),
    "an image from a tool": (
        RESPONSES,
        Unscored.MULTIMODAL,
        {"input": [{"type": "function_call_output", "call_id": "c", "output": [{"type": "input_image"}]}]},
    ),
    "no input": (RESPONSES, Unscored.INVALID, {"input": None}),
    "input of another type": (RESPONSES, Unscored.INVALID, {"input": {"role": "user"}}),
    "stream of another type": (RESPONSES, Unscored.INVALID, {"stream": "yes"}),
    "Anthropic's image": (
        MESSAGES,
        Unscored.MULTIMODAL,
        {"messages": [{"role": "user", "content": [ANTHROPIC_IMAGE]}]},
    ),
    "an image in a tool's result": (
        MESSAGES,
        Unscored.MULTIMODAL,
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "tool_result", "tool_use_id": "t", "content": [ANTHROPIC_IMAGE]}],
                }
            ]
        },
    ),
    "no messages": (MESSAGES, Unscored.INVALID, {"messages": []}),
}


@pytest.mark.parametrize("case", REASONS)
def test_what_cannot_be_scored_is_left_alone_with_a_reason(case: str) -> None:
    path, reason, more = REASONS[case]
    request = read_request(json_splice.encode(ask(path) | more), form=FORM[path])
    assert request.unscorable is reason
    assert not request.from_tap


@BOTH
def test_tools_that_are_offered_and_thinking_do_not_prevent_a_score(path: str) -> None:
    for more in (
        {"tools": TOOLS[path]},
        {"tools": TOOLS[path], "tool_choice": "none" if path == RESPONSES else {"type": "none"}},
        {"text": {"format": {"type": "text"}}} if path == RESPONSES else {"thinking": {"type": "adaptive"}},
        {"include": ["message.output_text.logprobs"], "top_logprobs": 3} if path == RESPONSES else {"system": "Hi"},
    ):
        assert read_request(json_splice.encode(ask(path) | more), form=FORM[path]).from_tap


SCHEMA = {"type": "json_schema", "name": "x", "schema": PARAMETERS}
RESTRICTED: dict[str, tuple[str, dict[str, Any]]] = {
    "a schema": (RESPONSES, {"text": {"format": SCHEMA}}),
    "an object": (RESPONSES, {"text": {"format": {"type": "json_object"}}}),
    "structured outputs": (RESPONSES, {"structured_outputs": {"regex": "a"}}),
    "a forced tool": (
        RESPONSES,
        {"tools": TOOLS[RESPONSES], "tool_choice": "required"},
    ),
    "a named tool": (
        RESPONSES,
        {"tools": TOOLS[RESPONSES], "tool_choice": {"type": "function", "name": "get_weather"}},
    ),
    "a strict tool": (
        RESPONSES,
        {"tools": [TOOLS[RESPONSES][0] | {"strict": True}]},
    ),
    "one call": (RESPONSES, {"tools": TOOLS[RESPONSES], "parallel_tool_calls": False}),
    "Anthropic's schema": (MESSAGES, {"output_config": {"format": SCHEMA}}),
    "any tool": (MESSAGES, {"tools": TOOLS[MESSAGES], "tool_choice": {"type": "any"}}),
    "one tool": (
        MESSAGES,
        {"tools": TOOLS[MESSAGES], "tool_choice": {"type": "tool", "name": "get_weather"}},
    ),
    "Anthropic's strict tool": (
        MESSAGES,
        {"tools": [TOOLS[MESSAGES][0] | {"strict": True}]},
    ),
    "Anthropic's one call": (
        MESSAGES,
        {"tools": TOOLS[MESSAGES], "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
    ),
    "tools that a message changes": (
        MESSAGES,
        {
            "messages": [
                {"role": "user", "content": "x"},
                {"role": "system", "content": [{"type": "tool_removal", "tool": {}}]},
            ]
        },
    ),
}


@pytest.mark.parametrize("case", RESTRICTED)
def test_what_restricts_the_tokens_is_scored_where_the_plugin_says_what_is_allowed(wire: Wire, case: str) -> None:
    path, more = RESTRICTED[case]
    body = ask(path) | more
    wire.interceptor.policy = tapping(grammars=True)
    wire.send(path, body)
    (capture,) = wire.captures
    assert (capture.grammar, capture.from_tap, capture.nonce != "") == (True, True, True)
    assert " grammar " in capture.kind
    for without in (tapping(), policy()):
        wire.interceptor.policy = without
        assert wire.send(path, body).sent == json_splice.encode(body)
    assert wire.shadow("skipped", "grammar") == 2
    wire.interceptor.policy = policy(grammars=True)
    wire.send(path, body)
    assert wire.shadow("skipped", "no_token_ids") == 1


_VALUES = st.recursive(
    st.sampled_from([None, True, 1, "auto", "function", "json_schema", "namespace", "any", "f", {}, []]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["type", "name", "format", "schema", "strict", "tools", "parameters"]), inner)
    ),
    max_leaves=8,
)
_MEMBERS = st.sampled_from(
    ["text", "tools", "tool_choice", "parallel_tool_calls", "structured_outputs", "output_config"]
)


@settings(max_examples=examples(200), deadline=None)
@given(st.sampled_from([RESPONSES, MESSAGES]), st.dictionaries(_MEMBERS, _VALUES))
def test_reading_a_grammar_never_fails(path: str, more: dict[str, Any]) -> None:
    """Whatever vLLM refuses of it, it explains to the client."""
    read_request(json_splice.encode(ask(path) | more), form=FORM[path])


@BOTH
def test_calls_that_the_model_is_free_to_make_have_no_grammar(path: str) -> None:
    none: Any = "none" if path == RESPONSES else {"type": "none"}
    auto: Any = "auto" if path == RESPONSES else {"type": "auto"}
    named = TOOLS[path][0] | {"description": 'has a member "strict": true'}
    cases: list[dict[str, Any]] = [
        {},
        {"tools": []},
        {"tools": TOOLS[path]},
        {"tools": [named]},
        {"tools": TOOLS[path], "tool_choice": auto},
        {"tools": [TOOLS[path][0] | {"strict": True}], "tool_choice": none},
        {"tools": [TOOLS[path][0] | {"strict": False}]},
    ]
    for more in cases:
        result = read_request(json_splice.encode(ask(path) | more), form=FORM[path])
        assert result.from_tap
        assert not result.grammar, more


def test_turns_of_one_conversation_are_recognized() -> None:
    def key(path: str, body: dict[str, Any]) -> bytes | None:
        return read_request(json_splice.encode(body), form=FORM[path]).conversation_key

    first = {"role": "user", "content": "Hello"}
    later = [first, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "And now?"}]
    called = [first, {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}]
    for path, name in ((RESPONSES, "input"), (MESSAGES, "messages")):
        expected = key(path, ask(path))
        assert expected is not None
        assert expected == key(path, ask(path) | {name: later})
        assert expected != key(path, ask(path, "Bye"))
        assert expected != key(path, ask(path) | {"instructions" if path == RESPONSES else "system": "Be brief"})
    assert key(RESPONSES, ask(RESPONSES)) == key(RESPONSES, ask(RESPONSES) | {"input": called})
    assert key(RESPONSES, ask(RESPONSES) | {"input": "Hello"}) == key(RESPONSES, ask(RESPONSES) | {"input": "Hello"})


def test_names_of_kinds() -> None:
    def kind(path: str, **more: Any) -> str:
        request = read_request(json_splice.encode(ask(path, limit=100) | more), form=FORM[path])
        return kind_name(request, "", several_models=False)

    assert kind(RESPONSES) == "responses text greedy"
    assert kind(MESSAGES) == "messages text greedy"
    assert kind(RESPONSES, max_output_tokens=8) == "responses text greedy brief"
    assert kind(MESSAGES, max_tokens=8) == "messages text greedy brief"
    assert kind(RESPONSES, input="Antworte in JSON") == "responses json greedy"
    assert kind(MESSAGES, system="Answer in JSON", temperature=1) == "messages json sampled"
    assert kind(RESPONSES, instructions="Answer in JSON") == "responses json greedy"
    for path in (RESPONSES, MESSAGES):
        assert kind(path, tools=TOOLS[path]) == f"{FORM[path]} tools greedy"
    assert kind(MESSAGES, tools=TOOLS[MESSAGES], tool_choice={"type": "none"}) == "messages text greedy"
    reply = [{"role": "user", "content": "Hi"}, {"type": "function_call"}, {"role": "user", "content": "Write code"}]
    assert kind(RESPONSES, input=reply) == "responses text greedy reply"
    assert kind(MESSAGES, tools=TOOLS[MESSAGES], tool_choice={"type": "any"}) == "messages grammar greedy"
    assert kind(MESSAGES, tool_choice={"type": "any"}) == "messages text greedy", "vLLM restricts nothing without tools"


@BOTH
def test_profiles_are_asked_for_as_in_a_chat(wire: Wire, path: str) -> None:
    wire.interceptor.policy = tapping(served=VERSION, control_fraction=0.0)
    plain = ask(path)
    sent = json.loads(wire.send(path, plain).sent)
    assert sent["vllm_xargs"] == {"hemostat": VERSION, "hemostat_tap": "nonce", "hemostat_tap_top": "8"}
    assert wire.calibration("treated", "assigned") == 1
    assert (wire.captures[-1].requested, wire.captures[-1].arm) == (VERSION, "treated")
    # Without answers nothing would judge it.
    wire.interceptor.policy = policy(served=VERSION, control_fraction=0.0, tap=True)
    assert json.loads(wire.send(path, plain).sent) == plain
    assert wire.calibration("none", "no_token_ids") == 1


@pytest.mark.parametrize("stream", [False, True])
@BOTH
def test_an_adapters_name_is_replaced_by_the_models(wire: Wire, fake: FakeVllm, path: str, stream: bool) -> None:
    fake.lora = FakeLora(resolves={VERSION: 16}, strength=0.0)
    body = ask(path, f"say: {VERSION} is no name", limit=70) | ({"stream": True} if stream else {})
    wire.interceptor.policy = policy(scoring=False)
    plain = wire.send(path, body)
    names = frozenset({"fake"})
    wire.interceptor.policy = tapping(
        served=VERSION,
        control_fraction=0.0,
        adapters=frozenset({VERSION}),
        base_models=names,
        answered_name="fake",
        scorable_models=names,
        calibrated_models=names,
        adapter_names=True,
    )
    for seed in range(3):
        treated = wire.send(path, body, splits=random.Random(seed) if seed else None)
        assert json.loads(treated.sent)["model"] == VERSION
        assert treated.body == plain.body
    assert (wire.captures[-1].adapter, wire.captures[-1].model) == (VERSION, "fake")


@BOTH
def test_errors_and_broken_responses_are_passed_on_and_counted(wire: Wire, fake: FakeVllm, path: str) -> None:
    wire.interceptor.policy = tapping()
    body = ask(path)
    refused = wire.send(path, body | {"model": "nope"})
    assert refused.status == 404
    assert wire.shadow("skipped", "request_refused") == 1
    fake.error_after = 3
    broken = wire.send(path, body | {"stream": True})
    assert broken.status == 200
    assert wire.shadow("skipped", "incomplete") + wire.shadow("skipped", "upstream_error") == 1
    fake.error_after = None
    fake.die_after = 3
    wire.send(path, body | {"stream": True})
    assert wire.shadow("skipped", "incomplete") + wire.shadow("skipped", "upstream_error") == 2
    fake.die_after, fake.replace_body = None, "[1, 2]"
    assert wire.send(path, body).body == b"[1, 2]"
    assert wire.shadow("skipped", "unreadable") == 1
    assert not wire.captures


def test_answers_that_are_not_the_whole_request_are_refused(wire: Wire, fake: FakeVllm) -> None:
    wire.interceptor.policy = tapping()
    wire.send(MESSAGES, ask(MESSAGES))
    (capture,), (answer,) = wire.captures, fake.handed_out

    def reason(answers: list[Any], **more: Any) -> Unscored:
        with pytest.raises(UnusableAnswer) as refused:
            captures_from_tap(msgspec.structs.replace(capture, **more), answers, 40)
        return refused.value.reason

    assert reason([]) is Unscored.NO_ANSWER
    assert reason([answer, answer]) is Unscored.ANSWER_MISMATCH
    assert reason([answer], choices=2) is Unscored.ANSWER_MISMATCH
    assert reason([answer], generated=11) is Unscored.ANSWER_MISMATCH
    assert reason([msgspec.structs.replace(answer, prompt_ids=b"")]) is Unscored.EMPTY
    assert reason([msgspec.structs.replace(answer, prompt_ids=bytes(4 * 29))]) is Unscored.TOO_LONG
    assert len(captures_from_tap(msgspec.structs.replace(capture, generated=-1), [answer], 1024)) == 1


def test_openais_client_reads_sampled_responses(wire: Wire) -> None:
    wire.interceptor.policy = tapping()
    transport = httpx.Client(transport=ThroughWire(wire))
    with openai_sdk.OpenAI(base_url="http://fake/v1", api_key="x", http_client=transport, max_retries=0) as client:
        whole = client.responses.create(model="fake", input="say: Grüße 🎉")
        assert (whole.output_text, whole.status, whole.top_logprobs) == ("Grüße 🎉", "completed", None)
        assert whole.usage is not None
        events = list(client.responses.create(model="fake", input="say: Grüße 🎉", stream=True))
        text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
        assert text == "Grüße 🎉"
        assert [event.sequence_number for event in events] == list(range(len(events)))
        tools: Any = TOOLS[RESPONSES]
        called = client.responses.create(model="fake", input="say: " + CALL, tools=tools)
        assert [(item.name, item.arguments) for item in called.output if item.type == "function_call"] == [
            ("get_weather", '{"city": "Paris"}')
        ]
        with pytest.raises(openai_sdk.NotFoundError):
            client.responses.create(model="nope", input="x")
    assert wire.shadow("shadowed") == 3


def test_anthropics_client_reads_sampled_responses(wire: Wire) -> None:
    import anthropic  # takes seconds

    wire.interceptor.policy = tapping()
    # This client refuses httpx's classes, and has the same ones in a package of its own.
    transport = httpx2.Client(transport=httpx2_transport(wire))
    user: Any = [{"role": "user", "content": "say: Grüße 🎉"}]
    with anthropic.Anthropic(base_url="http://fake", api_key="x", http_client=transport, max_retries=0) as client:
        whole = client.messages.create(model="fake", max_tokens=50, messages=user)
        assert [block.text for block in whole.content if block.type == "text"] == ["Grüße 🎉"]
        assert (whole.stop_reason, whole.usage.output_tokens) == ("end_turn", len("Grüße 🎉".encode()) + 1)
        with client.messages.stream(model="fake", max_tokens=50, messages=user) as stream:
            assert "".join(stream.text_stream) == "Grüße 🎉"
            assert stream.get_final_message().stop_reason == "end_turn"
        tools: Any = TOOLS[MESSAGES]
        call: Any = [{"role": "user", "content": "say: " + CALL}]
        with client.messages.stream(model="fake", max_tokens=150, messages=call, tools=tools) as stream:
            (used,) = stream.get_final_message().content
        assert used.type == "tool_use"
        assert (used.name, used.input) == ("get_weather", {"city": "Paris"})
        with pytest.raises(anthropic.NotFoundError):
            client.messages.create(model="nope", max_tokens=5, messages=user)
    assert wire.shadow("shadowed") == 3
