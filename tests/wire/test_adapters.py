"""Requests that an adapter answers: what goes upstream, and that clients get what the base model's name gives."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import pytest
from tests.support.fake_lora import FakeLora
from tests.support.fake_vllm import FakeVllm, serving
from tests.support.wire import OTHER_VERSION, VERSION, Answer, Wire, policy

from hemostat.interception.intercepted_exchange import InterceptedExchange
from hemostat.ipc.messages import REST_KIND, Policy
from hemostat.openai.routes import CHAT, COMPLETIONS

NAMES = frozenset({"fake", "alias"})


@pytest.fixture
def fake() -> FakeVllm:
    """An adapter without an effect, so that only its name can tell its answers from the base model's."""
    lora = FakeLora(resolves={VERSION: 16}, strength=0.0)
    return FakeVllm(seed=5, aliases=("alias",), adapters=("sql",), lora=lora)


@pytest.fixture
def wire(fake: FakeVllm) -> Iterator[Wire]:
    with serving(fake) as url, httpx.Client(base_url=url, timeout=20) as client:
        yield Wire(client)


def served(*, version: str = VERSION, **more: Any) -> Policy:
    """The adapter serves all traffic."""
    values: dict[str, Any] = {
        "mode": "auto",
        "control_fraction": 0.0,
        "serving_by_kind": {REST_KIND: version},
        "acknowledged": frozenset({version}),
        "adapters": frozenset({version}),
        "base_models": NAMES,
        "answered_name": "fake",
        "default_model": "fake",
        "scorable_models": NAMES,
        "calibrated_models": NAMES,
        "adapter_names": True,
    }
    return policy(**(values | more))


def ask(path: str = CHAT, text: str = "Hello", **more: Any) -> dict[str, Any]:
    prompt = {"messages": [{"role": "user", "content": text}]} if path == CHAT else {"prompt": text}
    return {"model": "fake"} | prompt | {"max_tokens": 12, "temperature": 0} | more


def sent(answer: Answer) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(answer.sent)
    return body


FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "an alias": {"model": "alias"},
    "no name": {"model": None},
    "an empty name": {"model": ""},
    "usage": {"stream_options": {"include_usage": True}},
    "the version in the text": {"say": f'{VERSION} "model":"{VERSION}" {{"model": "{VERSION}"}}', "max_tokens": 150},
    "only the version": {"say": VERSION, "max_tokens": 40},
    "unicode": {"say": "Zażółć 日本語 🎉☃!", "max_tokens": 60},
    "a tool call": {
        "say": f'<tool_call>\n{{"name": "f", "arguments": {{"model": "{VERSION}"}}}}\n</tool_call>',
        "max_tokens": 150,
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    },
}


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("rate", [0.0, 1.0])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_treated_answer_is_byte_for_byte_the_base_model_s(
    wire: Wire, fake: FakeVllm, path: str, stream: bool, rate: float, feature: str
) -> None:
    asked = dict(FEATURES[feature])
    say = asked.pop("say", None)
    body = ask(path, "Hello" if say is None else f"say: {say}", **asked)
    if path == COMPLETIONS:
        body.pop("tools", None)
    if body["model"] is None and rate:
        del body["model"]
    if stream:
        body["stream"] = True
    else:
        body.pop("stream_options", None)
    wire.interceptor.policy = policy(scoring=False)
    plain = wire.send(path, body)
    assert VERSION not in plain.body.decode() or "version" in feature or "tool" in feature
    wire.interceptor.policy = served(shadow_rate=rate)
    for seed in range(3):
        treated = wire.send(path, body, splits=random.Random(seed) if seed else None)
        assert treated.body == plain.body
        assert treated.status == plain.status == 200
        assert sent(treated)["model"] == VERSION
        assert "vllm_xargs" not in sent(treated)
        assert fake.headers[-1].get(b"accept-encoding") != b"gzip"
    assert wire.calibration("treated", "assigned") == 3
    assert wire.arms == 3 * ["treated"]
    assert [(capture.model, capture.adapter, capture.requested) for capture in wire.captures] == (3 if rate else 0) * [
        ("fake", VERSION, VERSION)
    ]


