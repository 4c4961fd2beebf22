"""The interceptor against an engine that speaks vLLM's wire format, and against the clients that read the result."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator
from typing import Any, ClassVar

import httpx
import numpy as np
import openai as openai_sdk
import pytest
from tests.support.fake_vllm import FakeVllm, encode, render, serving
from tests.support.wire import OTHER_VERSION, VERSION, Wire, policy, rows

from hemostat.hooks import ExchangeHook, Refusal
from hemostat.ipc.messages import Policy
from hemostat.openai import json_splice
from hemostat.openai.errors import leading_error_code
from hemostat.openai.form import Form
from hemostat.openai.reading import read_request
from hemostat.openai.requests import LOGIT_EDITING_KEYS, Unscorable, sampling_parameters
from hemostat.openai.routes import CHAT, COMPLETIONS
from hemostat.shadow.profile_choice import UNJUDGED
from hemostat_engine.xargs import edits_logits

TOOL_CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}]


@pytest.fixture(scope="module")
def engine() -> Iterator[tuple[FakeVllm, str]]:
    fake = FakeVllm(seed=5)
    with serving(fake) as url:
        yield fake, url


@pytest.fixture
def fake(engine: tuple[FakeVllm, str]) -> Iterator[FakeVllm]:
    """The module's engine, reset to its initial state."""
    fresh = vars(FakeVllm(seed=5))
    yield engine[0]
    vars(engine[0]).update(fresh)


@pytest.fixture
def wire(engine: tuple[FakeVllm, str], fake: FakeVllm) -> Iterator[Wire]:
    with httpx.Client(base_url=engine[1], timeout=20) as client:
        yield Wire(client)


def chat(text: str = "Hello", **more: Any) -> dict[str, Any]:
    return {"model": "fake", "messages": [{"role": "user", "content": text}], "max_tokens": 12, "temperature": 0} | more


def completion(prompt: Any = "Hello", **more: Any) -> dict[str, Any]:
    return {"model": "fake", "prompt": prompt, "max_tokens": 12, "temperature": 0} | more


FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one token": {"max_tokens": 1},
    "sampled with a seed": {"temperature": 0.9, "seed": 3},
    "stop string": {"stop": [" w4", "w3"]},
    "unicode": {"say": "Zażółć 日本語 🎉☃!", "max_tokens": 60},
    "end of sequence": {"say": "short", "max_tokens": 30},
    "stop string across characters": {"say": "été, automne, hiver", "max_tokens": 60, "stop": ["hiv"]},
    "a tool call": {"say": "Let me see. " + TOOL_CALL, "max_tokens": 150, "tools": TOOLS},
    "tools, not called": {"tools": TOOLS},
    "tools none": {"say": TOOL_CALL, "max_tokens": 150, "tools": TOOLS, "tool_choice": "none"},
    "usage": {"stream_options": {"include_usage": True}},
    "usage, continuous": {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    "usage off, continuous": {"stream_options": {"include_usage": False, "continuous_usage_stats": True}},
    "options null": {"stream_options": None},
    "nulls written out": {"logprobs": None, "return_token_ids": None, "n": None},
}
SERVERS: dict[str, dict[str, Any]] = {
    "as usual": {},
    "usage forced": {"force_usage": True},
    "no fingerprint": {"fingerprint": None},
    "no tool parser": {"tool_parser": False},
}


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_sampled_response_is_byte_for_byte_the_unsampled_one(
    wire: Wire, fake: FakeVllm, path: str, stream: bool, feature: str, server: str
) -> None:
    vars(fake).update(SERVERS[server])
    asked = dict(FEATURES[feature])
    say = asked.pop("say", None)
    text = "Hello" if say is None else f"say: {say}"
    body = (chat if path == CHAT else completion)(text) | asked
    if path == COMPLETIONS:
        body = {key: value for key, value in body.items() if key not in ("tools", "tool_choice")}
    if stream:
        body["stream"] = True
    else:
        body.pop("stream_options", None)
    wire.interceptor.policy = policy(scoring=False)
    plain = wire.send(path, body)
    assert plain.sent == json_splice.encode(body)
    wire.interceptor.policy = policy()
    for seed in range(3):
        sampled = wire.send(path, body, splits=random.Random(seed) if seed else None)
        assert sampled.sent != plain.sent
        assert sampled.body == plain.body
        assert sampled.status == plain.status == 200
    assert wire.shadow("shadowed") == 3
    assert fake.headers[-1].get(b"accept-encoding") != b"gzip"
    prompt, output, ids, logprobs, emitted = rows(wire.captures[-1])
    assert prompt == (render(body["messages"]) if path == CHAT else encode(text))
    assert ids.shape == logprobs.shape == (len(output), 9)
    for position, token in enumerate(output):
        truth = fake.logprobs(prompt + output[:position])
        row = ids[position][ids[position] >= 0]
        assert token in row
        assert len(set(row.tolist())) == len(row) >= 8
        np.testing.assert_array_equal(logprobs[position][: len(row)], truth[row].astype(np.float32))
        assert np.all(np.isneginf(logprobs[position][len(row) :]))
        assert np.all(np.diff(logprobs[position][: len(row)]) <= 0)
        assert emitted[position] == np.float32(truth[token])
        # The seven most likely are there whatever was emitted: only the last place can be the emitted token's.
        assert set(np.argsort(-truth, kind="stable")[:7]) <= set(row.tolist())


