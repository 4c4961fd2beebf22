"""The prompts for the rows on real vLLM, without vLLM."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import msgspec
from tests.bench.gate.real import CHECKPOINTS, PROMPTS, QUESTIONS, ROWS, calibration, chosen, docstrings, prompts

from hemostat.gate.asked import Asked, in_order, load
from hemostat.gate.outcomes import OUTCOMES

SYSTEM = "You are a helpful assistant."


def word_ids(text: str) -> tuple[int, ...]:
    """Returns one id for each word: coarser than a tokenizer's, so that the question is a larger part of a prompt."""
    return tuple(int.from_bytes(hashlib.sha256(word.encode()).digest()[:2], "little") for word in text.split())


def test_most_prompts_are_no_variants_of_others_and_each_kind_has_enough_for_every_question(tmp_path: Path) -> None:
    texts = chosen(docstrings())
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(msgspec.json.Encoder().encode_lines(prompts(texts)))
    read = load(file)
    assert len(read) == PROMPTS
    ordered = in_order([Asked(prompt, word_ids(f"{SYSTEM} {prompt.messages[0].content}")) for prompt in read], seed=0)
    kinds = Counter(asked.prompt.kind for asked in ordered)
    assert len(ordered) > 600
    assert kinds.keys() == QUESTIONS.keys()
    assert min(kinds.values()) >= max(outcome.min_units for outcome in OUTCOMES.values())


def test_the_choice_of_texts_does_not_depend_on_their_order_and_none_is_asked_about_and_calibrated_on() -> None:
    texts = [f"{number} {'word ' * 60}" for number in range(PROMPTS + 20)]
    ordered = chosen(texts)
    assert ordered == chosen(reversed(texts))
    asked = {prompt.messages[0].content.partition("\n\n")[0] for prompt in prompts(ordered)}
    calibrated = {line["prompt"] + line["completion"] for line in calibration(ordered)}
    assert asked | calibrated == set(texts)
    assert not asked & calibrated
    assert chosen(["short", "long " * 200]) == []


def test_every_row_names_checkpoints_that_can_be_made() -> None:
    assert {model for row in ROWS.values() for model in (row.stable, row.candidate)} <= CHECKPOINTS.keys()