def test_only_the_named_members_of_the_request_change(wire: Wire) -> None:
    wire.interceptor.policy = served(shadow_rate=0.0)
    body = b'{ "messages" : [{"role":"user","content":"Gr\\u00fc\xc3\x9fe"}], "model":"fake" ,"max_tokens": 2e0 }'
    assert wire.send(CHAT, body).sent == body.replace(b'"fake"', b'"%b"' % VERSION.encode())
    body = b'{"prompt":"a","max_tokens":1 }'
    assert wire.send(COMPLETIONS, body).sent == body[:-2] + b',"model":"%b" }' % VERSION.encode()


@pytest.mark.parametrize("how", ["serving", "pinned"])
def test_a_client_s_own_adapter_is_never_replaced(wire: Wire, how: str) -> None:
    names = NAMES | {"sql"}
    wire.interceptor.policy = served(scorable_models=names, calibrated_models=names, shadow_rate=0.0)
    headers = {"X-Hemostat-Calibration": VERSION} if how == "pinned" else None
    answer = wire.send(CHAT, ask(model="sql"), headers=headers)
    assert sent(answer)["model"] == json.loads(answer.body)["model"] == "sql"
    assert wire.calibration("none", "own_adapter") == 1
    assert wire.arms == ["none"]


@pytest.mark.parametrize("names", [None, frozenset[str]()])
def test_no_adapter_before_the_base_model_is_known(wire: Wire, names: frozenset[str] | None) -> None:
    wire.interceptor.policy = served(base_models=names)
    assert sent(wire.send(CHAT, ask()))["model"] == "fake"
    assert wire.calibration("none", "own_adapter") == 1


@pytest.mark.parametrize("how", ["serving", "pinned"])
def test_a_version_that_not_every_engine_has_is_not_asked_for(wire: Wire, how: str) -> None:
    wire.interceptor.policy = served(acknowledged=frozenset())
    headers = {"X-Hemostat-Calibration": VERSION} if how == "pinned" else None
    assert sent(wire.send(CHAT, ask(), headers=headers))["model"] == "fake"
    assert wire.calibration("none", "unknown") == 1


def test_an_adapter_that_a_client_names(wire: Wire) -> None:
    wire.interceptor.policy = served(serving_by_kind={})
    answer = wire.send(CHAT, ask(), headers={"X-Hemostat-Calibration": VERSION})
    assert sent(answer)["model"] == VERSION
    assert json.loads(answer.body)["model"] == "fake"
    assert wire.calibration("none", "pinned") == 1
    assert (wire.captures[0].adapter, wire.captures[0].arm) == (VERSION, "none")


def test_the_control_arm_is_the_base_model(wire: Wire) -> None:
    wire.interceptor.policy = served(control_fraction=1.0)
    answer = wire.send(CHAT, ask())
    assert sent(answer)["model"] == json.loads(answer.body)["model"] == "fake"
    [capture] = wire.captures
    assert (capture.arm, capture.adapter, capture.requested) == ("control", None, None)


def test_a_name_of_the_wrong_type_is_left_to_vllm(wire: Wire) -> None:
    wire.interceptor.policy = served()
    assert sent(wire.send(CHAT, ask(model=5)))["model"] == 5
    assert wire.calibration("none", "invalid") == 1


@pytest.mark.parametrize("scorable", [NAMES, None])
def test_a_client_that_names_a_version_gets_it_and_is_in_no_arm(wire: Wire, scorable: frozenset[str] | None) -> None:
    wire.interceptor.policy = served(scorable_models=scorable, calibrated_models=scorable)
    body = msgspec.json.encode(ask(model=VERSION))
    answer = wire.send(CHAT, body)
    assert answer.sent == body
    assert json.loads(answer.body)["model"] == VERSION
    assert wire.calibration("none", "lora") == wire.shadow("skipped", "lora") == 1
    assert not wire.captures


