"""A candidate fails by whatever is wrong with what its clients get, and the sentence says why."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from string import ascii_letters
from typing import Any

import numpy as np
import pytest
from tests.support.fake_vllm import FakeVllm
from tests.support.gate_servers import Changed, emptied, servers

from hemostat.gate.asked import Prompt
from hemostat.gate.outcomes import OUTCOMES, Outcomes, Served

PASS, FAIL, UNDECIDED = 0, 1, 2
Gate = Callable[..., tuple[int, str]]
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'
TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


def write(path: Path, said: str, more: dict[str, Any], count: int = 90) -> None:
    """Writes chats that the fake answers with `said`, and that have nothing else in common."""
    random = np.random.default_rng(11)
    texts = ["".join(random.choice(list(ascii_letters), 50 + len(said))) for _ in range(count)]
    lines = [
        {"messages": [{"role": "user", "content": f"{text}\nsay: {said}"}], "max_tokens": len(said) + 2, **more}
        for text in texts
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("chat", [False, True])
def test_another_default_temperature_fails_and_says_so(gate: Gate, prompts: Path, chat: bool) -> None:
    if chat:
        texts = [json.loads(line)["prompt"] for line in prompts.read_text().splitlines()]
        chats = [{"messages": [{"role": "user", "content": text}], "max_tokens": 4} for text in texts]
        prompts.write_text("".join(json.dumps(line) + "\n" for line in chats))
    with servers(FakeVllm(), FakeVllm(default_temperature=0.3)) as (stable, candidate):
        code, text = gate(stable, candidate)
        assert code == FAIL, text
        assert text.startswith("fail: the candidate is less random by its server's default parameters (temperature, ")
        code, text = gate(candidate, stable)
    assert code == FAIL, text
    assert text.startswith("fail: the candidate is more random by its server's default parameters")


def cut_json(choice: dict[str, Any]) -> None:
    choice["message"]["content"] = choice["message"]["content"][:-1]


def looped(choice: dict[str, Any]) -> None:
    choice["message"]["content"] = "It goes on, " + "and then again " * 12


def cut_off(choice: dict[str, Any]) -> None:
    choice["finish_reason"] = "length"


def silent(choice: dict[str, Any]) -> None:
    choice["message"]["content"] = ""


@pytest.mark.parametrize(
    ("said", "more", "change", "says"),
    [
        ('{"a": 1}', {"response_format": {"type": "json_object"}}, cut_json, "worse in JSON: more of its answers"),
        ("Yes.", {}, looped, "more of them end in a repetition"),
        ("Yes.", {}, cut_off, "more of them are cut off at the length limit"),
        ("Yes.", {}, silent, "more of them are errors or empty"),
    ],
    ids=["json", "loops", "cut", "empty"],
)
def test_an_outcome_that_is_worse_fails_although_all_distances_are_zero(
    gate: Gate, prompts: Path, said: str, more: dict[str, Any], change: Any, says: str
) -> None:
    write(prompts, said, more)
    with servers(FakeVllm(), Changed(change=change, by_clients=True)) as (stable, worse):
        code, text = gate(stable, worse)
    assert code == FAIL, text
    assert text.startswith("fail: the candidate is worse in")
    assert says in text


def test_a_candidate_without_a_tool_parser_fails(gate: Gate, prompts: Path) -> None:
    write(prompts, CALL, {"tools": [TOOL]})
    with servers(FakeVllm(), FakeVllm(tool_parser=False)) as (stable, candidate):
        code, text = gate(stable, candidate)
    assert code == FAIL, text
    assert "worse in tool calls: more of its answers have no call that fits the tools" in text


def test_a_question_that_few_prompts_ask_is_named(gate: Gate, prompts: Path) -> None:
    write(prompts, "Yes.", {}, 110)
    plain = prompts.read_text().splitlines()
    asks = [json.dumps({**json.loads(line), "response_format": {"type": "json_object"}}) for line in plain[:5]]
    prompts.write_text("\n".join([*asks, *plain[5:]]))
    with servers(FakeVllm(), FakeVllm()) as (stable, candidate):
        code, text = gate(stable, candidate)
    assert code == PASS, text
    assert "; json, " in text
    assert " prompts, not seen enough\n" in text


def test_a_candidate_that_hangs_fails(gate: Gate) -> None:
    with servers(FakeVllm(), FakeVllm(hang=True)) as (stable, candidate):
        code, text = gate(stable, candidate, "--timeout", "1s")
    assert code == FAIL, text
    assert text.startswith("fail: the candidate did not answer 3 requests in a row: http")
    assert "no answer in time" in text


def test_a_stable_server_that_hangs_fails_no_candidate(gate: Gate) -> None:
    with servers(FakeVllm(hang=True), FakeVllm()) as (stable, candidate):
        code, text = gate(stable, candidate, "--timeout", "1s")
    assert code == UNDECIDED, text


def test_empty_answers_with_status_200_fail(gate: Gate) -> None:
    with servers(FakeVllm(), Changed(change=emptied)) as (stable, candidate):
        code, text = gate(stable, candidate)
    assert code == FAIL, text
    assert " times: the candidate's answer has no token" in text.splitlines()[0]


def test_times_are_tested_only_if_they_have_a_margin(gate: Gate) -> None:
    with servers(FakeVllm(), FakeVllm(token_delay=0.05)) as (stable, slow):
        code, text = gate(stable, slow)
        assert code == PASS, text
        assert "token_time" not in text
        code, text = gate(stable, slow, "--outcome-margin", "token_time=0.1")
    assert code == FAIL, text
    assert text.startswith("fail: the candidate is slower in each further token, as a share of the longer time")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("speed=0.3", "--outcome-margin: 'speed' is no question; name one of errors, "),
        ("cut=2", "--outcome-margin: '2' is not a number between 0 and 1"),
        ("cut", "--outcome-margin: '' is not a number between 0 and 1"),
    ],
)
def test_a_margin_that_does_not_fit_is_named(gate: Gate, given: str, says: str) -> None:
    code, text = gate("http://127.0.0.1:1", "http://127.0.0.1:1", "--outcome-margin", given)
    assert code == UNDECIDED
    assert says in text


def test_tools_need_a_chat(gate: Gate, prompts: Path) -> None:
    prompts.write_text(json.dumps({"prompt": "a", "tools": [TOOL]}))
    code, text = gate("http://127.0.0.1:1", "http://127.0.0.1:1")
    assert code == UNDECIDED
    assert ":1: tools are offered in a chat only" in text


def test_every_difference_is_within_its_range_and_changes_its_sign_with_the_sides() -> None:
    """The tests of a mean rely on it."""
    asked = Outcomes(dict.fromkeys(OUTCOMES, 0.1))
    prompt = Prompt(messages=(), prompt="a", response_format={"type": "json_object"}, tools=({},))
    random = np.random.default_rng(3)

    def drawn() -> Served:
        bad = frozenset(name for name in OUTCOMES if random.random() < 0.5)
        tokens, first, further = random.integers(0, 100), *random.random(2)
        return Served(bad, int(tokens), float(random.uniform(-1, 1)), float(first), float(further))

    for _ in range(200):
        one, other = drawn(), drawn()
        for of in (prompt, replace_format(prompt)):
            there, back = asked.excess(of, one, other), asked.excess(of, other, one)
            assert there == pytest.approx({name: -value for name, value in back.items()})
            assert all(-1.0 <= value <= 1.0 for value in there.values())


def replace_format(prompt: Prompt) -> Prompt:
    return Prompt(prompt.prompt, prompt.messages, prompt.kind, prompt.max_tokens, None, prompt.tools)