def test_a_capture_has_the_requests_parameters(wire: Wire) -> None:
    wire.interceptor.policy = policy(labels=frozenset({"batch"}), openai_sampling_defaults=True)
    body = chat(temperature=0.5, top_p=0.9, top_k=-1, min_p=0.1, stream=True)
    wire.send(CHAT + "?x=1", body, headers={"X-Hemostat-Label": "batch"}, request_id="abc")
    [capture] = wire.captures
    assert (capture.request_id, capture.route, capture.model, capture.label) == ("abc", CHAT, "fake", "batch")
    assert (capture.temperature, capture.top_p, capture.sampling_top_k, capture.min_p) == (0.5, 0.9, 0, 0.1)
    assert (capture.stream, capture.finish_reason, capture.arm, capture.requested) == (True, "length", "none", None)
    assert (capture.captured_at, capture.nonce, capture.top_k) == (1.5, "", 8)
    assert capture.kind == "chat label batch text cut brief"
    assert (len(capture.conversation), capture.client) == (16, b"")


def test_a_capture_names_its_conversation_and_client_by_salted_digests(wire: Wire) -> None:
    for salt in (b"one", b"two"):
        wire.interceptor.policy = policy(salt=salt)
        for name, value in (("Authorization", "Bearer a"), ("authorization", "bearer a"), ("authorization", "b")):
            wire.send(CHAT, chat(), headers={name: value})
    one, same, other, *salted = wire.captures
    assert one.client == same.client != other.client
    assert len(one.client) == 8
    assert one.conversation == same.conversation == other.conversation, "another client is no new observation"
    assert {one.client, other.client, one.conversation}.isdisjoint(
        {salted[0].client, salted[2].client, salted[0].conversation}
    )
    wire.interceptor.policy = policy(client_header="x-tenant")
    wire.send(CHAT, chat(), headers={"authorization": "a", "X-Tenant": "t"})
    wire.send(CHAT, chat(), headers={"authorization": "b", "X-Tenant": "t"})
    assert wire.captures[-1].client == wire.captures[-2].client != b""


IMAGE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}
SKIPPED: dict[str, tuple[str, str, dict[str, Any]]] = {
    # What is asked -> reason, path, members.
    "a JSON object": ("structured_output", CHAT, {"response_format": {"type": "json_object"}}),
    "a schema": ("structured_output", CHAT, {"response_format": {"type": "json_schema", "json_schema": PARAMETERS}}),
    "guided decoding": ("structured_output", COMPLETIONS, {"guided_regex": "a+"}),
    "structured outputs": ("structured_output", COMPLETIONS, {"structured_outputs": {"choice": ["a", "b"]}}),
    "a required tool": ("forced_tool", CHAT, {"tools": TOOLS, "tool_choice": "required"}),
    "a named tool": (
        "forced_tool",
        CHAT,
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "get_weather"}}},
    ),
    "many choices": ("n", CHAT, {"n": 17}),
    "many prompts": ("n", COMPLETIONS, {"prompt": ["a"] * 9, "n": 2}),
    "beams": ("beam_search", CHAT, {"use_beam_search": True}),
    "own logprobs of a chat": ("client_logprobs", CHAT, {"logprobs": True, "top_logprobs": 2}),
    "own logprobs": ("client_logprobs", COMPLETIONS, {"logprobs": 2}),
    "an echo": ("echo", COMPLETIONS, {"echo": True}),
    "hidden reasoning": ("hidden_reasoning", CHAT, {"include_reasoning": False}),
    "an adapter": ("lora", CHAT, {"model": "adapter"}),
    "another base model": ("no_reference", CHAT, {"model": "second"}),
    "an image": ("multimodal", CHAT, {"messages": [IMAGE]}),
    "an invalid parameter": ("invalid", CHAT, {"stream_options": 3}),
    "a long prompt": ("too_long", COMPLETIONS, {"prompt": [1] * 1030}),
}
MODELS = {"unscorable_models": frozenset({"adapter"}), "scorable_models": frozenset({"fake"})}
NEVER_TREATED = {"lora", "no_reference", "beam_search", "multimodal", "invalid"}


