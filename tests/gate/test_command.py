"""`hemostat gate` against fake vLLM servers: the verdicts, what ends it at once, restarts, and bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.fake_vllm import FakeVllm, serving

from hemostat.gate import run

PASS, FAIL, UNDECIDED = 0, 1, 2


Gate = Callable[..., tuple[int, str]]


def test_the_same_model_passes_and_another_one_fails(gate: Gate, tmp_path: Path) -> None:
    with serving(FakeVllm()) as stable, serving(FakeVllm()) as same, serving(FakeVllm(noise=1.0)) as other:
        code, text = gate(stable, same, "--expect", "same", "--margin", "0.05", "--json", str(tmp_path / "result.json"))
        assert code == PASS, text
        assert text.startswith("pass: after ")
        result = json.loads((tmp_path / "result.json").read_text())
        assert result["verdict"] == "pass"
        assert {finding["question"] for finding in result["findings"]} == {
            "stable_tokens",
            "own_answers",
            *("errors", "loops", "cut", "longer", "shorter", "sharper", "flatter"),
        }
        code, text = gate(stable, other, "--expect", "same")
        assert code == FAIL, text
        assert text.startswith("fail: the candidate is far from the stable model, on ")


def test_a_candidate_nearer_to_the_reference_passes_and_the_reverse_fails(gate: Gate, tmp_path: Path) -> None:
    page = tmp_path / "gate.html"
    with serving(FakeVllm()) as reference, serving(FakeVllm(noise=1.0)) as far, serving(FakeVllm(noise=0.3)) as near:
        more = ("--expect", "other", "--reference", reference)
        # Answers of four tokens say little of the default parameters.
        more += ("--outcome-margin", "sharper=0.15", "--outcome-margin", "flatter=0.15")
        code, text = gate(far, near, *more, "--html", str(page))
        assert code == PASS, text
        code, text = gate(near, far, *more)
        assert code == FAIL, text
        assert "farther from the reference than the stable model" in text
    assert "hemostat gate" in page.read_text()
    assert "pass: after" in page.read_text()


def test_another_chat_template_fails_at_once(gate: Gate, prompts: Path) -> None:
    prompts.write_text('{"messages": [{"role": "user", "content": "hello"}]}\n')
    with serving(FakeVllm()) as stable, serving(FakeVllm(chat_template="Be brief.")) as candidate:
        code, text = gate(stable, candidate, "--expect", "same")
    assert code == FAIL
    assert "chat template or tokenizer" in text


def test_a_candidate_that_fails_its_requests_fails_the_gate(gate: Gate) -> None:
    broken = FakeVllm(max_logprobs=5)
    with serving(FakeVllm()) as stable, serving(broken) as candidate:
        code, text = gate(stable, candidate, "--expect", "same")
    assert code == FAIL
    assert "times: the candidate failed: " in text


def test_a_stable_server_that_is_down_lets_no_candidate_pass(gate: Gate) -> None:
    broken = FakeVllm(max_logprobs=5)
    with serving(broken) as stable, serving(FakeVllm()) as candidate:
        code, text = gate(stable, candidate, "--expect", "same")
    assert code == UNDECIDED
    assert text.startswith("undecided: 3 prompts in a row failed at the stable model")


def test_evidence_is_kept_and_another_candidate_cannot_use_it(gate: Gate, tmp_path: Path, prompts: Path) -> None:
    state = tmp_path / "state.jsonl"
    lines = prompts.read_text().splitlines(keepends=True)
    prompts.write_text("".join(lines[:20]))
    with serving(FakeVllm()) as stable, serving(FakeVllm()) as same, serving(FakeVllm(noise=1.0)) as other:
        more = ("--expect", "same", "--margin", "0.05", "--state", str(state))
        code, text = gate(stable, same, *more)
        assert code == UNDECIDED
        assert "undecided: all prompts were asked after 20 prompts; about " in text
        with state.open("ab") as file:
            file.write(b'{"unit": "cut off')
        code, text = gate(stable, other, *more)
        assert code == UNDECIDED
        assert "has evidence of something else (the candidate: " in text
        prompts.write_text("".join(lines))
        code, text = gate(stable, same, *more)
        assert code == PASS, text
        before = state.read_text().splitlines()
        units = [json.loads(line)["unit"] for line in before if line.startswith('{"unit"')]
        assert len(set(units)) == len(units)
        code, again = gate(stable, same, *more)
        assert (code, again.splitlines()[0]) == (PASS, text.splitlines()[0])
        assert state.read_text().splitlines() == before


def test_a_reference_that_fails_counts_for_nothing(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "MAX_FAILURES", 3)
    reference = FakeVllm(max_logprobs=5)
    with serving(FakeVllm()) as stable, serving(FakeVllm()) as candidate, serving(reference) as broken:
        code, text = gate(stable, candidate, "--expect", "other", "--reference", broken)
    assert code == UNDECIDED
    assert "undecided: 3 prompts in a row could not be measured" in text


def test_the_time_is_over(gate: Gate) -> None:
    with serving(FakeVllm(token_delay=0.3)) as stable, serving(FakeVllm()) as candidate:
        code, text = gate(stable, candidate, "--expect", "same", "--within", "1s")
    assert code == UNDECIDED
    assert "undecided: the time is over after 0 prompts" in text


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--expect", "other"), "--reference: --expect other needs"),
        (("--expect", "same", "--reference", "m"), "--reference: --expect other needs"),
        (("--expect", "same", "--within", "soon"), "'soon' is no time; write it like 90s, 30m or 2h"),
        (("--expect", "same", "--margin", "1"), "'1' is not a number between 0 and 1"),
    ],
)
def test_options_that_do_not_fit_are_named(gate: Gate, more: tuple[str, ...], says: str) -> None:
    code, text = gate("http://127.0.0.1:1", "http://127.0.0.1:1", *more)
    assert code == UNDECIDED
    assert says in text
    assert text.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "has no prompt; write one in each line"),
        ('{"prompt": 3}\n', ":1: no prompt (Expected `str`"),
        ('{"kind": "a"}\n', ":1: give either prompt or messages"),
        ('{"prompt": "a", "max_tokens": 0}\n', ":1: max_tokens is 0; give 1 to 4096"),
    ],
)
def test_a_bad_file_of_prompts_names_its_line(gate: Gate, prompts: Path, content: str, says: str) -> None:
    prompts.write_text(content)
    code, text = gate("http://127.0.0.1:1", "http://127.0.0.1:1", "--expect", "same")
    assert code == UNDECIDED
    assert says in text


def test_a_server_that_cannot_be_reached_is_named(gate: Gate) -> None:
    code, text = gate("http://127.0.0.1:1", "http://127.0.0.1:1", "--expect", "same")
    assert code == UNDECIDED
    assert "http://127.0.0.1:1" in text
