"""Real vLLM with LoRA: what a client gets from an adapter is what the base model's name gives, byte for byte.

The adapter has no effect on the weights, so that only its name can differ. One request at a time, temperature 0.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import pytest
from tests.support.adapter_profiles import smollm_adapter
from tests.support.fake_lora import FakeLora
from tests.support.fake_vllm import FakeVllm, serving
from tests.support.running_vllm import RunningVllm
from tests.support.slow import slow_unless
from tests.support.wire import VERSION, Wire, policy

from hemostat.ipc.messages import REST_KIND, Policy
from hemostat.openai.routes import CHAT, COMPLETIONS, MODELS, loads_adapters

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, {"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 12}),
    "completions": (COMPLETIONS, {"prompt": "The capital of France is", "max_tokens": 8}),
    "completions, two choices": (COMPLETIONS, {"prompt": ["One, two,", "Three, four,"], "max_tokens": 4}),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "whole": {},
    "stream": {"stream": True},
    "stream with usage": {"stream": True, "stream_options": {"include_usage": True}},
}


@pytest.fixture(scope="module")
def client(lora_server: RunningVllm) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=lora_server.url, timeout=300) as client:
        yield client


@pytest.fixture(scope="module")
def version(lora_server: RunningVllm, client: httpx.Client) -> Iterator[str]:
    """Of an adapter that the admin port has, and that changes nothing."""
    profile = smollm_adapter(4, 1, strength=0.0)
    lora_server.admin.files[profile.version] = profile.to_bytes()
    yield profile.version
    client.post("/v1/unload_lora_adapter", json={"lora_name": profile.version})
    lora_server.admin.files.pop(profile.version)


@pytest.fixture
def wire(client: httpx.Client) -> Wire:
    return Wire(client)


def served(version: str, model: str, **more: Any) -> Policy:
    names = frozenset({model})
    return policy(
        mode="auto",
        control_fraction=0.0,
        serving_by_kind={REST_KIND: version},
        acknowledged=frozenset({version}),
        adapters=frozenset({version}),
        base_models=names,
        answered_name=model,
        default_model=model,
        scorable_models=names,
        calibrated_models=names,
        adapter_names=True,
        treat_unjudged=True,
        **more,
    )


def normal(body: bytes) -> bytes:
    """Without the time, and with the choices' events in order: which row of a step comes first is by chance."""
    events = re.sub(rb'"created":\d+', b'"created":0', body).split(b"\n\n")
    index = [re.search(rb'"index":(\d+)', event) for event in events]
    keys = [int(match[1]) if match else len(events) for match in index]
    return b"\n\n".join(events[n] for n in sorted(range(len(events)), key=keys.__getitem__))


def events_added_up(body: bytes) -> Any:
    """The body; of a stream, what does not depend on how many tokens share an event, which is chance."""
    if not body.startswith(b"data:"):
        return normal(body)
    events = [json.loads(e.removeprefix("data: ")) for e in normal(body).decode().split("\n\n") if "{" in e]
    choices = [choice for event in events for choice in event["choices"]]
    return (
        events[0],
        "".join(choice["delta"].get("content") or "" for choice in choices),
        {choice["finish_reason"] for choice in choices},
        {event["model"] for event in events},
        events[-1].get("usage"),
    )


@pytest.mark.parametrize(("named", "rate"), [(True, 0.0), (False, 1.0)])
@pytest.mark.parametrize("option", slow_unless({"whole", "stream with usage"}, tuple(OPTIONS)))
@pytest.mark.parametrize("case", CASES)
def test_a_treated_answer_is_byte_for_byte_the_base_model_s(
    wire: Wire, lora_server: RunningVllm, version: str, case: str, option: str, named: bool, rate: float
) -> None:
    path, asked = CASES[case]
    model = {"model": lora_server.model} if named else {}
    body = {**model, "temperature": 0, **asked, **OPTIONS[option]}
    for _ in range(4):
        wire.interceptor.policy = policy(scoring=False)
        plain = wire.send(path, body)
        wire.interceptor.policy = served(version, lora_server.model, shadow_rate=rate)
        treated = wire.send(path, body, splits=random.Random(1))
        if normal(treated.body) == normal(plain.body):
            break
        # On a busy machine vLLM's front end now and then puts two steps into one event.
    assert plain.status == treated.status == 200, plain.body
    assert json.loads(treated.sent)["model"] == version
    assert normal(treated.body) == normal(plain.body)
    assert set(wire.arms) == {"treated"}
    for capture in wire.captures:
        assert (capture.adapter, capture.model) == (version, lora_server.model)
    assert bool(wire.captures) == (rate == 1.0)