@pytest.mark.parametrize("serves", [False, True])
@pytest.mark.parametrize("case", SKIPPED)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_scored_is_neither_changed_nor_treated(
    wire: Wire, fake: FakeVllm, case: str, stream: bool, serves: bool
) -> None:
    fake.adapters = ("adapter",)
    reason, path, more = SKIPPED[case]
    body = (chat if path == CHAT else completion)() | more | ({"stream": True} if stream else {})
    wire.interceptor.policy = policy(scoring=False)
    plain = wire.send(path, body)
    profile = {"served": VERSION, "control_fraction": 0.0} if serves else {}
    wire.interceptor.policy = policy(**profile, **MODELS)
    sampled = wire.send(path, body)
    assert sampled.sent == plain.sent == json_splice.encode(body)
    assert (sampled.status, sampled.body) == (plain.status, plain.body)
    assert wire.shadow("skipped", reason) == 1
    assert wire.calibration("none", reason) == serves
    assert wire.counts.total() == 1 + serves
    assert wire.arms == ["none"]
    assert not wire.captures
    wire.interceptor.policy = policy(**profile, **MODELS, shadow_rate=0.0)
    assert wire.send(path, body).sent == plain.sent, "whether it is sampled or not"


@pytest.mark.parametrize("case", SKIPPED)
def test_an_operator_may_have_unjudged_requests_treated(wire: Wire, fake: FakeVllm, case: str) -> None:
    reason, path, more = SKIPPED[case]
    body = (chat if path == CHAT else completion)() | more
    wire.interceptor.policy = policy(served=VERSION, control_fraction=0.0, treat_unjudged=True, **MODELS)
    sent = json.loads(wire.send(path, body).sent)
    assert wire.shadow("skipped", reason) == 1
    if reason in NEVER_TREATED:
        assert sent == body
        assert wire.calibration("none", reason) == 1
    else:
        assert sent == body | {"vllm_xargs": {"hemostat": VERSION}}
        assert wire.calibration("treated", "assigned") == 1


def test_every_reason_that_the_body_shows_is_among_these_cases() -> None:
    assert {reason for reason, *_ in SKIPPED.values()} == {*Unscorable, "too_long"}


@pytest.mark.parametrize(
    ("reason", "headers", "changes", "body"),
    [
        ("opted_out", {"X-Hemostat-Shadow": "off"}, {}, None),
        ("on_not_allowed", {"X-Hemostat-Shadow": "on"}, {"shadow_allow_on": False}, None),
        ("encoded", {"content-encoding": "gzip"}, {}, b"\x1f\x8b\x08"),
        ("body_too_large", {}, {"body_limit": 10}, None),
        ("bad_json", {}, {}, b'{"model":"fake","n":1,"n":2,"messages":[{"role":"user","content":"hi"}]}'),
    ],
)
def test_what_head_or_form_exclude_from_scoring_is_neither_changed_nor_treated(
    wire: Wire, reason: str, headers: dict[str, str], changes: dict[str, Any], body: bytes | None
) -> None:
    body = body or json_splice.encode(chat())
    wire.interceptor.policy = policy(served=VERSION, control_fraction=0.0, **changes)
    assert wire.send(CHAT, body, headers=headers).sent == body
    assert wire.shadow("skipped", reason) == wire.calibration("none", reason) == 1
    assert wire.counts.total() == 2
    assert set(wire.arms) <= {"none"}
    # The headers alone exclude nothing where the operator says so.
    wire.interceptor.policy = policy(served=VERSION, control_fraction=0.0, treat_unjudged=True, **changes)
    sent = wire.send(CHAT, body, headers=headers).sent
    assert (sent == body) == (reason not in {"opted_out", "on_not_allowed"})


def test_every_reason_known_from_the_request_is_tested_with_a_profile() -> None:
    form = {"opted_out", "on_not_allowed", "encoded", "body_too_large", "bad_json"}
    assert {str(reason) for reason in UNJUDGED} == {reason for reason, *_ in SKIPPED.values()} | form


