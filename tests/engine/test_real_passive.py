"""Passive mode with a real vLLM: the answers are the same, and what is handed on is what the server said.

Without the logits processor, as a server that is only measured is started: test_real_passive_processes.py.
"""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from tests.support.passive_vllm import PassiveVllm, ids_of
from tests.support.running_vllm import RunningVllm

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

MESSAGES = [{"role": "user", "content": "Name three colours."}]
CHAT: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 9, "temperature": 0.0, "return_token_ids": True}
PLAIN: dict[str, Any] = {"prompt": "Three colours are", "max_tokens": 9, "temperature": 0.0, "return_token_ids": True}


@pytest.fixture(scope="module")
def passive(lora_server: RunningVllm) -> Iterator[PassiveVllm]:
    """The shared server, in passive mode for as long as these tests take."""
    server = PassiveVllm(lora_server)
    yield server
    server.end()


def test_the_first_answer_is_whole_and_its_ids_and_logprobs_are_what_the_server_says(passive: PassiveVllm) -> None:
    given = json.loads(passive.post("/v1/completions", PLAIN))["choices"][0]
    assert given["logprobs"] is None
    (answer,) = passive.wait(1)
    assert ids_of(answer) == given["token_ids"]
    assert answer.request is not None
    assert (answer.request.route, answer.request.temperature) == ("/v1/completions", 0.0)
    # A relay asks for them in the response.
    asked = PLAIN | {"logprobs": 5, "return_tokens_as_token_ids": True}
    shown = json.loads(passive.post("/v1/completions", asked))["choices"][0]["logprobs"]
    (again,) = passive.wait(1)
    assert np.frombuffer(again.emitted_logprobs, "<f4").tolist() == pytest.approx(shown["token_logprobs"], abs=1e-5)
    assert again.emitted_logprobs == answer.emitted_logprobs


def test_chats_streams_choices_and_the_opt_outs(passive: PassiveVllm) -> None:
    given = json.loads(passive.post("/v1/chat/completions", CHAT))["choices"][0]
    (answer,) = passive.wait(1)
    assert ids_of(answer) == given["token_ids"]
    assert answer.request is not None
    assert answer.request.route == "/v1/chat/completions"
    passive.post("/v1/chat/completions", CHAT | {"stream": True})
    (streamed,) = passive.wait(1)
    assert ids_of(streamed) == ids_of(answer)
    several = PLAIN | {"n": 2, "temperature": 1.0, "seed": 3}
    choices = json.loads(passive.post("/v1/completions", several))["choices"]
    answers = sorted(passive.wait(2), key=lambda answer: answer.choice)
    assert [ids_of(a) for a in answers] == [choice["token_ids"] for choice in choices]
    passive.post("/v1/completions", PLAIN, {"X-Hemostat-Shadow": "off"})
    passive.post("/v1/completions", PLAIN | {"vllm_xargs": {"hemostat_shadow": "off"}})
    passive.post("/v1/completions", PLAIN)
    passive.wait(1)
    time.sleep(3.0)
    assert passive.taken == []
    with passive.server.admin.lock:
        assert passive.plugins.reads_headers(passive.server.admin.now)


def test_a_client_that_leaves_hands_nothing_on(passive: PassiveVllm) -> None:
    data = json.dumps({"model": passive.server.model, **PLAIN, "max_tokens": 1500, "ignore_eos": True, "stream": True})
    request = urllib.request.Request(
        passive.server.url + "/v1/completions", data.encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=280) as response:
        response.readline()
    passive.post("/v1/completions", PLAIN)
    (answer,) = passive.wait(1)
    assert answer.tokens == 9
