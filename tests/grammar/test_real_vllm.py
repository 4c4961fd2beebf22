"""Real vLLM: the sets that are rebuilt are those that it masked by, id for id, as far as it lists them."""

from __future__ import annotations

import json
import random
import resource
import time
from collections.abc import Iterator
from typing import Any, Protocol

import httpx
import msgspec
import numpy as np
import pytest
from tests.support.running_vllm import answers_of
from tests.support.wire import Wire, policy, rows

from hemostat.ipc.messages import Capture
from hemostat.models.reference_checkpoint import Checkpoints
from hemostat.openai.routes import CHAT, COMPLETIONS, MESSAGES, RESPONSES
from hemostat.openai.tool_parsers import restricted_free_calls
from hemostat.shadow.grammar import wire as messages
from hemostat.shadow.grammar.checking import IMPOSSIBLE_LOGPROB, restricted, shows_mask
from hemostat.shadow.grammar.reasons import GrammarFailure, GrammarReason
from hemostat.shadow.grammar.worker import Worker
from hemostat.shadow.record_builder import decode_capture
from hemostat.shadow.tapped_answers import captures_from_tap
from hemostat_calibration.allowed_sets import AllowedSets, words

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

TOP_K = 64
"""The server's --max-logprobs."""
PARSER = "hermes"
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": CITY}}]
STRICT = [{"type": "function", "function": {"name": "get_weather", "parameters": CITY, "strict": True}}]
NAMED = {"type": "function", "function": {"name": "get_weather"}}
TREE = {
    "$defs": {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}, "n": {"type": "integer"}}}},
    "$ref": "#/$defs/node",
}


class Server(Protocol):
    url: str
    model: str


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
    "a stop id": chat("Is 7 prime?", structured_outputs={"regex": "[a-z ]{4,}"}, stop_token_ids=[28]),
}

LARGE_SETS = {"a structural tag", "a strict tool that may be called", "a stop id"}
"""More ids are allowed at each position than vLLM lists: only that none of the listed ones contradicts the sets is
compared."""


class Rebuilt:
    def __init__(self, folder: str, vocab_size: int) -> None:
        self.folder, self.vocab_size = folder, vocab_size
        self.worker = Worker()
        before = resource.getrlimit(resource.RLIMIT_DATA)
        self.worker._prepare(messages.Prepare(1, folder, vocab_size, 4096))
        resource.setrlimit(resource.RLIMIT_DATA, before)  # the limit is for a process of its own

    def sets(self, capture: Capture, **how: Any) -> AllowedSets:
        assert capture.grammar is not None
        asked = {"start": 0, "parser": PARSER, "strict_level": "auto", "any_whitespace": True, "stop_token_ids": []}
        answer = self.worker._walk(
            messages.Walk(2, self.folder, self.vocab_size, capture.grammar, capture.output_token_ids, **asked | how)
        )
        table = np.frombuffer(answer.table, "<u4").reshape(-1, words(self.vocab_size))
        return AllowedSets(self.vocab_size, table, np.frombuffer(answer.rows, "<i4"))


@pytest.fixture(scope="module")
def rebuilt(checkpoints: Checkpoints) -> Rebuilt:
    pytest.importorskip("xgrammar")
    config = json.loads((checkpoints.reference / "config.json").read_text())
    return Rebuilt(str(checkpoints.reference), config["vocab_size"])


@pytest.fixture(scope="module")
def client(vllm_server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=vllm_server.url, timeout=300) as client:
        # vLLM loads the plugin into the API server's process with its first request, whose answer is not handed out.
        client.post(COMPLETIONS, json={"model": vllm_server.model, "prompt": "Hi", "max_tokens": 1}).raise_for_status()
        yield client


@pytest.fixture
def wire(client: httpx.Client) -> Wire:
    wire = Wire(client)
    free = restricted_free_calls(PARSER, "auto")
    wire.interceptor.policy = policy(shadow_top_k=TOP_K, grammars=True, tool_grammars=True, free_calls=free)
    return wire