@pytest.mark.parametrize("case", ["a JSON object", "many choices", "own logprobs of a chat"])
@pytest.mark.parametrize(
    ("changes", "headers", "reason"),
    [({}, {"X-Hemostat-Calibration": VERSION}, "pinned"), ({"forced": VERSION}, {}, "forced")],
)
def test_a_named_or_forced_version_goes_on_unjudged_requests_too(
    wire: Wire, fake: FakeVllm, case: str, changes: dict[str, Any], headers: dict[str, str], reason: str
) -> None:
    wire.interceptor.policy = policy(**changes)
    wire.send(CHAT, chat() | SKIPPED[case][2], headers=headers)
    assert asked_of_engine(fake) == VERSION
    assert wire.calibration("none", reason) == 1


def test_unreadable_bodies_pass_unchanged(wire: Wire) -> None:
    assert wire.send(CHAT, b'{"model": "fake", "mess').status == 400
    assert wire.shadow("skipped", "bad_json") == 1
    twice = b'{"model":"fake","max_tokens":1,"max_tokens":2,"messages":[{"role":"user","content":"hi"}]}'
    assert wire.send(CHAT, twice).sent == twice
    assert wire.shadow("skipped", "bad_json") == 2
    wire.interceptor.policy = policy(body_limit=10)
    body = json_splice.encode(chat())
    assert wire.send(CHAT, body).sent == body
    assert wire.shadow("skipped", "body_too_large") == 1
    wire.send(CHAT, body, headers={"content-encoding": "gzip"})
    assert wire.shadow("skipped", "encoded") == 1
    assert not wire.captures


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