@pytest.mark.parametrize(
    "asked",
    [
        {"messages": [{"role": "user", "content": "Hi"}], "temperature": -1},
        {"messages": []},
        {"messages": [{"role": "user", "content": "Hi " * 3000}]},
    ],
)
@pytest.mark.parametrize("replays", [True, False])
def test_errors_are_those_of_the_base_model(
    wire: Wire, lora_server: RunningVllm, version: str, asked: dict[str, Any], replays: bool
) -> None:
    body = {"model": lora_server.model, **asked}
    wire.interceptor.policy = policy(scoring=False)
    plain = wire.send(CHAT, body)
    wire.replays = replays
    wire.interceptor.policy = served(version, lora_server.model, shadow_rate=0.0)
    treated = wire.send(CHAT, body)
    assert (treated.status, treated.body) == (plain.status, plain.body)
    assert plain.status == 400
    # What Hemostat itself sees to be invalid is not treated.
    assert json.loads(treated.sent)["model"] == (version if asked["messages"] else lora_server.model)


@pytest.mark.parametrize("option", OPTIONS)
def test_an_unknown_version_is_the_client_s_own_request(wire: Wire, lora_server: RunningVllm, option: str) -> None:
    path, asked = CASES["chat"]
    body = {"model": lora_server.model, "temperature": 0, **asked, **OPTIONS[option]}
    wire.interceptor.policy = policy(scoring=False)
    plain = wire.send(path, body)
    wire.interceptor.policy = served(VERSION, lora_server.model)
    answer = wire.send(path, body)
    assert answer.replayed
    assert (answer.status, events_added_up(answer.body)) == (200, events_added_up(plain.body))
    assert wire.calibration("none", "refused") == wire.shadow("skipped", "adapter_refused") == 1
    # Where it is too late to send it again, the client sees the base model's name.
    wire.replays = False
    refused = wire.send(path, body)
    assert refused.status == 404
    assert VERSION not in refused.body.decode()


def test_the_list_of_models_and_the_fake_server_s(
    wire: Wire, client: httpx.Client, lora_server: RunningVllm, version: str
) -> None:
    client.post(COMPLETIONS, json={"model": version, "prompt": "a", "max_tokens": 1}).raise_for_status()
    full = client.get(MODELS).json()["data"]
    assert [card["id"] for card in full] == [lora_server.model, version]
    wire.interceptor.policy = served(version, lora_server.model)
    seen = json.loads(wire.send(MODELS, b"", method="GET").body)
    assert [card["id"] for card in seen["data"]] == [lora_server.model]
    lora = FakeLora(resolves={version: 4})
    with serving(FakeVllm(model=lora_server.model, lora=lora)) as url, httpx.Client(base_url=url) as other:
        asked = {"prompt": "a", "max_tokens": 1}
        for name, status in ((version, 200), (VERSION, 404), (None, 200)):
            real, fake = (connection.post(COMPLETIONS, json=asked | {"model": name}) for connection in (client, other))
            assert real.status_code == fake.status_code == status
            if status == 200:
                assert real.json()["model"] == fake.json()["model"] == (name or lora_server.model)
            else:
                assert real.content == fake.content


def test_no_other_route_of_vllm_loads_adapters(client: httpx.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/v1/load_lora_adapter", "/v1/unload_lora_adapter"} <= {p for p in paths if loads_adapters(p.encode())}
    assert not [path for path in paths if not loads_adapters(path.encode()) and re.search("lora|adapter", path)]
    for method, path in (("POST", "/adapters"), ("DELETE", "/adapters/nobody")):
        # SageMaker's names for the two are not in the list, but are served.
        assert client.request(method, path, json={"name": "nobody", "src": "/nowhere"}).status_code != 405
        assert loads_adapters(path.encode())


def test_a_name_that_is_empty_or_null_is_the_base_model_s(wire: Wire, lora_server: RunningVllm, version: str) -> None:
    for name in ("", None):
        body = msgspec.json.encode({"model": name, "prompt": "The capital", "max_tokens": 3, "temperature": 0})
        wire.interceptor.policy = policy(scoring=False)
        plain = wire.send(COMPLETIONS, body)
        assert plain.status == 200
        wire.interceptor.policy = served(version, lora_server.model, shadow_rate=0.0)
        treated = wire.send(COMPLETIONS, body)
        assert json.loads(treated.sent)["model"] == version
        assert normal(treated.body) == normal(plain.body)
