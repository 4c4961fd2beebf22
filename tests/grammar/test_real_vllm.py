"""Real vLLM: the sets that the plugin hands out are those that it masked by, id for id, as far as it lists them."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
from tests.support.captures import candidates_of
from tests.support.running_vllm import RunningVllm, answers_of, wait_until_signed_answers_are_recorded
from tests.support.slow import slow_unless
from tests.support.wire import Wire, policy, rows

from hemostat.ipc.messages import Capture
from hemostat.openai.routes import CHAT, COMPLETIONS, MESSAGES, RESPONSES
from hemostat.scoring.capture_arrays import output_ids
from hemostat.scoring.conditioning import IMPOSSIBLE_LOGPROB, allowed_sets, restricted, shows_mask
from hemostat.scoring.intake import captures_from_tap
from hemostat_calibration.allowed_sets import AllowedSets
from hemostat_lab.demo.checkpoints import Checkpoints

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

TOP_K = 64
"""The server's --max-logprobs."""
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": CITY}}]
STRICT = [{"type": "function", "function": {"name": "get_weather", "parameters": CITY, "strict": True}}]
NAMED = {"type": "function", "function": {"name": "get_weather"}}
TREE = {
    "$defs": {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}, "n": {"type": "integer"}}}},
    "$ref": "#/$defs/node",
}


def chat(text: str, tokens: int = 40, **more: Any) -> tuple[str, dict[str, Any]]:
    return CHAT, {"messages": [{"role": "user", "content": text}], "max_tokens": tokens, **more}


def schema(value: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "json_object": chat("Give me a city as JSON.", response_format={"type": "json_object"}),
    "json_schema": chat("Weather in Paris?", response_format=schema(CITY)),
    "a recursive schema": chat("A list of numbers.", response_format=schema(TREE)),
    "regex": chat("A phone number.", structured_outputs={"regex": r"\d{3}-\d{4}"}),
    "choice": chat("Is 7 prime?", structured_outputs={"choice": ["yes", "no", "I don't know"]}),
    "grammar": chat("Count.", structured_outputs={"grammar": 'root ::= [0-9]+ (", " [0-9]+){2}'}),
    "a structural tag": chat(
        "Call f.",
        response_format={
            "type": "structural_tag",
            "structures": [{"begin": "<f>", "schema": CITY, "end": "</f>"}],
            "triggers": ["<f>"],
        },
    ),
    "a forced named tool": chat("Weather in Rome?", tools=TOOLS, tool_choice=NAMED),
    "a required tool": chat("Weather in Rome?", tools=TOOLS, tool_choice="required"),
    "one strict required tool": chat(
        "Weather in Rome?", tools=STRICT, tool_choice="required", parallel_tool_calls=False
    ),
    "a strict tool that may be called": chat("Weather in Rome?", tools=STRICT),
    "completions": (
        COMPLETIONS,
        {"prompt": "The capital is", "max_tokens": 24, "structured_outputs": {"json": {"type": "string"}}},
    ),
    "sampled": chat("A colour as JSON.", response_format={"type": "json_object"}, temperature=1.0, seed=3),
    "after the end": chat("Is 7 prime?", 12, structured_outputs={"choice": ["yes", "no"]}, ignore_eos=True),
    "changed logits": chat("A city as JSON.", response_format={"type": "json_object"}, logit_bias={"5": 1.0}),
    "a stop id": chat("Is 7 prime?", structured_outputs={"regex": "[a-z ]{4,}"}, stop_token_ids=[28]),
}

LIKE_OTHERS = {
    "json_object",
    "a recursive schema",
    "a required tool",
    "a strict tool that may be called",
    "a stop id",
}
"""What is restricted as another case is, but for the text."""
LARGE_SETS = {"a structural tag", "a strict tool that may be called", "a stop id"}
"""More ids are allowed at each position than vLLM lists: only that none of the listed ones contradicts the sets is
compared."""