ALL_GIVEN = {"temperature": 0.7, "top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1}


@pytest.mark.parametrize(
    ("defaults", "more", "temperature"),
    [
        (False, {"temperature": None}, math.nan),
        (False, {"temperature": 1}, math.nan),
        (False, {"temperature": 0}, 0.0),
        (False, ALL_GIVEN, 0.7),
        (False, ALL_GIVEN | {"top_k": None}, math.nan),
        (True, {"temperature": None}, 1.0),
        (True, {"temperature": 0.5}, 0.5),
        (True, {"temperature": 0, "logit_bias": {"5": 1}}, math.nan),
        (True, {"frequency_penalty": 0.1}, math.nan),
        (True, {"repetition_penalty": 1.2}, math.nan),
        (True, {"bad_words": ["x"]}, math.nan),
        (True, {"allowed_token_ids": [5]}, math.nan),
        (True, {"min_tokens": 1}, math.nan),
        (True, {"logits_processors": ["x"]}, math.nan),
        (True, {"thinking_token_budget": 0}, math.nan),
        (True, {"watermarking": True}, math.nan),
        (True, {"temperature": 1, "watermarking": False}, 1.0),
        (True, {"vllm_xargs": {"theirs": 1}}, math.nan),
        (True, {"temperature": 1, "vllm_xargs": {"hemostat": VERSION}}, 1.0),
        (True, {"temperature": 1, "min_tokens": 0, "bad_words": [], "repetition_penalty": 1.0}, 1.0),
    ],
)
def test_the_temperature_is_nan_unless_all_sampling_parameters_are_known(
    defaults: bool, more: dict[str, Any], temperature: float
) -> None:
    request = read_request(json_splice.encode(chat() | more), form=Form.CHAT)
    assert sampling_parameters(request, {}, defaults).temperature == pytest.approx(temperature, nan_ok=True)


def test_requests_that_the_engine_declines_get_no_profile() -> None:
    class Asked:
        """Notes what is looked at; nothing of it is set."""

        names: ClassVar[set[str]] = set()

        def __getattr__(self, name: str) -> Any:
            self.names.add(name)
            return 1.0 if name == "repetition_penalty" else None

    assert not edits_logits(Asked(), after_penalties=True)
    assert Asked.names == {*LOGIT_EDITING_KEYS, "repetition_penalty"}


def test_a_long_request_id_is_truncated_in_the_capture(wire: Wire) -> None:
    wire.send(CHAT, chat(), request_id="r" * 5000)
    assert wire.captures[0].request_id == "r" * 200


def test_lost_tokens_are_detected_without_effect_on_the_client(wire: Wire, fake: FakeVllm) -> None:
    fake.lose_tool_tokens = True
    body = chat("say: " + TOOL_CALL, tools=TOOLS, stream=True, max_tokens=150)
    wire.interceptor.policy = policy(scoring=False)
    plain = wire.send(CHAT, body)
    wire.interceptor.policy = policy()
    assert wire.send(CHAT, body).body == plain.body
    assert wire.shadow("skipped", "tool_tokens_lost") == 1


def test_a_too_long_response_is_not_captured_but_still_stripped(wire: Wire) -> None:
    body = chat(stream=True, max_tokens=40)
    wire.interceptor.policy = policy(scoring=False)
    plain = wire.send(CHAT, body)
    wire.interceptor.policy = policy(shadow_max_tokens=50)
    assert wire.send(CHAT, body).body == plain.body
    assert wire.shadow("skipped", "too_long") == 1


@pytest.mark.parametrize("stream", [False, True])
def test_the_client_gets_what_arrived_before_the_engine_failed(wire: Wire, fake: FakeVllm, stream: bool) -> None:
    fake.die_after = 5
    body = chat(stream=stream)
    wire.interceptor.policy = policy(scoring=False)
    plain = wire.send(CHAT, body)
    wire.interceptor.policy = policy()
    sampled = wire.send(CHAT, body)
    assert sampled.body == plain.body
    assert sampled.complete == plain.complete
    assert not wire.captures
    assert wire.shadow("skipped", "incomplete") + wire.shadow("skipped", "upstream_error") == 1


def test_an_error_event_in_the_stream_is_passed_on(wire: Wire, fake: FakeVllm) -> None:
    fake.error_after = 4
    wire.interceptor.policy = policy(scoring=False)
    plain = wire.send(CHAT, chat(stream=True))
    wire.interceptor.policy = policy()
    assert wire.send(CHAT, chat(stream=True)).body == plain.body
    assert b'"error"' in plain.body
    assert wire.shadow("skipped", "upstream_error") == 1


def test_a_disconnected_client_is_counted_and_not_captured(wire: Wire, fake: FakeVllm) -> None:
    fake.token_delay = 0.02
    assert not wire.send(CHAT, chat(stream=True), give_up_after=2).complete
    assert wire.shadow("skipped", "incomplete") == 1
    assert not wire.captures


def test_a_full_link_is_counted(wire: Wire) -> None:
    wire.room = False
    wire.send(CHAT, chat())
    assert wire.shadow("dropped", "link_full") == 1
    assert wire.shadow("shadowed") == 0


ODD_STREAMS = [
    b"data: not json\n\n",
    b'data: {"choices":[{"index":0},{"index":1}]}\n\n',
    b'data: {"choices":[{"index":0,"delta":{"content":"x"},"token_ids":[5],"logprobs":null}]}\n\n',
    b'data: {"choices":[{"index":0,"delta":{"content":"x"},"token_ids":[99999999999],"logprobs":null}]}\n\n',
    b'data: {"choices":[{"index":0,"delta":{"content":"x"},"token_ids":"x","logprobs":{}}]}\n\n',
    b'data: {"choices":7}\n\n',
    b"data: [1]\n\n: comment\n\n",
]


@pytest.mark.parametrize("event", ODD_STREAMS)
def test_a_stream_of_another_format_is_passed_on_and_counted(event: bytes) -> None:
    wire = Wire(httpx.Client())
    exchange = wire.interceptor.begin("POST", CHAT.encode(), [], "r")
    assert exchange is not None
    exchange.request(json_splice.encode(chat(stream=True)))
    assert exchange.response_head(200, [(b"Content-Type", b"text/event-stream")])
    out = exchange.response_data(event + b"data: [DONE]\n\n")
    out += exchange.response_end()
    exchange.closed(complete=True)
    assert out.endswith(b"data: [DONE]\n\n")
    assert b"x" not in event or b'"x"' in out or event in out
    assert sum(count for (_, outcome, *_), count in wire.counts.items() if outcome == "skipped") == 1
    assert not wire.captures


# --- what is looked at, by the head ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/v1/models"), ("GET", CHAT), ("POST", "/tokenize"), ("POST", "/v1/chat/completions/")]
)
def test_other_requests_are_not_intercepted(wire: Wire, method: str, path: str) -> None:
    assert wire.interceptor.begin(method, path.encode(), [(b"Host", b"x")], "r") is None
    assert not wire.counts


def test_other_generating_routes_are_counted(wire: Wire) -> None:
    assert wire.interceptor.begin("POST", b"/v1/responses", [], "r") is None
    assert wire.shadow("skipped", "route") == 1


def test_requests_are_not_intercepted_without_scoring_and_calibration(wire: Wire) -> None:
    for quiet in (policy(scoring=False), policy(shadow_rate=0.0), policy(scoring=False, mode="auto")):
        wire.interceptor.policy = quiet
        assert wire.interceptor.begin("POST", CHAT.encode(), [], "r") is None
    assert not wire.counts


def test_a_control_request_that_was_sent_again_leaves_its_arm_as_a_treated_one_does(wire: Wire, fake: FakeVllm) -> None:
    fake.max_logprobs = 5
    wire.interceptor.policy = policy(served=VERSION, control_fraction=1.0)
    assert wire.send(CHAT, chat()).replayed
    assert wire.arms == ["none"]
    assert wire.calibration("none", "refused") == 1


