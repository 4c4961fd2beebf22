"""What cannot be scored passes unchanged, and gets no profile."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.support.fake_vllm import FakeVllm
from tests.support.wire import (
    PARAMETERS,
    TOOLS,
    VERSION,
    Wire,
    chat,
    completion,
    policy,
)

from hemostat.metrics.reasons import UNJUDGED, Unscored
from hemostat.openai import json_splice
from hemostat.openai.routes import CHAT, COMPLETIONS

IMAGE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}
SKIPPED: dict[str, tuple[str, str, dict[str, Any]]] = {
    # What is asked -> reason, path, members.
    "a JSON object": ("grammar", CHAT, {"response_format": {"type": "json_object"}}),
    "a schema": ("grammar", CHAT, {"response_format": {"type": "json_schema", "json_schema": PARAMETERS}}),
    "guided decoding": ("grammar", COMPLETIONS, {"guided_regex": "a+"}),
    "structured outputs": ("grammar", COMPLETIONS, {"structured_outputs": {"choice": ["a", "b"]}}),
    "a required tool": ("grammar", CHAT, {"tools": TOOLS, "tool_choice": "required"}),
    "a named tool": (
        "grammar",
        CHAT,
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "get_weather"}}},
    ),
    "many choices": ("n", CHAT, {"n": 17, "temperature": 1}),
    "many prompts": ("n", COMPLETIONS, {"prompt": ["a"] * 9, "n": 2, "temperature": 1}),
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
WITH_GRAMMAR = "grammar"
"""Of kinds that only a profile of their own could treat: what is proven of the rest says nothing of them."""


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
    elif reason == WITH_GRAMMAR:
        assert sent == body
        assert wire.calibration("none", "no_profile") == 1
    else:
        assert sent == body | {"vllm_xargs": {"hemostat": VERSION}}
        assert wire.calibration("treated", "assigned") == 1


OF_OTHER_FORMS = {Unscored.NO_TOKEN_IDS, Unscored.BACKGROUND, Unscored.SERVER_STATE}
"""Of `/v1/responses` and `/v1/messages`: see `test_other_forms`."""


@pytest.mark.parametrize(
    ("reason", "headers", "changes", "body"),
    [
        ("opted_out", {"X-Hemostat-Shadow": "off"}, {}, None),
        ("on_not_allowed", {"X-Hemostat-Shadow": "on"}, {"shadow_allow_on": False}, None),
        ("encoded", {"content-encoding": "gzip"}, {}, b"\x1f\x8b\x08"),
        ("body_too_large", {}, {"body_limit": 10}, None),
        ("too_complex", {}, {}, b'{"model":"fake","temperature":[' + b"1," * 999 + b'1],"messages":[]}'),
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
    form = {"opted_out", "on_not_allowed", "encoded", "body_too_large", "too_complex", "bad_json"}
    assert {str(reason) for reason in UNJUDGED} == {reason for reason, *_ in SKIPPED.values()} | form | OF_OTHER_FORMS


@pytest.mark.parametrize("case", ["a JSON object", "many choices", "own logprobs of a chat"])
def test_a_named_version_is_applied_to_unjudged_requests_too(wire: Wire, fake: FakeVllm, case: str) -> None:
    wire.send(CHAT, chat() | SKIPPED[case][2], headers={"X-Hemostat-Calibration": VERSION})
    assert fake.requests[-1]["vllm_xargs"] == {"hemostat": VERSION}
    assert wire.calibration("none", "pinned") == 1


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