@pytest.fixture(scope="module")
def client(vllm_server: RunningVllm) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=vllm_server.url, timeout=300) as client:
        # vLLM loads the plugin into the API server's process with its first request, whose answer is not handed out.
        client.post(COMPLETIONS, json={"model": vllm_server.model, "prompt": "Hi", "max_tokens": 1}).raise_for_status()
        wait_until_signed_answers_are_recorded(vllm_server)
        yield client


@pytest.fixture
def wire(client: httpx.Client, vllm_server: RunningVllm) -> Wire:
    wire = Wire(client, nonce=lambda: f"grammar-{time.monotonic_ns()}")
    wire.interceptor.policy = policy(
        shadow_top_k=TOP_K,
        grammars=True,
        tap=True,
        secret=vllm_server.admin.registry.secrets.current(vllm_server.admin.now),
    )
    return wire


@pytest.fixture(scope="module")
def vocab_size(checkpoints: Checkpoints) -> int:
    return int(json.loads((checkpoints.reference / "config.json").read_text())["vocab_size"])


def handed_out(server: RunningVllm, capture: Capture, vocab_size: int) -> AllowedSets:
    """The sets of the output's positions, once all have come."""
    tokens = len(capture.output_token_ids) // 4
    give_up = time.monotonic() + 60
    while True:
        with server.admin.lock:
            taps = server.admin.registry.taps
            if taps.covered(capture.nonce) >= tokens:
                tap = taps.take(capture.nonce, tokens)
                break
        assert time.monotonic() < give_up, "the engine sent no tap"
        time.sleep(0.05)
    assert tap is not None
    return allowed_sets(tap.runs, slice(0, tokens), vocab_size)


@pytest.mark.parametrize(
    ("case", "stream"),
    slow_unless(
        {(case, True) for case in CASES if case not in LIKE_OTHERS},
        [(case, stream) for case in CASES for stream in (False, True)],
    ),
)
def test_the_sets_are_those_that_vllm_masked_by(
    wire: Wire, vllm_server: RunningVllm, vocab_size: int, case: str, stream: bool
) -> None:
    path, body = CASES[case]
    body = {"model": vllm_server.model, "temperature": 0, "stream": stream, **body}
    answer = wire.send(path, body, splits=random.Random(1))
    assert answer.status == 200, answer.body
    [capture] = wire.captures
    assert " grammar " in capture.kind
    sets = handed_out(vllm_server, capture, vocab_size)
    compare(capture, sets, many=case in LARGE_SETS)
    if case == "after the end":
        assert sets.support[-1] == vocab_size


def compare(capture: Capture, sets: AllowedSets, *, many: bool = False) -> None:
    """The sets are those of the capture's lists, id for id. many: everywhere more ids are allowed than listed."""
    result = restricted(candidates_of(capture), output_ids(capture), capture.top_k, sets)
    support = sets.support
    _, _, ids, logprobs, _ = rows(capture)
    small = np.nonzero(support <= TOP_K)[0]
    if not many:
        assert len(small), "at no position all allowed ids are listed: the test shows nothing"
    mask = sets.mask(slice(0, sets.tokens))
    for t in small:
        listed = {int(i) for i, value in zip(ids[t], logprobs[t], strict=True) if i >= 0 and value > IMPOSSIBLE_LOGPROB}
        assert listed == set(np.nonzero(mask[t])[0].tolist())
        # Conditional on the set: it is all there is.
        assert np.exp(result.logprobs[t][result.ids[t] >= 0]).sum() == pytest.approx(1.0, abs=1e-3)


def response(prompt: str, **more: Any) -> tuple[str, dict[str, Any]]:
    return RESPONSES, {"input": prompt, "max_output_tokens": 40, **more}


def message(text: str, **more: Any) -> tuple[str, dict[str, Any]]:
    return MESSAGES, {"messages": [{"role": "user", "content": text}], "max_tokens": 40, **more}


