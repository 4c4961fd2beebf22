"""Which requests are looked at, by their head; which arm and which profile they get."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.support.fake_vllm import FakeVllm
from tests.support.wire import (
    OTHER_VERSION,
    VERSION,
    Wire,
    chat,
    completion,
    policy,
)

from hemostat.ipc.messages import Policy
from hemostat.openai.routes import CHAT, COMPLETIONS
from hemostat_calibration.engine_keys import ACTING_KEYS

# --- what is looked at, by the head ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/v1/models"), ("GET", CHAT), ("POST", "/tokenize"), ("POST", "/v1/chat/completions/")]
)
def test_other_requests_are_not_intercepted(wire: Wire, method: str, path: str) -> None:
    assert wire.interceptor.begin(method, path.encode(), [(b"Host", b"x")], "r") is None
    assert not wire.counts


def test_other_generating_routes_are_counted(wire: Wire) -> None:
    assert wire.interceptor.begin("POST", b"/v1/embeddings", [], "r") is None
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
        (ALL_TREATED, {}, {"vllm_xargs": {"hemostat": "mine"}}, "mine", "none", "own_xargs"),
        (ALL_TREATED, {}, {"logit_bias": {"5": 1}}, None, "none", "own_logits"),
        (ALL_TREATED, {}, {"presence_penalty": 0.5}, None, "none", "own_logits"),
        (ALL_TREATED, {}, {"min_tokens": 2}, None, "none", "own_logits"),
        (ALL_TREATED, {}, {"allowed_token_ids": [1, 2]}, None, "none", "own_logits"),
        (ALL_TREATED, {}, {"min_tokens": 0, "bad_words": []}, VERSION, "treated", "assigned"),
        (policy(mode="off"), {}, {"vllm_xargs": {"hemostat": "mine"}}, "mine", "none", None),
        (ALL_TREATED, {}, {"repetition_penalty": 1.1}, None, "none", "own_logits"),
        (ALL_TREATED, {}, {"vllm_xargs": {"mine": 1}}, VERSION, "treated", "assigned"),
        # Keys that make the plugin act are Hemostat's own: a client's are removed, and change nothing else.
        (ALL_TREATED, {}, {"vllm_xargs": {"hemostat_tap": "mine"}}, VERSION, "treated", "assigned"),
        (
            ALL_TREATED,
            {},
            {"vllm_xargs": {"hemostat_tap": "mine", "hemostat_force": [1]}, "n": 2, "temperature": 1},
            VERSION,
            "treated",
            "assigned",
        ),
        (
            *(ALL_TREATED, {"X-Hemostat-Calibration": VERSION}, {"vllm_xargs": {"hemostat_tap": "mine"}}),
            *(VERSION, "none", "pinned"),
        ),
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
    wire.interceptor.policy = policy(mode=chosen.mode, serving_by_kind=chosen.serving_by_kind, control_fraction=0.0)
    assert wire.send(CHAT, chat() | more, headers=headers).status == 200
    assert asked_of_engine(fake) == asked
    assert len(wire.captures) == more.get("n", 1)
    for capture in wire.captures:
        assert (capture.arm, capture.requested) == (arm, asked)
    assert sum(count for (name, *_), count in wire.counts.items() if "calibration" in name) == (reason is not None)
    if reason is not None:
        assert wire.calibration(arm, reason) == 1
    for name, value in (more.get("vllm_xargs") or {}).items():
        assert fake.requests[-1]["vllm_xargs"].get(name) == (None if name in ACTING_KEYS else value)


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
    assert fake.requests[-1]["vllm_xargs"] == {"hemostat_tap": "nonce"}
    wire.interceptor.policy = policy(tap=True, nonce_prefix="0123456789abcdef")
    wire.send(CHAT, chat())
    named = "0123456789abcdef-nonce"
    assert fake.requests[-1]["vllm_xargs"] == {"hemostat_tap": named}, "the engine tells the middleware that asked"
    assert [capture.nonce for capture in wire.captures] == ["nonce", "nonce", named]
