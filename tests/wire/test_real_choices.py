"""Real vLLM: several choices, and the client's own logprobs, come back byte for byte while every choice is captured."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from typing import Any, Protocol

import httpx
import msgspec
import numpy as np
import pytest
from tests.support.merged_stream import by_choice, joined, same_answer
from tests.support.running_vllm import RunningVllm, answers_of, wait_until_signed_answers_are_recorded
from tests.support.slow import slow_unless
from tests.support.wire import Answer, Wire, assert_same_tokens, policy, rows, user

from hemostat.openai.routes import CHAT, COMPLETIONS
from hemostat.scoring.intake import captures_from_tap

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

ATTEMPTS = 3
"""A request is sent so often at most, until the answers are the same. On a busy machine vLLM's front end puts two steps
into one event: see `joined`."""
AS_IDS = {"return_tokens_as_token_ids": True}
UNICODE = user("Repeat: 🎉🌍 日本語 été ☃")
CODE = [user("Write a C program that prints a \\ and a tab.")]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}]


class Server(Protocol):
    url: str
    model: str


@pytest.fixture(autouse=True, scope="module")
def recorded(vllm_server: Any) -> None:
    wait_until_signed_answers_are_recorded(vllm_server)


@pytest.fixture
def wire(vllm_server: Server) -> Iterator[Wire]:
    with httpx.Client(base_url=vllm_server.url, timeout=300) as client:
        yield Wire(client)


def compared(wire: Wire, path: str, body: dict[str, Any]) -> Answer:
    """The answer without Hemostat, which the sampled one has to equal."""
    for _ in range(ATTEMPTS):
        wire.interceptor.policy = policy(scoring=False)
        plain = wire.send(path, body)
        wire.captures.clear()
        wire.counts.clear()
        wire.interceptor.policy = policy(shadow_top_k=20)
        sampled = wire.send(path, body, splits=random.Random(1))
        if same_answer(sampled.body, plain.body):
            break
    assert plain.status == sampled.status == 200, plain.body
    assert wire.captures, "it is sampled"
    if by_choice(sampled.body) != by_choice(plain.body):
        assert joined(sampled.body) == joined(plain.body)
    assert not [labels for labels in wire.counts if labels[1] != "shadowed"]
    return plain


CHOICES: dict[str, tuple[str, dict[str, Any], int]] = {
    # Path, body, number of choices.
    "chat": (CHAT, {"messages": [user("Say hello.")], "n": 2, "seed": 3, "max_tokens": 12}, 2),
    "chat, to the end": (CHAT, {"messages": [user("Say hello.")], "n": 3, "seed": 4, "max_tokens": 60}, 3),
    "chat, own ids": (CHAT, {"messages": [UNICODE], "n": 2, "seed": 3, "max_tokens": 12, "return_token_ids": True}, 2),
    "chat, own logprobs": (CHAT, {"messages": [UNICODE], "n": 2, "seed": 3, "max_tokens": 12, "logprobs": True}, 2),
    "completions": (COMPLETIONS, {"prompt": "1, 2, 3,", "n": 2, "seed": 3, "max_tokens": 8}, 2),
    "best_of, which is ignored": (COMPLETIONS, {"prompt": "1, 2,", "best_of": 3, "seed": 3, "max_tokens": 8}, 1),
    "prompts": (COMPLETIONS, {"prompt": ["1, 2, 3,", "The capital of France"], "temperature": 0, "max_tokens": 6}, 2),
    "prompts of ids": (COMPLETIONS, {"prompt": [[504, 3575, 282], [504]], "temperature": 0, "max_tokens": 4}, 2),
    "prompts and choices": (COMPLETIONS, {"prompt": ["1, 2, 3,", "Hi"], "n": 2, "seed": 5, "max_tokens": 5}, 4),
}
STREAMS: dict[str, dict[str, Any]] = {
    "whole": {},
    "stream": {"stream": True},
    "stream with usage": {"stream": True, "stream_options": {"include_usage": True}},
}


@pytest.mark.parametrize(
    ("case", "option"),
    slow_unless(
        {(case, "stream") for case in CHOICES} | {("prompts and choices", "stream with usage")},
        [(case, option) for case in CHOICES for option in ("whole", "stream")]
        + [(case, "stream with usage") for case in ("chat", "completions", "prompts and choices")],
    ),
)
def test_every_choice_is_captured(wire: Wire, vllm_server: Server, case: str, option: str) -> None:
    path, body, choices = CHOICES[case]
    body = {"model": vllm_server.model} | body | STREAMS[option]
    answer = compared(wire, path, body)
    assert [capture.choice for capture in wire.captures] == list(range(choices))
    assert {capture.choices for capture in wire.captures} == {choices}
    assert len({(capture.request_id, capture.conversation) for capture in wire.captures}) == 1
    texts = texts_of(answer, choices)
    for capture in wire.captures:
        prompt, output, ids, values, emitted = rows(capture)
        assert prompt
        assert len(output) == len(ids) == len(emitted)
        for token, row, row_values, own in zip(output, ids, values, emitted, strict=True):
            assert row_values[row == token] == own
        text = detokenized(wire, vllm_server, output)
        assert text.replace("\ufffd", "").startswith(texts[capture.choice].replace("\ufffd", ""))


def detokenized(wire: Wire, server: Server, ids: list[int]) -> str:
    answer = wire.client.post("/detokenize", json={"model": server.model, "tokens": ids})
    return str(answer.json()["prompt"])


def texts_of(answer: Answer, choices: int) -> list[str]:
    texts = [""] * choices
    if not answer.body.startswith(b"data:"):
        events = [json.loads(answer.body)]
    else:
        lines = [event.removeprefix(b"data: ") for event in answer.body.split(b"\n\n") if event]
        events = [json.loads(line) for line in lines if line != b"[DONE]"]
    for event in events:
        for choice in event["choices"]:
            part = choice.get("message") or choice.get("delta") or {}
            texts[choice["index"]] += choice.get("text") or part.get("content") or ""
    return texts


WISHES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, {"logprobs": True}),
    "chat, none": (CHAT, {"logprobs": True, "top_logprobs": 0}),
    "chat, one": (CHAT, {"logprobs": True, "top_logprobs": 1}),
    "chat, one, of code": (CHAT, {"logprobs": True, "top_logprobs": 1, "messages": CODE}),
    "chat, ids": (CHAT, {"logprobs": True, "top_logprobs": 1, "return_token_ids": True} | AS_IDS),
    "chat, ids without logprobs": (CHAT, {"return_token_ids": True}),
    "chat, the form alone": (CHAT, dict(AS_IDS)),
    "chat with tools": (CHAT, {"logprobs": True, "top_logprobs": 1, "tools": TOOLS}),
    "chat with tools, ids": (CHAT, {"return_token_ids": True, "tools": TOOLS}),
    "chat, stop string": (CHAT, {"logprobs": True, "top_logprobs": 1, "stop": ["e", "日"]}),
    "chat, sampled": (CHAT, {"logprobs": True, "top_logprobs": 1, "temperature": 1.5, "seed": 5}),
    "chat, sampled, ids": (CHAT, {"logprobs": True, "top_logprobs": 1, "temperature": 1.5, "seed": 5} | AS_IDS),
    "completions, emitted only": (COMPLETIONS, {"logprobs": 0} | AS_IDS),
    "completions, ids without logprobs": (COMPLETIONS, {"return_token_ids": True}),
    "completions, sampled": (COMPLETIONS, {"logprobs": 0, "temperature": 1.5, "seed": 5} | AS_IDS),
}
LIKE_OTHERS = {
    *("chat, one", "chat, one, of code", "chat, ids without logprobs", "chat, the form alone"),
    *("chat with tools, ids", "chat, sampled", "completions, ids without logprobs"),
}
"""What differs from another case in one member, whose effect a third one shows."""


@pytest.mark.parametrize(
    ("case", "option"),
    slow_unless(
        {(case, "stream") for case in WISHES if case not in LIKE_OTHERS},
        [(case, option) for case in WISHES for option in ("whole", "stream")],
    ),
)
def test_the_clients_own_logprobs_come_back_as_asked(wire: Wire, vllm_server: Server, case: str, option: str) -> None:
    path, wish = WISHES[case]
    common = {"model": vllm_server.model, "temperature": 0, "max_tokens": 24}
    asked = {"messages": [UNICODE]} if path == CHAT else {"prompt": "🎉🌍 日本語 été ☃ 🎉🌍 日本"}
    compared(wire, path, common | asked | wish | STREAMS[option])
    [capture] = wire.captures
    _, output, ids, _, _ = rows(capture)
    assert ids.shape == (len(output), 21)
    assert np.sum(ids >= 0) >= 20 * len(output)


def untied(value: Any, asked: int = 0) -> Any:
    """Ids that tie in a canonical order, and without those that tie for the last place of a list: which of them vLLM
    takes, and in which order, depends on the list's length. asked: the `logprobs` of a request for a completion."""
    if isinstance(value, list):
        return [untied(item, asked) for item in value]
    if not isinstance(value, dict):
        return value
    result = {key: untied(item, asked) for key, item in value.items()}
    top = result.get("top_logprobs")
    if isinstance(top, list) and top and "token" in result:  # of a chat: one position's list, with the emitted token
        emitted = result["token"]
        least = min((item["logprob"] for item in top if item["token"] != emitted), default=math.inf)
        rest = [item for item in top if item["token"] == emitted or item["logprob"] > least]
        result["top_logprobs"] = sorted(rest, key=lambda item: (-item["logprob"], item["token"]))
    elif isinstance(top, list):  # of a completion: one dictionary for each position
        result["top_logprobs"] = [
            untied_position(alternatives, emitted, asked)
            for alternatives, emitted in zip(top, result["tokens"], strict=True)
        ]
    return result


