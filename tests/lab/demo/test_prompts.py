"""The shipped prompts are what they should be; a file of the user's that is not gets one line with the place."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hemostat.config.prompt_lines import PromptFileError
from hemostat_lab.demo.prompts import MAX_TOKENS, Message, Prompt, load, plan

KINDS = {"chat": 40, "summarizing": 25, "code": 30, "extraction": 25, "json": 25}
"""At least so many of each."""


def words(prompt: Prompt) -> frozenset[str]:
    return frozenset(" ".join(message.content for message in prompt.messages).lower().split())


def test_default_prompts_are_many_and_of_every_kind() -> None:
    prompts = load()
    assert len(prompts) >= 160
    counter = Counter(prompt.kind for prompt in prompts)
    assert counter.keys() == KINDS.keys()
    assert all(counter[kind] >= least for kind, least in KINDS.items()), counter


def test_default_prompts_are_well_formed() -> None:
    for prompt in load():
        roles = [message.role for message in prompt.messages]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2) + ["user"], prompt
        assert 16 <= prompt.max_tokens <= 256, prompt
        assert all(message.content.strip() == message.content != "" for message in prompt.messages), prompt


def test_default_prompts_differ() -> None:
    prompts = load()
    bags = [words(prompt) for prompt in prompts]
    for i, first in enumerate(bags):
        for j in range(i):
            overlap = len(first & bags[j]) / len(first | bags[j])
            assert overlap < 0.5, (prompts[i], prompts[j])


def test_a_user_file_needs_only_messages_and_max_tokens(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}\n\n', encoding="utf-8")
    assert load(file) == [Prompt([Message("user", "Hi")], 5)]
    file.write_text('{"messages": [{"role": "user", "content": "Hi"}]}', encoding="utf-8")
    assert load(file)[0].max_tokens == MAX_TOKENS


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "no prompt"),
        ('{"messages": []}', "messages is empty"),
        ('{"messages": [{"role": "user"}]}', "no prompt"),
        ('{"messages": [{"role": "user", "content": "x"}], "max_token": 5}', "no prompt"),
        ('{"messages": [{"role": "user", "content": "x"}], "max_tokens": 0}', "at least 1"),
        ('{"messages": [{"role": "user", "content": "x"}], "max_tokens": "9"}', "no prompt"),
        ('["x"]', "no prompt"),
        ('{"messages": [{"role": "user", "content": "\udcff"}]}', "not UTF-8 (byte 43)"),
    ],
)
def test_error_names_the_line(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "mine.jsonl"
    good = '{"messages": [{"role": "user", "content": "x"}]}'
    file.write_bytes(f"{good}\n{line}\n".encode(errors="surrogateescape"))
    with pytest.raises(PromptFileError) as caught:
        load(file)
    text = str(caught.value)
    assert text.startswith(f"{file}:2: ")
    assert message in text
    assert "\n" not in text


def test_error_names_an_empty_or_missing_file(tmp_path: Path) -> None:
    with pytest.raises(PromptFileError, match=r"--prompts: .*absent\.jsonl cannot be read"):
        load(tmp_path / "absent.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(PromptFileError, match=r"empty\.jsonl: no prompts"):
        load(tmp_path / "empty.jsonl")


@given(st.binary(max_size=200))
def test_any_bytes_give_prompts_or_a_prompt_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    file.write_bytes(data)
    with contextlib.suppress(PromptFileError):
        assert load(file)


def test_a_plan_sends_each_prompt_once_a_round_and_repeats_with_its_seed() -> None:
    prompts = load()[:20]
    first = list(islice(plan(prompts, "m", 7), 40))
    assert first == list(islice(plan(prompts, "m", 7), 40))
    assert first != list(islice(plan(prompts, "m", 8), 40))
    for half in (first[:20], first[20:]):
        assert len({json.dumps(body["messages"]) for _, body in half}) == 20
    assert len({request_id for request_id, _ in first}) == 40
    many = [body for _, body in islice(plan(prompts, "m", 1), 2000)]
    assert 0.7 < sum(body["temperature"] == 1.0 for body in many) / 2000 < 0.8
    assert 0.45 < sum(body["stream"] for body in many) / 2000 < 0.55