@pytest.mark.parametrize("rate", [0.0, 1.0])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("failure", ["unknown", "rank"])
def test_an_adapter_that_the_engine_does_not_have_is_the_client_s_own_request(
    wire: Wire, fake: FakeVllm, stream: bool, rate: float, failure: str
) -> None:
    assert fake.lora is not None
    if failure == "unknown":
        fake.lora.resolves.clear()
    else:
        fake.lora.max_rank = 8
    body = ask(stream=stream)
    wire.interceptor.policy = policy(scoring=False)
    plain = wire.send(CHAT, body)
    wire.interceptor.policy = served(shadow_rate=rate)
    answer = wire.send(CHAT, body)
    assert answer.replayed
    assert (answer.status, answer.body) == (200, plain.body)
    assert wire.arms == ["none"]
    assert wire.calibration("none", "refused") == 1
    assert not wire.captures
    if rate:
        assert wire.shadow("skipped", "adapter_refused") == 1
        # Nothing is known about logprobs: sampling goes on.
        wire.interceptor.policy = served(control_fraction=1.0)
        wire.send(CHAT, body)
        assert wire.shadow("shadowed") == 1


@pytest.mark.parametrize("stream", [False, True])
def test_refused_logprobs_are_not_taken_for_a_refused_adapter(wire: Wire, fake: FakeVllm, stream: bool) -> None:
    fake.max_logprobs = 4
    wire.interceptor.policy = served()
    assert wire.send(CHAT, ask(stream=stream)).status == 200
    assert wire.calibration("none", "refused") == wire.shadow("skipped", "logprobs_refused") == 1


def test_an_unknown_route_or_model_without_an_adapter_is_not_sent_twice(wire: Wire) -> None:
    wire.interceptor.policy = policy()
    answer = wire.send(CHAT, ask(model="nobody"))
    assert (answer.status, answer.replayed) == (404, False)


@pytest.mark.parametrize("replays", [False, True])
def test_an_error_names_the_base_model(wire: Wire, fake: FakeVllm, replays: bool) -> None:
    assert fake.lora is not None
    wire.interceptor.policy = served(shadow_rate=0.0)
    wire.replays = replays
    fake.lora.broken.add(VERSION)
    fake.status = 500 if replays else None
    fake.lora.resolves.clear()
    answer = wire.send(CHAT, ask())
    assert answer.status == (500 if replays else 404)
    assert VERSION not in answer.body.decode()
    assert replays or b"The model `fake` does not exist" in answer.body


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_an_answer_of_another_model_is_in_no_arm(wire: Wire, fake: FakeVllm, stream: bool, rate: float) -> None:
    """As with VLLM_SKIP_MODEL_NAME_VALIDATION: the base model answers for every name."""
    fake.aliases = ("alias", VERSION)
    wire.interceptor.policy = served(shadow_rate=rate)
    answer = wire.send(CHAT, ask(stream=stream))
    assert sent(answer)["model"] == VERSION
    assert b'"fake"' in answer.body
    assert wire.arms == ["none"]
    assert wire.calibration("none", "not_applied") == 1
    for capture in wire.captures:
        assert (capture.model, capture.adapter, capture.requested, capture.arm) == ("fake", None, VERSION, "none")
    assert len(wire.captures) == rate


def test_a_compressed_answer_passes_as_it_is(wire: Wire) -> None:
    wire.interceptor.policy = served(shadow_rate=0.0)
    exchange = wire.interceptor.begin("POST", CHAT.encode(), [], "r")
    assert isinstance(exchange, InterceptedExchange)
    assert exchange.request(msgspec.json.encode(ask())) is not None
    assert not exchange.response_head(200, b"", b"gzip")


def test_the_list_of_models_hides_versions_only_where_adapters_are_used(wire: Wire, fake: FakeVllm) -> None:
    assert fake.lora is not None
    fake.lora.names = {VERSION: "/v", OTHER_VERSION: "/o"}
    for adapter_names, hidden in ((True, []), (False, [VERSION, OTHER_VERSION])):
        wire.interceptor.policy = served(adapter_names=adapter_names)
        answer = wire.send("/v1/models?x=1", b"", method="GET")
        assert [card["id"] for card in json.loads(answer.body)["data"]] == ["fake", "alias", "sql", *hidden]
        assert wire.send("/v1/models/x", b"", method="GET").status == 404
