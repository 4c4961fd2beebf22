"""The interceptor against an engine that speaks vLLM's wire format, and against the clients that read the result."""

from __future__ import annotations

import json
import math
import random
from typing import Any, ClassVar

import httpx
import numpy as np
import openai as openai_sdk
import pytest
from tests.support.fake_vllm import FakeVllm, encode, render
from tests.support.wire import (
    TOOL_CALL,
    TOOLS,
    VERSION,
    ThroughWire,
    Wire,
    chat,
    completion,
    policy,
    rows,
)

from hemostat.openai import json_splice
from hemostat.openai.parameters import LOGIT_EDITING_KEYS, sampling_parameters
from hemostat.openai.reading import read_request
from hemostat.openai.routes import CHAT, COMPLETIONS, Form
from hemostat_engine.xargs import edits_logits

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
    assert (capture.nonce, capture.top_k) == ("", 8)
    asked = {name: body[name] for name in ("temperature", "top_p", "top_k", "min_p", "max_tokens")}
    assert json.loads(capture.decoding) == asked
    assert capture.kind == "chat label batch text cut brief"
    assert (len(capture.conversation), capture.client) == (16, b"")


def test_a_capture_names_its_conversation_and_client_by_salted_digests(wire: Wire) -> None:
    for salt in (b"one", b"two"):
        wire.interceptor.policy = policy(salt=salt)
        for name, value in (("Authorization", "Bearer a"), ("authorization", "bearer a"), ("authorization", "b")):
            wire.send(CHAT, chat(), headers={name: value})
    first, same, other, *salted = wire.captures
    assert first.client == same.client != other.client
    assert len(first.client) == 8
    assert first.conversation == same.conversation == other.conversation, "another client is no new observation"
    assert {first.client, other.client, first.conversation}.isdisjoint(
        {salted[0].client, salted[2].client, salted[0].conversation}
    )
    wire.interceptor.policy = policy(client_header="x-tenant")
    wire.send(CHAT, chat(), headers={"authorization": "a", "X-Tenant": "t"})
    wire.send(CHAT, chat(), headers={"authorization": "b", "X-Tenant": "t"})
    assert wire.captures[-1].client == wire.captures[-2].client != b""


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
    assert exchange.response_head(200, b"text/event-stream", b"identity")
    out = exchange.response_data(event + b"data: [DONE]\n\n")
    out += exchange.response_end()
    exchange.closed(complete=True)
    assert out.endswith(b"data: [DONE]\n\n")
    assert b"x" not in event or b'"x"' in out or event in out
    assert sum(count for (_, outcome, *_), count in wire.counts.items() if outcome == "skipped") == 1
    assert not wire.captures


# --- a client that reads it ------------------------------------------------------------------------------------------


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
        both = client.chat.completions.create(
            model="fake", messages=messages, n=2, logprobs=True, top_logprobs=1, max_tokens=3
        )
        for choice in both.choices:
            entries = choice.logprobs and choice.logprobs.content
            assert entries
            assert "".join(entry.token for entry in entries) == choice.message.content
            assert [top.token for entry in entries for top in entry.top_logprobs] == [entry.token for entry in entries]
        assert len(both.choices) == 2
        assert both.usage is not None
        assert both.usage.completion_tokens == 6
    assert wire.shadow("shadowed") == 5