def test_a_client_opts_out_or_in(wire: Wire) -> None:
    wire.send(CHAT, chat(), headers={"X-Hemostat-Shadow": "off"})
    assert wire.shadow("skipped", "opted_out") == 1
    wire.interceptor.policy = policy(shadow_rate=0.0)
    wire.send(CHAT, chat(), headers={"x-hemostat-shadow": "on"})
    assert wire.shadow("shadowed") == 1
    wire.interceptor.policy = policy(shadow_rate=0.0, shadow_allow_on=False)
    wire.send(CHAT, chat(), headers={"X-Hemostat-Shadow": "on"})
    assert wire.shadow("skipped", "on_not_allowed") == 1
    wire.interceptor.policy = policy(shadow_rate=1.0, shadow_allow_on=False)
    wire.send(CHAT, chat(), headers={"X-Hemostat-Shadow": "on"})
    assert wire.shadow("skipped", "on_not_allowed") == 2, "whatever is drawn"
    assert len(wire.captures) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("X-Hemostat-Shadow", "yes"),
        ("X-Hemostat-Calibration", "../../etc/passwd"),
        ("X-Hemostat-Calibration", VERSION.upper()),
        ("X-Hemostat-Label", "unheard-of"),
    ],
)
def test_an_invalid_header_is_refused_by_name(wire: Wire, fake: FakeVllm, name: str, value: str) -> None:
    wire.interceptor.policy = policy(labels=frozenset({"batch", "chat"}))
    answer = wire.send(CHAT, chat(), headers={name: value})
    error = json.loads(answer.body)["error"]
    assert answer.status == error["code"] == 400
    assert name in error["message"]
    if "Label" in name:
        assert "batch, chat" in error["message"]
    assert not fake.requests


# --- arms -------------------------------------------------------------------------------------------------------------

AUTO = policy(served=VERSION)
ALL_TREATED = policy(served=VERSION, control_fraction=0.0)


def asked_of_engine(fake: FakeVllm) -> Any:
    return (fake.requests[-1].get("vllm_xargs") or {}).get("hemostat")


def test_arms_are_assigned_by_conversation_and_only_treated_requests_get_the_profile(
    wire: Wire, fake: FakeVllm
) -> None:
    wire.interceptor.policy = AUTO
    arms: list[str] = []
    for number in range(40):
        turns = [{"role": "user", "content": f"question {number}"}]
        seen = set()
        for turn in range(2):
            wire.send(CHAT, chat() | {"messages": turns, "max_tokens": 1}, request_id=f"{number}-{turn}")
            capture = wire.captures[-1]
            seen.add(capture.arm)
            assert asked_of_engine(fake) == capture.requested == (VERSION if capture.arm == "treated" else None)
            turns = [*turns, {"role": "assistant", "content": "x"}, {"role": "user", "content": "more"}]
        assert len(seen) == 1
        arms += seen
    assert 8 <= arms.count("control") <= 32
    assert arms.count("control") + arms.count("treated") == 40
    assert wire.calibration("control", "assigned") + wire.calibration("treated", "assigned") == 80


