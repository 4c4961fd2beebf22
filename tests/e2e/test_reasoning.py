"""A reasoning model behind a real vLLM with `--reasoning-parser`: where its thinking ends, as vLLM's own parser has it.

SmolLM2 does not think; two of its unused special tokens are renamed to the markers, and each answer is made to write
one of them by logit_bias.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.support.stack import Stack, hemostat, sampling_settings

from hemostat_lab.demo.checkpoints import Checkpoints
from hemostat_lab.demo.vllm_server import VllmServer, dtype

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1200)]

START, END = 3, 4
"""Ids of SmolLM2's `<repo_name>` and `<reponame>`, which are the markers here."""
TOKENS = 12


@pytest.fixture(scope="module")
def thinking_model(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference's checkpoint with another tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    for file in checkpoints.reference.iterdir():
        if file.name == "tokenizer.json":
            text = file.read_text(encoding="utf-8").replace("<repo_name>", "<think>").replace("<reponame>", "</think>")
            (folder / file.name).write_text(text, encoding="utf-8")
        else:
            (folder / file.name).symlink_to(file)
    return folder


@pytest.fixture(scope="module")
def stack(thinking_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("run")
    arguments = ["--enforce-eager", "--dtype", dtype(), "--max-model-len", "1024", "--reasoning-parser", "deepseek_r1"]
    vllm = VllmServer(thinking_model, "thinker", folder / "vllm.log", arguments)
    reference = {"backend": "transformers", "model": str(thinking_model), "dtype": dtype()}
    try:
        vllm.start()
        vllm.wait_ready(600.0, progress=print)
        with hemostat(sampling_settings(vllm.url, reference), folder / "hemostat") as made:
            made.wait_scoring(300.0)
            yield made
    finally:
        vllm.stop()


def ask(stack: Stack, begin: str, bias: int | None, number: int) -> dict[str, Any]:
    """The message of an answer that goes on behind `begin`. bias: the id that it is made to write."""
    body = {
        "model": "thinker",
        "messages": [{"role": "user", "content": f"Question {number}"}, {"role": "assistant", "content": begin}],
        **{"max_tokens": TOKENS, "temperature": 0, "continue_final_message": True, "add_generation_prompt": False},
        **({} if bias is None else {"logit_bias": {str(bias): 100}}),
    }
    answer = httpx.post(f"{stack.url}/v1/chat/completions", json=body, timeout=300).raise_for_status().json()
    message: dict[str, Any] = answer["choices"][0]["message"]
    return message


def test_thinking_is_split_from_the_answer_and_counted_by_how_it_ended(stack: Stack) -> None:
    assert "<think> is id 3, </think> is id 4" in stack.log.read_text()
    before = stack.status()["thinking"]["arms"]["none"]["endings"]
    cut = ask(stack, "<think>\nThe user asks", None, 1)
    assert cut["reasoning"], "vLLM's parser: all of it is thinking"
    assert not cut["content"]
    ended = ask(stack, "<think>\nThe user asks. So it is.", END, 2)
    assert not (ended["reasoning"] or "").replace("</think>", "")
    own = ask(stack, "Well, ", START, 3)
    assert not own["content"]
    skipped = ask(stack, "<think>\n\n</think>\n\nThe answer is", None, 4)
    assert skipped["reasoning"] or skipped["content"]
    stack.wait_settled()
    status = stack.status()
    endings = status["thinking"]["arms"]["none"]["endings"]
    assert {name: endings[name] - before[name] for name in endings} == {"ended": 1, "cut": 2, "stopped": 0, "none": 1}
    # The end marker is thinking, what follows it is the answer; nothing of a thinking that is cut is an answer.
    phases = {row["place"]: row for row in status["places"]["phase"]}
    assert phases["thinking"]["tokens"] == TOKENS + 1 + TOKENS
    assert phases["answer"]["tokens"] == TOKENS - 1
    assert stack.metric("hemostat_place_kl_tokens_total", division="phase", place="answer") == TOKENS - 1
    never = status["thinking"]["arms"]["none"]["never_ended"]
    assert never["estimate"] == pytest.approx(2 / 3)
    assert json.dumps(status["coverage"]["not_scored"]) == "[]"
