"""Real vLLM: responses that are asked for ids only are byte for byte the same, and the ids are what it has generated.

The request itself asks the plugin for its tokens, so that Hemostat does not: that tells what the engine generated.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import numpy as np
import pytest
from tests.support.merged_stream import by_choice, joined, merged
from tests.support.running_vllm import RunningVllm, answers_of, wait_until_signed_answers_are_recorded
from tests.support.slow import slow_unless
from tests.support.wire import Wire, policy, rows, user

from hemostat.openai import parameters
from hemostat.openai.routes import CHAT, COMPLETIONS, RESPONSES, Form
from hemostat.reference.probes import keeps_responses
from hemostat.reference.server import VllmServer
from hemostat.scoring.engine_scores import EngineScorer

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

FORMS = frozenset({Form.CHAT, Form.COMPLETIONS, Form.RESPONSES})
ATTEMPTS = 3
"""On a busy machine vLLM's front end puts two steps into one event."""
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"name": "get_weather", "parameters": PARAMETERS}
UNICODE = "Repeat: 🎉🌍 日本語 été ☃"
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, {"messages": [user(UNICODE)], "logprobs": True, "top_logprobs": 3}),
    "chat, tools": (
        CHAT,
        {
            "messages": [user("Weather in Tokyo?")],
            "logprobs": True,
            "top_logprobs": 2,
            "tools": [{"type": "function", "function": TOOL}],
        },
    ),
    "completions": (COMPLETIONS, {"prompt": "🎉🌍 日本語 été ☃ 🎉🌍 日本", "logprobs": 2}),
    "completions, sampled": (COMPLETIONS, {"prompt": "1, 2, 3,", "logprobs": 3, "temperature": 1.5, "seed": 5}),
    "responses": (RESPONSES, {"input": UNICODE}),
    "responses, a stop": (RESPONSES, {"input": "Count from 1 to 10.", "stop": ["5", "five"]}),
    "responses, tools": (RESPONSES, {"input": "Weather in Tokyo?", "tools": [{"type": "function"} | TOOL]}),
    "responses, own logprobs": (
        RESPONSES,
        {"input": "Hi", "include": ["message.output_text.logprobs"], "top_logprobs": 2},
    ),
}
QUICK = {("chat", "stream"), ("completions", "stream"), ("responses", "whole"), ("responses", "stream")}
_VARYING = re.compile(rb'"(?:id|item_id|call_id)":\s*"[^"]*"|"created(?:_at)?":\s*[0-9.]+')


class One:
    """Implements `engine_scores.Engines`: there is one."""

    def __init__(self, url: str) -> None:
        self.url = url

    def current(self) -> Sequence[str]:
        return ()

    def connect(self, name: str, timeout: float) -> VllmServer:
        return VllmServer(self.url, timeout=timeout)


@pytest.fixture
def wire(vllm_server: RunningVllm) -> Iterator[Wire]:
    with httpx.Client(base_url=vllm_server.url, timeout=300) as client:
        yield Wire(client)


def tapped(server: RunningVllm, nonce: str) -> dict[str, Any]:
    """Which of equally likely ids vLLM names depends on how many it is asked for: so either request asks the plugin."""
    return {"vllm_xargs": server.admin.signed({"hemostat_tap": nonce, "hemostat_tap_top": "20"})}


@pytest.fixture(autouse=True)
def own_taps(vllm_server: RunningVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    """The relay passes on the test's own tap, which it would remove."""
    wait_until_signed_answers_are_recorded(vllm_server)
    monkeypatch.setattr(parameters, "merged_xargs", lambda request, *_: request.body.raw("vllm_xargs"))


def same(path: str, body: bytes, other: bytes) -> bool:
    if path != RESPONSES:
        return by_choice(body) == by_choice(other) or joined(body) == joined(other)
    if body.startswith(b"event:"):
        return merged(body) == merged(other)
    return _VARYING.sub(b"", body) == _VARYING.sub(b"", other)


@pytest.mark.parametrize(
    ("case", "option"), slow_unless(QUICK, [(case, option) for case in CASES for option in ("whole", "stream")])
)
async def test_the_response_is_the_same_and_its_ids_are_those_that_the_engine_generated(
    wire: Wire, vllm_server: RunningVllm, case: str, option: str
) -> None:
    path, more = CASES[case]
    limit = "max_output_tokens" if path == RESPONSES else "max_tokens"
    body = {"model": vllm_server.model, "temperature": 0, limit: 24, "stream": option == "stream"} | more
    for _ in range(ATTEMPTS):
        wire.interceptor.policy = policy(scoring=False)
        plain = wire.send(path, body | tapped(vllm_server, f"plain-{time.monotonic_ns()}"))
        wire.captures.clear()
        wire.interceptor.policy = policy(scored_again=FORMS)
        nonce = f"sampled-{time.monotonic_ns()}"
        sampled = wire.send(path, body | tapped(vllm_server, nonce), splits=random.Random(1))
        answers = answers_of(vllm_server, nonce)
        if same(path, sampled.body, plain.body):
            break
    assert plain.status == sampled.status == 200, plain.body
    assert same(path, sampled.body, plain.body), (plain.body, sampled.body)
    [capture], [answer] = wire.captures, answers
    assert (capture.ids_only, capture.generated) == (True, answer.tokens)
    assert capture.prompt_token_ids == answer.prompt_ids
    assert capture.output_token_ids == answer.token_ids
    scorer = EngineScorer(One(vllm_server.url), 20)
    try:
        completed = await scorer.with_candidates(capture)
    finally:
        await scorer.close()
    _, output, ids, _, emitted = rows(completed)
    generated = np.frombuffer(answer.emitted_logprobs, "<f4")
    assert ids.shape == (len(output), 21)
    assert np.mean(np.abs(emitted - generated)) < 0.1, "decoding and prefill differ by the noise floor"
    assert np.max(np.abs(emitted - generated)) < 0.5


async def test_vllm_keeps_no_responses_unless_it_is_told_to(vllm_server: RunningVllm) -> None:
    server = VllmServer(vllm_server.url)
    assert not await keeps_responses(server, vllm_server.model)
    assert vllm_server.log.read_text().count("resp_none") == 0
    await server.close()