@pytest.mark.parametrize(
    ("chosen", "headers", "more", "asked", "arm", "reason"),
    [
        (ALL_TREATED, {}, {}, VERSION, "treated", "assigned"),
        (policy(), {}, {}, None, "none", None),
        (policy(mode="observe", served=VERSION), {}, {}, None, "none", None),
        (ALL_TREATED, {"X-Hemostat-Calibration": "off"}, {}, None, "none", "opted_out"),
        (policy(), {"X-Hemostat-Calibration": VERSION}, {}, VERSION, "none", "pinned"),
        (ALL_TREATED, {"X-Hemostat-Calibration": OTHER_VERSION}, {}, None, "none", "unknown"),
        (policy(served=OTHER_VERSION, control_fraction=0.0), {}, {}, None, "none", "unknown"),
        (policy(mode="off", served=VERSION), {"X-Hemostat-Calibration": VERSION}, {}, None, "none", "off"),
        (policy(mode="off", forced=VERSION), {}, {}, None, "none", None),
        (policy(forced=VERSION), {}, {}, VERSION, "none", "forced"),
        (ALL_TREATED, {}, {"vllm_xargs": {"hemostat": "mine"}}, "mine", "none", "own_xargs"),
        (ALL_TREATED, {}, {"logit_bias": {"5": 1}}, None, "none", "own_logits"),
        (ALL_TREATED, {}, {"presence_penalty": 0.5}, None, "none", "own_logits"),
        (ALL_TREATED, {}, {"min_tokens": 2}, None, "none", "own_logits"),
        (ALL_TREATED, {}, {"allowed_token_ids": [1, 2]}, None, "none", "own_logits"),
        (ALL_TREATED, {}, {"min_tokens": 0, "bad_words": []}, VERSION, "treated", "assigned"),
        (policy(mode="off"), {}, {"vllm_xargs": {"hemostat": "mine"}}, "mine", "none", None),
        (ALL_TREATED, {}, {"repetition_penalty": 1.1}, None, "none", "own_logits"),
        (ALL_TREATED, {}, {"vllm_xargs": {"mine": 1}}, VERSION, "treated", "assigned"),
    ],
)
def test_choice_of_arm_and_profile(
    wire: Wire,
    fake: FakeVllm,
    chosen: Policy,
    headers: dict[str, str],
    more: dict[str, Any],
    asked: str | None,
    arm: str,
    reason: str | None,
) -> None:
    wire.interceptor.policy = policy(
        **{name: getattr(chosen, name) for name in ("mode", "serving_by_kind", "forced")}, control_fraction=0.0
    )
    assert wire.send(CHAT, chat() | more, headers=headers).status == 200
    assert asked_of_engine(fake) == asked
    [capture] = wire.captures
    assert (capture.arm, capture.requested) == (arm, asked)
    assert sum(count for (name, *_), count in wire.counts.items() if "calibration" in name) == (reason is not None)
    if reason is not None:
        assert wire.calibration(arm, reason) == 1
    for name, value in (more.get("vllm_xargs") or {}).items():
        assert fake.requests[-1]["vllm_xargs"][name] == value


KIND = "chat text greedy brief"


@pytest.mark.parametrize(
    ("changes", "path", "asked"),
    [
        ({"kinds": {KIND}, "serving_by_kind": {KIND: OTHER_VERSION, "rest": VERSION}}, CHAT, OTHER_VERSION),
        ({"kinds": {KIND}, "serving_by_kind": {KIND: OTHER_VERSION, "rest": VERSION}}, COMPLETIONS, VERSION),
        # A kind that is followed by itself is served by its own evidence only.
        ({"kinds": {KIND}, "serving_by_kind": {"rest": VERSION}}, CHAT, None),
        ({"kinds": {"chat text sampled"}, "serving_by_kind": {"rest": VERSION}}, CHAT, VERSION),
        # One that is no longer followed belongs to the rest.
        ({"serving_by_kind": {KIND: OTHER_VERSION, "rest": VERSION}}, CHAT, VERSION),
        ({"serving_by_kind": {KIND: OTHER_VERSION}}, CHAT, None),
    ],
)
def test_a_request_gets_the_profile_of_its_kind(
    wire: Wire, fake: FakeVllm, changes: dict[str, Any], path: str, asked: str | None
) -> None:
    changes = {"kinds": frozenset(changes.get("kinds", ())), "serving_by_kind": changes["serving_by_kind"]}
    held = frozenset({VERSION, OTHER_VERSION})
    wire.interceptor.policy = policy(mode="auto", acknowledged=held, control_fraction=0.0, **changes)
    assert wire.send(path, chat() if path == CHAT else completion()).status == 200
    assert asked_of_engine(fake) == asked
    [capture] = wire.captures
    assert (capture.arm, capture.requested) == ("none" if asked is None else "treated", asked)
    assert wire.calibration(*("none", "no_profile") if asked is None else ("treated", "assigned")) == 1
    assert capture.kind == (KIND if path == CHAT else "completions text greedy brief")


@pytest.mark.parametrize(
    ("model", "arm", "reason"),
    [("fake", "treated", "assigned"), ("second", "none", "other_model"), ("third", "none", "no_reference")],
)
@pytest.mark.parametrize("named", [True, False])
def test_profiles_are_for_one_of_several_base_models(
    wire: Wire, model: str, arm: str, reason: str, named: bool
) -> None:
    matched = {"scorable_models": frozenset({"fake", "second"}), "calibrated_models": frozenset({"fake"})}
    wire.interceptor.policy = policy(
        served=VERSION, control_fraction=0.0, shadow_rate=0.0, **matched, default_model=model
    )
    body = chat(model=model)
    if not named:
        del body["model"]
    sent = json.loads(wire.send(CHAT, body).sent)
    assert sent.get("vllm_xargs") == ({"hemostat": VERSION} if arm == "treated" else None)
    assert wire.calibration(arm, reason) == wire.counts.total() == 1


