"""The prompt file, and the errors for an invalid one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hemostat.config.prompt_lines import PromptFileError
from hemostat_lab.doctor.prompts import _parse, load


def test_json_lines_and_plain_text(tmp_path: Path) -> None:
    file = tmp_path / "p"
    file.write_text(
        '{"prompt": "a", "completion": "b"}\r\n\nplain, with "quotes" [and] {braces}\r\n'
        '{"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "kind": "chat"}\n'
    )
    first, second, third = load(file, None)
    assert (first.text, first.completion, first.line) == ("a", "b", 1)
    assert (second.text, second.line) == ('plain, with "quotes" [and] {braces}', 3)
    assert (third.messages, third.max_tokens, third.line) == ([{"role": "user", "content": "hi"}], 3, 4)
    assert third.display_text == "user: hi"
    assert [p.line for p in load(file, 2)] == [1, 3]


def test_default_prompts() -> None:
    assert len(load(None, None)) > 100
    assert all(prompt.messages for prompt in load(None, 3))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "x"', "no prompt ("),
        ("{}", "give either prompt or messages"),
        ('{"prompt": "x", "messages": []}', "give either prompt or messages"),
        ('{"prompt": ""}', "prompt is empty"),
        ('{"messages": []}', "messages is empty"),
        ('{"prompt": "x", "completion": ""}', "completion is empty"),
        ('{"prompt": "x", "max_tokens": 0}', "max_tokens is 0"),
        ('{"promt": "x"}', "no prompt ("),
        ('{"messages": [{"role": "user"}]}', "no prompt ("),
        ('{"prompt": 7}', "no prompt ("),
    ],
)
def test_error_names_the_line(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "good"}\n' + line + "\n")
    with pytest.raises(PromptFileError) as raised:
        load(file, None)
    assert message in str(raised.value)
    assert f"{file}:2" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_invalid_utf8(tmp_path: Path) -> None:
    file = tmp_path / "p"
    for line in (b"\xff\xfe", b'{"prompt": "\xff"}'):
        file.write_bytes(b"ok\n" + line + b"\n")
        with pytest.raises(PromptFileError, match=":2: not UTF-8"):
            load(file, None)


def test_missing_file_and_empty_file(tmp_path: Path) -> None:
    with pytest.raises(PromptFileError, match=r"--prompts: .*cannot be read"):
        load(tmp_path / "none", None)
    (tmp_path / "empty").write_text("\n  \n")
    with pytest.raises(PromptFileError, match="contains no prompt"):
        load(tmp_path / "empty", None)


@given(st.binary(max_size=80) | st.text(max_size=40).map(lambda text: json.dumps({"prompt": text}).encode()))
def test_any_line_is_a_prompt_or_an_error_of_one_line(data: bytes) -> None:
    try:
        prompt = _parse(data, "file:1", 1)
    except PromptFileError as refused:
        error = str(refused)
    else:
        assert (prompt.text is None) != (prompt.messages is None)
        return
    assert "\n" not in error
    assert error.startswith("file:1: ")
