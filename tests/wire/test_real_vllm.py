"""Real vLLM: a sampled response is the unsampled one byte for byte, and the fake engine has the real one's shape.

One request at a time, no prefix cache, temperature 0, so that the same request gives the same text.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any, Protocol

import httpx
import msgspec
import numpy as np
import pytest
from tests.support.fake_vllm import FakeVllm, serving
from tests.support.merged_stream import bytes_of_events, joined
from tests.support.slow import slow_unless
from tests.support.wire import VERSION, Wire, normal, policy, rows, user

from hemostat.openai.routes import CHAT, COMPLETIONS

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


def test_vllm_writes_nan_as_null_in_a_stream() -> None:
    """So it does not end the client's stream: `test_refusals.py` tests what becomes of such a stream."""
    protocol = pytest.importorskip("vllm.entrypoints.openai.chat_completion.protocol")
    entry = protocol.ChatCompletionLogProbsContent(token="token_id:5", logprob=max(float("nan"), -9999.0))
    choice = protocol.ChatCompletionResponseStreamChoice(
        index=0, delta={"content": "x"}, logprobs=protocol.ChatCompletionLogProbs(content=[entry])
    )
    chunk = protocol.ChatCompletionStreamResponse(model="m", choices=[choice])
    written = json.loads(chunk.model_dump_json(exclude_unset=True))
    assert written["choices"][0]["logprobs"] == {"content": [{"token": "token_id:5", "logprob": None}]}


class Server(Protocol):
    url: str
    model: str


@pytest.fixture(scope="module")
def client(vllm_server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=vllm_server.url, timeout=300) as client:
        yield client


@pytest.fixture
def wire(client: httpx.Client) -> Wire:
    return Wire(client)


def call(city: str) -> str:
    return f'<tool_call>\n{{"name": "get_weather", "arguments": {{"city": "{city}"}}}}\n</tool_call>'


PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}]
EXAMPLES = [
    message
    for city in ("Paris", "Rome", "Oslo", "Lima", "Cairo")
    for message in (user(f"Weather in {city}?"), {"role": "assistant", "content": call(city)})
]

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, {"messages": [user("What is the capital of France?")], "max_tokens": 16}),
    "chat, one token": (CHAT, {"messages": [user("What is the capital of France?")], "max_tokens": 1}),
    "chat, to the end": (CHAT, {"messages": [user("Say hello.")], "max_tokens": 120}),
    "chat, stop string": (CHAT, {"messages": [user("Count from 1 to 10.")], "max_tokens": 40, "stop": ["5", "five"]}),
    "chat, unicode": (CHAT, {"messages": [user("Repeat: 🎉🌍 日本語 été ☃")], "max_tokens": 32}),
    "chat, parts": (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "max_tokens": 8},
    ),
    "chat, a tool call": (CHAT, {"messages": [*EXAMPLES, user("Weather in Tokyo?")], "max_tokens": 64, "tools": TOOLS}),
    "chat, tools not called": (CHAT, {"messages": [user("What is 1 + 1?")], "max_tokens": 24, "tools": TOOLS}),
    "chat, own xargs": (CHAT, {"messages": [user("Hi")], "max_tokens": 6, "vllm_xargs": {"mine": [1, 2]}}),
    "completions": (COMPLETIONS, {"prompt": "The capital of France is", "max_tokens": 16}),
    "completions, ids": (COMPLETIONS, {"prompt": [504, 3575, 282, 4649, 314], "max_tokens": 4}),
    "completions, stop string": (COMPLETIONS, {"prompt": "1, 2, 3, 4,", "max_tokens": 24, "stop": "7"}),
    "completions, default length": (COMPLETIONS, {"prompt": "Once upon a time"}),
}
EACH_OPTION = ("chat, one token", "completions")
OPTIONS: dict[str, dict[str, Any]] = {
    "whole": {},
    "stream": {"stream": True},
    "stream with usage": {"stream": True, "stream_options": {"include_usage": True}},
    "stream with continuous usage": {
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    },
    "stream, options without effect": {"stream": True, "stream_options": {"continuous_usage_stats": True}},
}


def same_bytes(body: bytes, other: bytes) -> bool:
    """Returns whether they are equal; for a stream, also whether they add up to the same and their events have the same
    bytes around the texts: on a busy machine vLLM's front end puts two steps into one event."""
    if normal(body) == normal(other):
        return True
    if not (body.startswith(b"data:") and other.startswith(b"data:")):
        return False
    return joined(body) == joined(other) and bytes_of_events(body) == bytes_of_events(other)