def untied_position(alternatives: dict[str, float], emitted: str, asked: int) -> dict[str, float]:
    """The emitted token is in the dictionary in any case: where it is none of the `asked` most likely ones, as one
    more. Where it ties for their last place, that it has the place or is one more depends on the list's length."""
    listed = [own for token, own in alternatives.items() if token != emitted or len(alternatives) <= asked]
    least = min(listed, default=math.inf)
    return {token: own for token, own in alternatives.items() if token == emitted or own > least}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": -1.0, "b": -2.0, "c": -3.0}, {"a": -1.0, "b": -2.0, "d": -3.0, "c": -3.0}),
        ({"c": -3.0, "a": -1.0, "b": -2.0}, {"b": -2.0, "c": -3.0, "a": -1.0, "d": -3.0}),
        ({"a": -1.0, "c": -3.0, "d": -3.0}, {"a": -1.0, "c": -3.0, "e": -3.0}),
        ({"a": -1.0, "b": -2.0, "d": -2.0, "c": -9.0}, {"a": -1.0, "b": -2.0, "e": -2.0, "c": -9.0}),
    ],
)
def test_positions_that_differ_by_ties_for_the_last_of_three_places(
    one: dict[str, float], other: dict[str, float]
) -> None:
    """ "c" is emitted."""
    assert untied_position(one, "c", 3) == untied_position(other, "c", 3)


