"""`/v1/responses` and `/v1/messages` of a real vLLM with the plugin: bytes, tokens, clients, and what the fake says."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import httpx
import httpx2
import numpy as np
import openai as openai_sdk
import pytest
from tests.support.fake_vllm import FakeVllm, serving
from tests.support.merged_stream import merged
from tests.support.running_vllm import answers_of, wait_until_signed_answers_are_recorded
from tests.support.wire import ThroughWire, Wire, httpx2_transport, policy, rows

from hemostat.openai.routes import CHAT, MESSAGES, RESPONSES
from hemostat.scoring.intake import captures_from_tap

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = {
    RESPONSES: [{"type": "function", "name": "get_weather", "parameters": PARAMETERS}],
    MESSAGES: [{"name": "get_weather", "input_schema": PARAMETERS}],
}
BOTH = pytest.mark.parametrize("path", [RESPONSES, MESSAGES])
STREAMS = pytest.mark.parametrize("stream", [False, True])
_VARYING = re.compile(rb'"(?:id|item_id)":\s*"[^"]*"|"created(?:_at)?":\s*[0-9.]+')


class Nonces:
    def __init__(self) -> None:
        self.last = ""

    def __call__(self) -> str:
        self.last = f"form-{time.monotonic_ns()}"
        return self.last


@pytest.fixture(autouse=True, scope="module")
def recorded(vllm_server: Any) -> None:
    wait_until_signed_answers_are_recorded(vllm_server)


@pytest.fixture
def wire(vllm_server: Any) -> Iterator[Wire]:
    with httpx.Client(base_url=vllm_server.url, timeout=280) as client:
        yield Wire(client, nonce=Nonces())


def ask(server: Any, path: str, **more: Any) -> dict[str, Any]:
    given = [{"role": "user", "content": "Name three colours."}]
    name, limit = ("input", "max_output_tokens") if path == RESPONSES else ("messages", "max_tokens")
    return {"model": server.model, name: given, limit: 9, "temperature": 0} | more


def without_varying(body: bytes) -> bytes:
    return _VARYING.sub(b'"varies"', body)


FEATURES: dict[str, dict[str, Any]] = {"plain": {}, "sampled": {"temperature": 0.8}, "tools": {"tools": TOOLS}}


@pytest.mark.parametrize(
    "feature", ["plain", *(pytest.param(name, marks=pytest.mark.slow) for name in FEATURES if name != "plain")]
)
@STREAMS
@BOTH
def test_the_response_is_the_same_and_the_tokens_are_those_of_the_chat(
    wire: Wire, vllm_server: Any, path: str, stream: bool, feature: str
) -> None:
    more = dict(FEATURES[feature]) | ({"tools": TOOLS[path]} if feature == "tools" else {})
    body = ask(vllm_server, path, stream=stream, **more)
    wire.interceptor.policy = policy(scoring=False)
    plain = wire.send(path, body)
    wire.interceptor.policy = policy(
        secret=vllm_server.admin.registry.secrets.current(vllm_server.admin.now), tap=True, tap_tokens=True
    )
    sampled = wire.send(path, body)
    assert sampled.status == plain.status == 200
    (capture,) = wire.captures
    (completed,) = captures_from_tap(capture, answers_of(vllm_server, capture.nonce), 1024)
    prompt, output, ids, _, emitted = rows(completed)
    assert capture.generated == len(output) == 9
    assert all(token in row for token, row in zip(output, ids.tolist(), strict=True))
    if feature == "sampled":
        return
    if stream:
        assert merged(sampled.body) == merged(plain.body)
    else:
        assert without_varying(sampled.body) == without_varying(plain.body)
    if feature == "plain":
        chat = {"model": vllm_server.model, "messages": body.get("messages") or body["input"], "max_tokens": 9}
        wire.interceptor.policy = policy()
        wire.send(CHAT, chat | {"temperature": 0})
        expected = rows(wire.captures[-1])
        assert (prompt, output) == expected[:2]
        np.testing.assert_allclose(emitted, expected[4], atol=1e-4)


def shape(value: Any) -> Any:
    """The members in their order, and the types of what they hold."""
    if isinstance(value, dict):
        return {name: shape(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [shape(item) for item in value[:1] if isinstance(item, dict)]
    return type(value).__name__


def shapes(data: bytes, *, stream: bool) -> dict[str, str]:
    """By type of event: the shape of its JSON, as text, so that the order counts."""
    if not stream:
        return {"": json.dumps(shape(json.loads(data)))}
    events = [line for line in data.split(b"\n\n") if line.strip()]
    result = {}
    for event in events:
        name, _, text = event.partition(b"\n")
        value = json.loads(text.removeprefix(b"data: "))
        assert name == b"event: " + value["type"].encode()
        result.setdefault(value["type"], json.dumps(shape(value)))
    return result


@STREAMS
@BOTH
def test_the_fake_writes_what_the_real_server_writes(wire: Wire, vllm_server: Any, path: str, stream: bool) -> None:
    body = ask(vllm_server, path, stream=stream)
    wire.interceptor.policy = policy(scoring=False)
    real = shapes(wire.send(path, body).body, stream=stream)
    with serving(FakeVllm(tool_parser=False, model=vllm_server.model)) as url, httpx.Client(base_url=url) as client:
        given = [{"role": "user", "content": "say: Red, green, blue."}]
        made = body | {("input" if path == RESPONSES else "messages"): given}
        fake = shapes(client.post(path, json=made).content, stream=stream)
    assert fake == real


def test_errors_are_those_of_the_routes_form(wire: Wire, vllm_server: Any) -> None:
    wire.interceptor.policy = policy(scoring=False)
    with serving(FakeVllm(model=vllm_server.model)) as url, httpx.Client(base_url=url) as client:
        for path in (RESPONSES, MESSAGES):
            body = ask(vllm_server, path) | {"model": "nope"}
            real, fake = wire.send(path, body), client.post(path, json=body)
            assert (real.status, shape(json.loads(real.body))) == (fake.status_code, shape(fake.json()))


@pytest.mark.slow
def test_the_clients_read_sampled_responses(wire: Wire, vllm_server: Any) -> None:
    """`make test` shows the same in parts: a sampled response of the real server is the unsampled one (above), the fake
    writes what the real server writes (above), and the clients read the fake's sampled responses
    (test_other_forms.py)."""
    import anthropic  # takes seconds

    wire.interceptor.policy = policy(
        secret=vllm_server.admin.registry.secrets.current(vllm_server.admin.now), tap=True, tap_tokens=True
    )
    transport = httpx.Client(transport=ThroughWire(wire))
    with openai_sdk.OpenAI(base_url="http://real/v1", api_key="x", http_client=transport, max_retries=0) as client:
        whole = client.responses.create(model=vllm_server.model, input="Hi", max_output_tokens=8, temperature=0)
        events = list(
            client.responses.create(
                model=vllm_server.model, input="Hi", max_output_tokens=8, temperature=0, stream=True
            )
        )
        text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
        assert text == whole.output_text != ""
    other = httpx2.Client(transport=httpx2_transport(wire))
    user: Any = [{"role": "user", "content": "Hi"}]
    with anthropic.Anthropic(base_url="http://real", api_key="x", http_client=other, max_retries=0) as claude:
        message = claude.messages.create(
            model=vllm_server.model, max_tokens=8, messages=user, extra_body={"temperature": 0}
        )
        with claude.messages.stream(
            model=vllm_server.model, max_tokens=8, messages=user, extra_body={"temperature": 0}
        ) as stream:
            streamed = "".join(stream.text_stream)
        assert streamed == "".join(block.text for block in message.content if block.type == "text") != ""
    assert len(wire.captures) == 4
    for capture in wire.captures:
        assert len(captures_from_tap(capture, answers_of(vllm_server, capture.nonce), 1024)) == 1