FLAT = [{"type": "function", "name": "get_weather", "parameters": CITY}]
ANTHROPIC = [{"name": "get_weather", "input_schema": {name: CITY[name] for name in ("properties", "required")}}]
FORMAT = {"type": "json_schema", "name": "x", "schema": CITY}
OTHER_FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "a response's schema": response("Weather in Paris?", text={"format": FORMAT}),
    "a response's structured output": response("A phone number.", structured_outputs={"regex": r"\d{3}-\d{4}"}),
    "a response's forced tool": response("Weather in Rome?", tools=FLAT, tool_choice="required"),
    "a response's named tool": response(
        "Weather in Rome?", tools=FLAT, tool_choice={"type": "function", "name": "get_weather"}
    ),
    "a message's schema": message("Weather in Paris?", output_config={"format": FORMAT | {"name": "json_schema"}}),
    "a message's forced tool": message("Weather in Rome?", tools=ANTHROPIC, tool_choice={"type": "any"}),
    "a message's named tool": message(
        "Weather in Rome?", tools=ANTHROPIC, tool_choice={"type": "tool", "name": "get_weather"}
    ),
}


IN_CI = {("a response's schema", True), ("a message's forced tool", True)}
"""One of each route."""


@pytest.mark.parametrize(
    ("case", "stream"),
    slow_unless(IN_CI, [(case, stream) for case in OTHER_FORMS for stream in (True, False)]),
)
def test_and_those_of_the_other_forms(
    wire: Wire, vllm_server: RunningVllm, vocab_size: int, case: str, stream: bool
) -> None:
    path, body = OTHER_FORMS[case]
    wire.interceptor.policy = msgspec.structs.replace(wire.interceptor.policy, tap_tokens=True)
    answer = wire.send(path, {"model": vllm_server.model, "temperature": 0, "stream": stream, **body})
    assert answer.status == 200, answer.body
    assert wire.captures, (wire.counts, answer.body)
    [capture] = wire.captures
    assert " grammar " in capture.kind
    [completed] = captures_from_tap(capture, answers_of(vllm_server, capture.nonce), 1024)
    compare(completed, handed_out(vllm_server, completed, vocab_size))


@pytest.mark.parametrize(
    "body",
    [
        chat("Say hello.")[1],
        chat("Say hello.", response_format={"type": "text"})[1],
        chat("What is 1 + 1?", tools=TOOLS)[1],
        chat("What is 1 + 1?", tools=TOOLS, tool_choice="none")[1],
    ],
)
def test_what_is_not_restricted_shows_no_mask(
    wire: Wire, vllm_server: RunningVllm, vocab_size: int, body: dict[str, Any]
) -> None:
    wire.send(CHAT, {"model": vllm_server.model, "temperature": 0, **body})
    [capture] = wire.captures
    assert not capture.grammar
    assert " grammar " not in capture.kind
    assert not shows_mask(candidates_of(capture))
    assert (handed_out(vllm_server, capture, vocab_size).support == vocab_size).all()


def test_older_parameters_are_ignored_by_this_version(client: httpx.Client, vllm_server: RunningVllm) -> None:
    """Otherwise they would have to be read, too; Hemostat skips them, since earlier versions enforce them."""
    body = {"model": vllm_server.model, "temperature": 0, **chat("Say hello.", 8)[1], "guided_regex": "[0-9]{4}"}
    text = client.post(CHAT, json=body).json()["choices"][0]["message"]["content"]
    assert not text.isdigit()
    wire = Wire(client)
    wire.send(CHAT, body)
    assert wire.shadow("skipped", "grammar") == 1


def test_what_vllm_refuses_is_its_own_error(wire: Wire, vllm_server: RunningVllm) -> None:
    for body in (
        chat("x", structured_outputs={"regex": "("})[1],
        chat("x", structured_outputs={"choice": []})[1],
        chat("x", tools=[], tool_choice="required")[1],
    ):
        answer = wire.send(CHAT, {"model": vllm_server.model, "temperature": 0, **body})
        assert answer.status == 400, answer.body
    assert wire.captures == []