@pytest.mark.parametrize("stream", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("case", CASES)
def test_the_rebuilt_sets_are_those_that_vllm_masked_by(
    wire: Wire, vllm_server: Server, rebuilt: Rebuilt, case: str, stream: bool
) -> None:
    path, body = CASES[case]
    body = {"model": vllm_server.model, "temperature": 0, "stream": stream, **body}
    answer = wire.send(path, body, splits=random.Random(1))
    assert answer.status == 200, answer.body
    [capture] = wire.captures
    assert " grammar " in capture.kind
    sets = compared(capture, rebuilt, many=case in LARGE_SETS)
    if case == "after the end":
        assert sets.support[-1] == rebuilt.vocab_size


def compared(capture: Capture, rebuilt: Rebuilt, *, many: bool = False) -> AllowedSets:
    """The sets, which are those of the capture's lists, id for id. many: everywhere more ids are allowed than
    listed."""
    arrays = decode_capture(capture)
    sets = rebuilt.sets(capture)
    found = restricted(arrays.candidates, arrays.output, capture.top_k, sets)
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
        assert np.exp(found.logprobs[t][found.ids[t] >= 0]).sum() == pytest.approx(1.0, abs=1e-3)
    return sets


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
"""One of each route: that all are read as vLLM reads them shows test_against_vllm.py."""


@pytest.mark.parametrize(
    ("case", "stream"),
    [
        pytest.param(case, stream, marks=[] if (case, stream) in IN_CI else pytest.mark.slow)
        for case in OTHER_FORMS
        for stream in (True, False)
    ],
)
def test_and_those_of_the_other_forms_by_what_the_plugin_hands_out(
    wire: Wire, vllm_server: Any, rebuilt: Rebuilt, case: str, stream: bool
) -> None:
    path, body = OTHER_FORMS[case]
    wire.interceptor._reports._nonce = lambda: f"grammar-{time.monotonic_ns()}"
    wire.interceptor.policy = msgspec.structs.replace(wire.interceptor.policy, tap=True, tap_tokens=True)
    answer = wire.send(path, {"model": vllm_server.model, "temperature": 0, "stream": stream, **body})
    assert answer.status == 200, answer.body
    assert wire.captures, (wire.counts, answer.body)
    [capture] = wire.captures
    assert " grammar " in capture.kind
    [found] = captures_from_tap(capture, answers_of(vllm_server, capture.nonce), 1024)
    compared(found, rebuilt)


def test_another_setting_than_the_servers_is_a_mismatch(wire: Wire, vllm_server: Server, rebuilt: Rebuilt) -> None:
    path, body = CASES["a required tool"]
    wire.send(path, {"model": vllm_server.model, "temperature": 0, **body})
    [capture] = wire.captures
    arrays = decode_capture(capture)
    for how in ({"parser": "pythonic"}, {"parser": "longcat"}, {"strict_level": "parameter"}):
        with pytest.raises(GrammarFailure) as failure:
            restricted(arrays.candidates, arrays.output, capture.top_k, rebuilt.sets(capture, **how))
        assert failure.value.reason is GrammarReason.MISMATCH, how


@pytest.mark.parametrize(
    "body",
    [
        chat("Say hello.")[1],
        chat("Say hello.", response_format={"type": "text"})[1],
        chat("What is 1 + 1?", tools=TOOLS)[1],
        chat("What is 1 + 1?", tools=TOOLS, tool_choice="none")[1],
    ],
)
def test_what_is_not_restricted_shows_no_mask(wire: Wire, vllm_server: Server, body: dict[str, Any]) -> None:
    wire.send(CHAT, {"model": vllm_server.model, "temperature": 0, **body})
    [capture] = wire.captures
    assert capture.grammar is None
    assert " grammar " not in capture.kind
    assert not shows_mask(decode_capture(capture).candidates)


def test_older_parameters_are_ignored_by_this_version(client: httpx.Client, vllm_server: Server) -> None:
    """Otherwise they would have to be read, too; Hemostat skips them, since earlier versions enforce them."""
    body = {"model": vllm_server.model, "temperature": 0, **chat("Say hello.", 8)[1], "guided_regex": "[0-9]{4}"}
    text = client.post(CHAT, json=body).json()["choices"][0]["message"]["content"]
    assert not text.isdigit()
    wire = Wire(client)
    wire.send(CHAT, body)
    assert wire.shadow("skipped", "structured_output") == 1


def test_what_vllm_refuses_is_its_own_error(wire: Wire, vllm_server: Server) -> None:
    for body in (
        chat("x", structured_outputs={"regex": "("})[1],
        chat("x", structured_outputs={"choice": []})[1],
        chat("x", tools=[], tool_choice="required")[1],
    ):
        answer = wire.send(CHAT, {"model": vllm_server.model, "temperature": 0, **body})
        assert answer.status == 400, answer.body
    assert wire.captures == []