def test_in_an_unsampled_treated_request_only_the_xargs_change(wire: Wire) -> None:
    wire.interceptor.policy = policy(served=VERSION, control_fraction=0.0, scoring=False)
    body = b'{ "model": "fake",\n  "messages": [{"role": "user", "content": "caf\\u00e9"}], "max_tokens": 2 }'
    answer = wire.send(CHAT, body)
    assert answer.sent == body.replace(
        b'"max_tokens": 2 }', b'"max_tokens": 2,"vllm_xargs":{"hemostat":"%s"} }' % VERSION.encode()
    )
    assert not wire.captures


def test_a_tap_is_requested_where_a_plugin_has_reported(wire: Wire, fake: FakeVllm) -> None:
    wire.interceptor.policy = policy(tap=True)
    wire.send(CHAT, chat())
    assert fake.requests[-1]["vllm_xargs"] == {"hemostat_tap": "nonce"}
    wire.send(CHAT, chat(vllm_xargs={"hemostat_tap": "mine"}))
    assert fake.requests[-1]["vllm_xargs"] == {"hemostat_tap": "mine"}
    wire.interceptor.policy = policy(tap=True, replica="0123456789abcdef")
    wire.send(CHAT, chat())
    named = "0123456789abcdef-nonce"
    assert fake.requests[-1]["vllm_xargs"] == {"hemostat_tap": named}, "the engine tells the replica that asked"
    assert [capture.nonce for capture in wire.captures] == ["nonce", "", named]


def test_without_a_plugin_a_profile_is_sent_as_temperature_and_bias_unless_the_client_set_them(
    wire: Wire, fake: FakeVllm
) -> None:
    wire.interceptor.policy = policy(
        served=VERSION,
        acknowledged=frozenset(),
        control_fraction=0.0,
        apply="request",
        request_temperature=0.8,
        request_logit_bias={"7": 1.5},
        openai_sampling_defaults=True,
    )
    free = chat()
    del free["temperature"]
    wire.send(CHAT, free)
    sent = fake.requests[-1]
    assert (sent["temperature"], sent["logit_bias"], "vllm_xargs" in sent) == (0.8, {"7": 1.5}, False)
    assert (wire.captures[-1].arm, wire.captures[-1].temperature) == ("treated", 0.8)
    wire.send(CHAT, chat(temperature=0.3))
    sent = fake.requests[-1]
    assert (sent["temperature"], "logit_bias" in sent) == (0.3, False)
    assert (wire.captures[-1].arm, wire.captures[-1].requested) == ("none", None)
    assert wire.calibration("none", "own_parameters") == 1


# --- a client that reads it ------------------------------------------------------------------------------------------


class ThroughWire(httpx.BaseTransport):
    """An httpx transport whose every request goes through the interceptor."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._ids = itertools.count()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        answer = self._wire.send(request.url.path, request.read(), request_id=f"sdk-{next(self._ids)}")
        kind = "text/event-stream" if answer.body.startswith(b"data:") else "application/json"
        return httpx.Response(answer.status, headers={"content-type": kind}, content=answer.body)


def test_the_openai_client_reads_sampled_responses(wire: Wire) -> None:
    with openai_sdk.OpenAI(
        base_url="http://fake/v1", api_key="x", http_client=httpx.Client(transport=ThroughWire(wire)), max_retries=0
    ) as client:
        messages: Any = [{"role": "user", "content": "say: Grüße 🎉"}]
        whole = client.chat.completions.create(model="fake", messages=messages)
        assert whole.choices[0].message.content == "Grüße 🎉"
        assert whole.choices[0].logprobs is None
        parts = list(client.chat.completions.create(model="fake", messages=messages, stream=True))
        assert "".join(part.choices[0].delta.content or "" for part in parts) == "Grüße 🎉"
        assert all(part.usage is None for part in parts)
        messages = [{"role": "user", "content": "say: " + TOOL_CALL}]
        stream: Any = client.chat.completions.create(model="fake", messages=messages, tools=TOOLS, stream=True)
        calls = [call for part in stream for call in part.choices[0].delta.tool_calls or []]
        assert "".join(call.function.arguments or "" for call in calls) == '{"city": "Paris"}'
        own = client.chat.completions.create(
            model="fake", messages=messages, logprobs=True, top_logprobs=2, max_tokens=3
        )
        assert own.choices[0].logprobs is not None
        assert len(own.choices[0].logprobs.content or []) == 3
        with pytest.raises(openai_sdk.NotFoundError):
            client.completions.create(model="nope", prompt="x")
    assert wire.shadow("shadowed") == 3