def stream_of(*texts: str, space: str = "") -> bytes:
    events = [f'data: {{"choices":[{{"index":0,"delta":{{"content":{space}"{text}"}}}}]}}\n\n' for text in texts]
    return "".join([*events, "data: [DONE]\n\n"]).encode()


def test_streams_that_differ_by_more_than_which_tokens_share_an_event_are_not_the_same() -> None:
    assert same_bytes(stream_of("a", "b", "c"), stream_of("ab", "c"))
    assert not same_bytes(stream_of("a", "b", "c"), stream_of("ab", "d"))
    assert not same_bytes(stream_of("a", "b", "c"), stream_of("ab", "c", space=" "))


@pytest.mark.parametrize(
    ("case", "option"),
    [
        pytest.param(case, option, marks=() if option == "stream" or case in EACH_OPTION else pytest.mark.slow)
        for case in CASES
        for option in OPTIONS
    ],
)
def test_a_sampled_response_is_byte_for_byte_the_unsampled_one(
    wire: Wire, vllm_server: Server, case: str, option: str
) -> None:
    path, body = CASES[case]
    body = {"model": vllm_server.model, "temperature": 0, **body, **OPTIONS[option]}
    for _ in range(4):
        wire.interceptor.policy = policy(scoring=False)
        plain = wire.send(path, body)
        wire.interceptor.policy = policy(shadow_top_k=20, tap=True)
        sampled = wire.send(path, body, splits=random.Random(1))
        if same_bytes(sampled.body, plain.body):
            break
    assert plain.status == sampled.status == 200, plain.body
    if not same_bytes(sampled.body, plain.body):
        assert normal(sampled.body) == normal(plain.body)
    assert not [labels for labels in wire.counts if labels[1] != "shadowed"]
    if case == "chat, a tool call":
        assert b'"tool_calls"' in plain.body
    prompt, output, ids, logprobs, emitted = rows(wire.captures[-1])
    for token, row, values, own in zip(output, ids, logprobs, emitted, strict=True):
        assert len(set(row[row >= 0].tolist())) == np.sum(row >= 0) >= 20
        assert values[row == token] == own
        assert np.exp(values.astype(float)).sum() <= 1 + 1e-4
    assert prompt[:5] == [504, 3575, 282, 4649, 314] or "capital of France is" not in str(body.get("prompt"))


NAMED_TOOL = {"type": "function", "function": {"name": "get_weather"}}
UNJUDGED: dict[str, tuple[str, str, dict[str, Any]]] = {
    # Reason, path, body.
    "a JSON object": (
        "grammar",
        CHAT,
        {"messages": [user("Give me a city as JSON.")], "response_format": {"type": "json_object"}, "max_tokens": 40},
    ),
    "a schema": (
        "grammar",
        CHAT,
        {
            "messages": [user("Weather in Paris?")],
            "response_format": {"type": "json_schema", "json_schema": {"name": "city", "schema": PARAMETERS}},
            "max_tokens": 40,
        },
    ),
    "a choice": (
        "grammar",
        COMPLETIONS,
        {"prompt": "Yes or no?", "structured_outputs": {"choice": ["yes", "no"]}, "max_tokens": 4},
    ),
    "a forced tool": (
        "grammar",
        CHAT,
        {"messages": [user("Weather in Paris?")], "tools": TOOLS, "tool_choice": NAMED_TOOL, "max_tokens": 40},
    ),
    "many choices": (
        "n",
        CHAT,
        {"messages": [user("Say hello.")], "n": 17, "max_tokens": 2, "temperature": 1, "seed": 3},
    ),
    "own logprobs of a chat": (
        "client_logprobs",
        CHAT,
        {"messages": [user("Say hello.")], "logprobs": True, "top_logprobs": 3, "max_tokens": 8},
    ),
    "own logprobs": ("client_logprobs", COMPLETIONS, {"prompt": "1, 2, 3,", "logprobs": 2, "max_tokens": 8}),
    "an echo": ("echo", COMPLETIONS, {"prompt": "1, 2, 3,", "echo": True, "max_tokens": 8}),
}