@pytest.mark.parametrize(
    "other",
    [{"a": -1.0, "b": -2.5, "c": -3.0}, {"a": -1.0, "e": -2.0, "c": -3.0}, {"a": -1.0, "b": -2.0, "c": -3.5}],
)
def test_other_differences_are_seen(other: dict[str, float]) -> None:
    assert untied_position({"a": -1.0, "b": -2.0, "c": -3.0}, "c", 3) != untied_position(other, "c", 3)


ALTERNATIVES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, {"logprobs": True, "top_logprobs": 3}),
    "chat, ids": (CHAT, {"logprobs": True, "top_logprobs": 3} | AS_IDS),
    "chat, sampled, ids": (CHAT, {"logprobs": True, "top_logprobs": 5, "temperature": 1.5, "seed": 5} | AS_IDS),
    "completions": (COMPLETIONS, {"logprobs": 2}),
    "completions, ids": (COMPLETIONS, {"logprobs": 2} | AS_IDS),
    "completions, sampled, ids": (COMPLETIONS, {"logprobs": 3, "temperature": 1.5, "seed": 5} | AS_IDS),
}
"""Of the client's own. Which of equally likely tokens vLLM names depends on how many it is asked for."""


@pytest.mark.parametrize(
    ("case", "option"),
    slow_unless(
        {("chat, sampled, ids", "stream"), ("completions", "whole"), ("completions, sampled, ids", "stream")},
        [(case, option) for case in ALTERNATIVES for option in ("whole", "stream")],
    ),
)
def test_alternatives_of_the_clients_own_are_as_vllm_names_them(
    wire: Wire, vllm_server: RunningVllm, case: str, option: str
) -> None:
    """Exactly, where the request goes to vLLM as it is. The plugin takes longer lists of it and shortens them, so that
    another one of equally likely ids may be named."""
    path, wish = ALTERNATIVES[case]
    asked = {"messages": [UNICODE]} if path == CHAT else {"prompt": "🎉🌍 日本語 été ☃ 🎉🌍 日本"}
    common = {"model": vllm_server.model, "temperature": 0, "max_tokens": 24} | STREAMS[option]
    for sampled_by in (
        policy(shadow_top_k=20),
        policy(
            secret=vllm_server.admin.registry.secrets.current(vllm_server.admin.now),
            tap=True,
            tap_tokens=True,
            shadow_top_k=20,
        ),
    ):
        for _ in range(1 if sampled_by.tap else ATTEMPTS):
            wire.interceptor.policy = policy(scoring=False)
            plain = wire.send(path, common | asked | wish)
            wire.captures.clear()
            wire.interceptor.policy = sampled_by
            sampled = wire.send(path, common | asked | wish)
            answers = [answers_of(vllm_server, capture.nonce) for capture in wire.captures]
            if same_answer(sampled.body, plain.body):
                break
        first, other = joined(sampled.body), joined(plain.body)
        if by_choice(sampled.body) != by_choice(plain.body) and sampled_by.tap:
            first, other = untied(first, wish.get("logprobs", 0)), untied(other, wish.get("logprobs", 0))
        if by_choice(sampled.body) != by_choice(plain.body):
            assert first == other
    [capture], [answer] = wire.captures, answers
    [completed] = captures_from_tap(capture, answer, 1024)
    _, output, ids, _, _ = rows(completed)
    assert ids.shape == (len(output), 21)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_logprobs_of_the_prompt_are_left_as_they_are(wire: Wire, vllm_server: Server, path: str) -> None:
    body = {"messages": [user("Hi")]} if path == CHAT else {"prompt": "1, 2, 3,"}
    common = {"model": vllm_server.model, "temperature": 0, "max_tokens": 3, "prompt_logprobs": 2}
    answer = compared(wire, path, common | body)
    assert b'"decoded_token"' in answer.body
    assert len(wire.captures) == 1


