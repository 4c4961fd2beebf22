"""Real vLLM with ngram speculation (model runner V1, CPU build, without the plugin, which it refuses): several tokens a
step are captured as one each, the client gets what it would have got, and `hemostat check` says what is excluded."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from tests.support.running_vllm import VLLM_ARGUMENTS, RunningVllm, running_vllm
from tests.support.wire import Wire, normal, policy, rows, user

from hemostat.commands.setup_check import State, check
from hemostat.config.schema import Settings
from hemostat.openai.routes import CHAT, COMPLETIONS
from hemostat_lab.demo.checkpoints import Checkpoints

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
COUNTING = "one two three four five one two three four five one two three four five one two"
TOP_K = 20


@pytest.fixture(scope="module")
def server(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningVllm]:
    arguments = [*VLLM_ARGUMENTS[:-2], "--speculative-config", json.dumps(NGRAM)]
    with running_vllm(checkpoints, tmp_path_factory.mktemp("ngram"), arguments) as server:
        yield server


@pytest.fixture
def wire(server: RunningVllm) -> Iterator[Wire]:
    with httpx.Client(base_url=server.url, timeout=300) as client:
        yield Wire(client)


def drafted(server: RunningVllm) -> dict[str, float]:
    text = httpx.get(f"{server.url}/metrics").text
    return {name: float(n) for name, n in re.findall(r"^vllm:spec_decode_num_(\w+)_tokens_total\S* (\S+)", text, re.M)}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [(CHAT, {"messages": [user(f"Repeat: {COUNTING}")]}), (COMPLETIONS, {"prompt": COUNTING})],
    ids=["chat", "completions"],
)
def test_accepted_drafts_are_captured_with_their_own_logprobs(
    wire: Wire, server: RunningVllm, path: str, body: dict[str, Any], stream: bool
) -> None:
    body = {"model": server.model, "temperature": 0, "max_tokens": 40, "stream": stream} | body
    wire.interceptor.policy = policy(scoring=False)
    plain = wire.send(path, body)
    before = drafted(server)["accepted"]
    wire.interceptor.policy = policy(shadow_top_k=TOP_K)
    sampled = wire.send(path, body, splits=random.Random(1))
    assert drafted(server)["accepted"] > before
    text = re.compile(rb'"(?:content|text)":"([^"]*)"')
    assert b"".join(text.findall(normal(sampled.body))) == b"".join(text.findall(normal(plain.body)))
    assert b"token_id:" not in sampled.body
    [capture] = wire.captures
    prompt, output, _, _, emitted = rows(capture)
    assert len(output) == 40
    # The same tokens by prefill, which drafts nothing: as near as two ways to compute them are.
    asked = {"model": server.model, "prompt": prompt + output, "max_tokens": 1, "prompt_logprobs": 1}
    answer = httpx.post(f"{server.url}/v1/completions", json=asked, timeout=300).json()
    result = answer["choices"][0]["prompt_logprobs"][len(prompt) :]
    by_prefill = np.array([at[str(token)]["logprob"] for at, token in zip(result, output, strict=True)])
    difference = np.abs(np.array(emitted) - by_prefill)
    assert np.median(difference) < 0.05
    assert difference.max() < 1.0


async def test_check_says_what_speculation_excludes(server: RunningVllm) -> None:
    settings = Settings.model_validate(
        {"upstream": {"url": server.url}, "reference": {"backend": "none"}, "calibration": {"mode": "auto"}}
    )
    result = {finding.what: finding for finding in await check(settings)}
    assert result["engine plugin"].state is State.NO
    assert "decodes speculatively" in result["engine plugin"].detail