@pytest.mark.parametrize(
    ("case", "stream"),
    # Every case, with a fake: test_skipped.py.
    slow_unless({("a schema", True), ("many choices", True)}, [(case, s) for case in UNJUDGED for s in (False, True)]),
)
def test_what_cannot_be_scored_is_not_changed_while_a_profile_serves(
    wire: Wire, vllm_server: Server, case: str, stream: bool
) -> None:
    reason, path, body = UNJUDGED[case]
    body = {"model": vllm_server.model, "temperature": 0, "stream": stream} | body
    wire.interceptor.policy = policy(scoring=False)
    plain = wire.send(path, body)
    wire.interceptor.policy = policy(served=VERSION, control_fraction=0.0, tap=True)
    beside = wire.send(path, body)
    assert beside.sent == plain.sent == msgspec.json.encode(body)
    assert beside.status == plain.status == 200, plain.body
    assert shapes(beside.body) == shapes(plain.body)
    assert wire.shadow("skipped", reason) == wire.calibration("none", reason) == 1
    assert wire.counts.total() == 2
    wire.interceptor.policy = policy(served=VERSION, control_fraction=0.0, treat_unjudged=True)
    treated = wire.send(path, body)
    assert treated.status == 200
    if reason == "grammar":
        # Of a kind that only a profile of its own could treat.
        assert treated.sent == plain.sent
        assert wire.calibration("none", "no_profile") == 1
        return
    assert json.loads(treated.sent)["vllm_xargs"] == {"hemostat": VERSION}
    assert wire.calibration("treated", "assigned") == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": [user("Hi")], "temperature": -1}),
        (CHAT, {"messages": [user("Hi")], "temperature": 0, "n": 2}),
        (CHAT, {"messages": [user("Hi")], "n": 0}),
        (CHAT, {"messages": [user("Hi")], "max_tokens": "x"}),
        (CHAT, {"messages": [user("Hi " * 3000)]}),
        (CHAT, {"messages": [user("Hi")], "tools": []}),
        (CHAT, {"messages": [user("Hi")], "model": "nope"}),
        (CHAT, {"messages": "Hi"}),
        (CHAT, {}),
        (COMPLETIONS, {}),
        (COMPLETIONS, {"prompt": "Hi", "max_tokens": 100_000}),
        (COMPLETIONS, {"prompt": "Hi", "top_p": 7}),
        (COMPLETIONS, {"prompt": "Hi", "stream_options": 3}),
    ],
)
def test_sampling_does_not_change_errors(
    wire: Wire, vllm_server: Server, path: str, body: dict[str, Any], stream: bool
) -> None:
    body = {"model": vllm_server.model, "stream": stream} | body
    wire.interceptor.policy = policy(scoring=False)
    plain = wire.send(path, body)
    wire.interceptor.policy = policy()
    sampled = wire.send(path, body)
    assert plain.status == sampled.status >= 400
    assert sampled.body == plain.body


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_refused_logprobs_cause_no_error_for_the_client(
    wire: Wire, vllm_server: Server, path: str, stream: bool
) -> None:
    asked = {"messages": [user("What is the capital of France?")]} if path == CHAT else {"prompt": "1, 2, 3,"}
    body = {"model": vllm_server.model, "temperature": 0, "max_tokens": 1, "stream": stream} | asked
    wire.interceptor.policy = policy(scoring=False)
    plain = wire.send(path, body)
    wire.interceptor.policy = policy(shadow_top_k=1000)
    sampled = wire.send(path, body)
    assert sampled.replayed
    assert plain.status == sampled.status == 200, plain.body
    assert normal(sampled.body) == normal(plain.body)
    assert wire.shadow("skipped", "logprobs_refused") == wire.repeated("refused") == 1
    assert wire.counts.total() == 2


def test_captured_logprobs_belong_to_their_tokens(wire: Wire, vllm_server: Server) -> None:
    """The server's own prefill of the same tokens agrees, to within the noise of another batch shape."""
    wire.send(
        CHAT, {"model": vllm_server.model, "messages": [user("Tell me a story.")], "max_tokens": 24, "temperature": 1}
    )
    prompt, output, _, _, emitted = rows(wire.captures[0])
    again = wire.client.post(
        COMPLETIONS,
        json={"model": vllm_server.model, "prompt": prompt + output, "max_tokens": 1, "prompt_logprobs": 1},
    ).json()
    scored = again["choices"][0]["prompt_logprobs"][len(prompt) :]
    truth = [row[str(token)]["logprob"] for row, token in zip(scored, output, strict=True)]
    assert np.max(np.abs(np.array(truth) - emitted)) < 0.5
    assert np.mean(np.abs(np.array(truth) - emitted)) < 0.1


# --- the fake engine -------------------------------------------------------------------------------------------------


def shape(values: list[Any]) -> Any:
    """The types of values that stand in one place; of objects, their keys in the order of their first coming and what
    is in each; of lists, what is in their items."""
    result: dict[str, Any] = {"types": sorted({type(value).__name__ for value in values})}
    keys: dict[str, list[Any]] = {}
    for value in values:
        if isinstance(value, dict):
            as_ids = value and all(key.isdigit() or key.startswith("token_id:") for key in value)
            for key, inner in value.items():
                keys.setdefault("N" if as_ids else key, []).append(inner)
    if keys:
        result["keys"] = {key: shape(inner) for key, inner in keys.items()}
    items = [item for value in values if isinstance(value, list) for item in value]
    if items:
        result["items"] = shape(items)
    return result