OF_PROMPT = "logprobs of the prompt"
EITHER_WAY: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, {"messages": [UNICODE]}),
    "chat, sampled": (CHAT, {"messages": [UNICODE], "temperature": 1.5, "seed": 5}),
    "chat with tools, own logprobs": (CHAT, {"messages": [UNICODE], "tools": TOOLS, "logprobs": True}),
    "two choices": (CHAT, {"messages": [user("Say hello.")], "n": 2, "temperature": 1.0, "seed": 3}),
    "completions": (COMPLETIONS, {"prompt": "1, 2, 3,", "stop": ["9"]}),
    "prompts": (COMPLETIONS, {"prompt": ["1, 2, 3,", "The capital of France"]}),
    OF_PROMPT: (COMPLETIONS, {"prompt": "1, 2, 3,", "prompt_logprobs": 2}),
}


@pytest.mark.parametrize(
    ("case", "option"),
    # vLLM refuses logprobs of the prompt in a stream.
    slow_unless(
        {(case, "stream") for case in EITHER_WAY if case != OF_PROMPT}
        | {("two choices", "whole"), (OF_PROMPT, "whole")},
        [
            (case, option)
            for case in EITHER_WAY
            for option in ("whole", "stream")
            if (case, option) != (OF_PROMPT, "stream")
        ],
    ),
)
def test_both_ways_tell_the_same_tokens(wire: Wire, vllm_server: RunningVllm, case: str, option: str) -> None:
    path, body = EITHER_WAY[case]
    body = {"model": vllm_server.model, "temperature": 0, "max_tokens": 12} | body | STREAMS[option]
    by_response = policy(
        secret=vllm_server.admin.registry.secrets.current(vllm_server.admin.now),
        tap=True,
        tap_tokens=True,
        shadow_top_k=20,
    )
    wire.interceptor.policy = by_response
    read = wire.send(path, body)
    in_response = wire.captures[:]
    wire.captures.clear()
    wire.interceptor.policy = msgspec.structs.replace(by_response, prefer_plugin=True)
    passed_on = wire.send(path, body)
    if by_choice(passed_on.body) != by_choice(read.body):
        assert joined(passed_on.body) == joined(read.body)
    [capture] = wire.captures
    assert (capture.from_tap, capture.also_in_response) == (True, True)
    result = captures_from_tap(capture, answers_of(vllm_server, capture.nonce, capture.choices), 1024)
    assert len(result) == len(in_response)
    for ours, theirs in zip(in_response, result, strict=True):
        assert_same_tokens(ours, theirs)
