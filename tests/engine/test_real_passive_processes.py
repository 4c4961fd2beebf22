"""Passive mode where vLLM preempts requests, decodes speculatively, or has several API servers or engines."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.passive_vllm import PASSIVE_ARGUMENTS, POLICY, PassiveVllm, ids_of
from tests.support.running_vllm import VLLM_ARGUMENTS, running_vllm

from hemostat_lab.demo.checkpoints import Checkpoints

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]

COLOURS = ("red", "green", "blue", "white", "black", "brown")
ARGUMENTS = [*PASSIVE_ARGUMENTS, "--max-model-len", "512"]


@contextmanager
def passive_vllm(
    checkpoints: Checkpoints, folder: Path, arguments: Sequence[str], **more: Any
) -> Iterator[PassiveVllm]:
    with running_vllm(checkpoints, folder, [*ARGUMENTS, *arguments], **more) as server:
        yield PassiveVllm(server)


def asked_at_once(passive: PassiveVllm, tokens: int) -> list[list[int]]:
    """Returns the ids that each client got, for as many clients as there are colours."""

    def ask(colour: str) -> list[int]:
        body = {"prompt": f"A story about a {colour} horse:", "max_tokens": tokens, "temperature": 0.0}
        body |= {"ignore_eos": True, "return_token_ids": True}
        given: list[int] = json.loads(passive.post("/v1/completions", body))["choices"][0]["token_ids"]
        return given

    with ThreadPoolExecutor(len(COLOURS)) as clients:
        return list(clients.map(ask, COLOURS))


def assert_each_answer_came_once(passive: PassiveVllm, tokens: int) -> None:
    given = asked_at_once(passive, tokens)
    assert all(len(ids) == tokens for ids in given)
    answers = passive.wait(len(given))
    time.sleep(3.0)
    assert passive.taken == [], "an answer was handed on twice"
    assert sorted(map(ids_of, answers)) == sorted(given)
    assert all(len(np.frombuffer(answer.emitted_logprobs, "<f4")) == tokens for answer in answers)


def counted(passive: PassiveVllm, name: str) -> float:
    """Returns the sum of the engine's own counter over its labels."""
    with urllib.request.urlopen(f"{passive.server.url}/metrics", timeout=60) as response:
        text = response.read().decode()
    values = re.findall(rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)$", text, re.MULTILINE)
    assert values, f"vLLM has no {name}"
    return sum(map(float, values))


def live(passive: PassiveVllm) -> int:
    with passive.server.admin.lock:
        return passive.plugins.live(passive.server.admin.now)


def test_a_request_that_vllm_preempts_is_handed_on_once_and_whole(checkpoints: Checkpoints, tmp_path: Path) -> None:
    with passive_vllm(checkpoints, tmp_path, ["--num-gpu-blocks-override", "9"]) as passive:
        assert_each_answer_came_once(passive, 300)
        assert counted(passive, "vllm:num_preemptions_total") > 0


def test_speculative_decoding_with_model_runner_v1(checkpoints: Checkpoints, tmp_path: Path) -> None:
    speculation = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 2}
    with passive_vllm(checkpoints, tmp_path, ["--speculative-config", json.dumps(speculation)]) as passive:
        assert_each_answer_came_once(passive, 60)
        assert counted(passive, "vllm:spec_decode_num_accepted_tokens_total") > 0


@pytest.mark.parametrize("processes", ["--api-server-count", "--data-parallel-size"])
def test_two_api_servers(checkpoints: Checkpoints, tmp_path: Path, processes: str) -> None:
    """vLLM starts an API server for each data parallel engine, too."""
    arguments = [processes, "2"]
    with passive_vllm(checkpoints, tmp_path, arguments, module="tests.support.vllm_serve") as passive:
        for _ in range(3):  # the kernel deals the connections out to the two processes
            assert_each_answer_came_once(passive, 20)
        assert live(passive) == 2, "each process reports for itself"


TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Returns the weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"]},
    },
}
CONSTRAINED: tuple[dict[str, Any], ...] = (
    {"tools": [TOOL], "tool_choice": "auto"},
    {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "weather"}}},
    {"structured_outputs": {"regex": "(red|green) (horse|house)"}},
    {"include_reasoning": False},
)


def test_tools_grammars_and_hidden_reasoning(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """The logits processor sees the grammar's mask, so that requests under a grammar are handed on, too."""
    with passive_vllm(checkpoints, tmp_path, VLLM_ARGUMENTS[-2:]) as passive:
        passive.plugins.policy = replace(POLICY, grammars=True)
        time.sleep(5.0)  # the plugin asks for its policy every two seconds
        for more in CONSTRAINED:
            body = {"messages": [{"role": "user", "content": "How is the weather in Rome?"}], "max_tokens": 40}
            answer = json.loads(passive.post("/v1/chat/completions", body | more | {"return_token_ids": True}))
            (taken,) = passive.wait(1)
            assert len(ids_of(taken)) == answer["usage"]["completion_tokens"]
            if "include_reasoning" not in more:  # vLLM hides the ids with the reasoning
                assert ids_of(taken) == answer["choices"][0]["token_ids"], more
        time.sleep(3.0)
        assert passive.taken == [], "an answer was handed on twice"