def shapes(body: bytes) -> str:
    """The shape of a response, or of all events of a stream together: how many tokens share an event, and which choice
    comes first, is chance."""
    if not body.startswith(b"data:"):
        return json.dumps(shape([json.loads(body)]))
    events = [event.removeprefix(b"data: ") for event in body.split(b"\n\n") if event]
    last = events.pop() if events[-1] == b"[DONE]" else b""
    return json.dumps(shape([json.loads(event) for event in events])) + last.decode()


INJECTED = {"return_token_ids": True, "return_tokens_as_token_ids": True}
FAKE_CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    # Path, body, and the body for the fake where the words must be put into its mouth.
    "chat": (CHAT, {"messages": [user("Hi")], "max_tokens": 4}, None),
    "chat, asked for all": (
        CHAT,
        {"messages": [user("Hi")], "max_tokens": 4, "logprobs": True, "top_logprobs": 3, **INJECTED},
        None,
    ),
    "completions": (COMPLETIONS, {"prompt": "Hello there", "max_tokens": 4}, None),
    "completions, asked for all": (
        COMPLETIONS,
        {"prompt": "Hello there", "max_tokens": 4, "logprobs": 3, **INJECTED},
        None,
    ),
    "chat, two choices": (
        CHAT,
        {"messages": [user("Hi")], "max_tokens": 4, "n": 2, "temperature": 1, **INJECTED},
        None,
    ),
    "two greedy choices": (CHAT, {"messages": [user("Hi")], "max_tokens": 4, "n": 2}, None),
    "chat, own logprobs": (
        CHAT,
        {"messages": [user("Hi")], "max_tokens": 4, "logprobs": True, "top_logprobs": 2},
        None,
    ),
    "completions, two prompts": (COMPLETIONS, {"prompt": ["Hello there", "Hi"], "max_tokens": 4, **INJECTED}, None),
    "a tool call": (
        CHAT,
        {"messages": [*EXAMPLES, user("Weather in Tokyo?")], "max_tokens": 64, "tools": TOOLS},
        {"messages": [user("say: " + call("Tokyo"))], "max_tokens": 120, "tools": TOOLS},
    ),
    "no such model": (CHAT, {"messages": [user("Hi")], "model": "nope"}, None),
    "negative temperature": (CHAT, {"messages": [user("Hi")], "temperature": -1}, None),
    "no messages": (CHAT, {}, None),
    "too many logprobs": (COMPLETIONS, {"prompt": "Hi", "logprobs": 100}, None),
    "too long": (CHAT, {"messages": [user("Hi " * 3000)]}, None),
}


@pytest.mark.parametrize(
    ("case", "option"),
    [
        pytest.param(case, option, marks=() if option in {"whole", "stream"} else pytest.mark.slow)
        for case in FAKE_CASES
        for option in OPTIONS
    ],
)
def test_the_fake_engines_responses_have_the_real_shape(
    client: httpx.Client, vllm_server: Server, case: str, option: str
) -> None:
    path, body, said = FAKE_CASES[case]
    with serving(FakeVllm(model=vllm_server.model)) as url, httpx.Client(base_url=url, timeout=20) as other:
        common = {"model": vllm_server.model, "temperature": 0, **OPTIONS[option]}
        real = client.post(path, json=common | body)
        fake = other.post(path, json=common | (said or body))
    assert fake.status_code == real.status_code
    assert shapes(fake.content) == shapes(real.content)
    if b'"error"' in real.content:
        assert fake.content == real.content


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/version", None),
        ("POST", "/tokenize", {"prompt": "Hello"}),
        ("POST", "/tokenize", {"messages": [user("Hello")]}),
        ("POST", "/detokenize", {"tokens": [104, 105]}),
        ("POST", COMPLETIONS, {"prompt": [1, 2, 3, 4], "max_tokens": 1, "prompt_logprobs": 2}),
        ("GET", "/health", None),
        ("GET", "/nowhere", None),
    ],
)
def test_the_fake_engines_other_routes(
    client: httpx.Client, vllm_server: Server, method: str, path: str, body: Any
) -> None:
    with serving(FakeVllm(model=vllm_server.model)) as url, httpx.Client(base_url=url, timeout=20) as other:
        real, fake = (
            c.request(method, path, json=body and body | {"model": vllm_server.model}) for c in (client, other)
        )
    assert fake.status_code == real.status_code
    if real.content:
        assert shape(fake.json()) == shape(real.json())
    assert fake.content == real.content or path not in ("/version", "/health", "/nowhere")
