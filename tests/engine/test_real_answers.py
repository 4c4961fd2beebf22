"""Answers from a real vLLM: on every route the client's response is unchanged, and the ids are those of the engine."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from typing import Any

import numpy as np
import pytest
from tests.support.merged_stream import merged
from tests.support.running_vllm import RunningVllm, answers_of, wait_until_signed_answers_are_recorded
from tests.support.slow import slow_unless

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

MESSAGES = [{"role": "user", "content": "Name three colours."}]
COMMON = {"temperature": 0.0}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 9, **COMMON},
    "/v1/completions": {"prompt": "Three colours are", "max_tokens": 9, **COMMON},
    "/v1/responses": {"input": MESSAGES, "max_output_tokens": 9, **COMMON},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 9, **COMMON},
}
_VARYING = re.compile(rb'"(?:id|item_id|request_id)":\s*"[^"]*"|"created(?:_at)?":\s*[0-9.]+')


def post(server: Any, route: str, body: dict[str, Any]) -> bytes:
    data = json.dumps({"model": server.model, **body}).encode()
    request = urllib.request.Request(server.url + route, data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=280) as response:
        return bytes(response.read())


def without_varying(body: bytes) -> bytes:
    return _VARYING.sub(b'"varies"', body)


@pytest.fixture(autouse=True, scope="module")
def recorded(vllm_server: RunningVllm) -> None:
    wait_until_signed_answers_are_recorded(vllm_server)


def xargs(server: RunningVllm, nonce: str, top: int = 5) -> dict[str, Any]:
    return {"vllm_xargs": server.admin.signed({"hemostat_tap": nonce, "hemostat_tap_top": str(top)})}


@pytest.mark.parametrize("stream", slow_unless({True}, (False, True)))
@pytest.mark.parametrize("route", BODIES)
def test_the_response_is_the_same_and_the_answer_whole(vllm_server: Any, route: str, stream: bool) -> None:
    body = BODIES[route] | {"stream": stream}
    nonce = f"{route.replace('/', '_')}-{stream}"
    plain = post(vllm_server, route, body)
    tapped = post(vllm_server, route, body | xargs(vllm_server, nonce))
    if stream:
        assert merged(tapped) == merged(plain)
    else:
        assert without_varying(tapped) == without_varying(plain)
    (answer,) = answers_of(vllm_server, nonce, 1)
    assert (answer.tokens, answer.top_k, answer.finish_reason, answer.choices) == (9, 5, "length", 1)
    # The same prompt as a chat, whose ids and logprobs the chat route returns.
    if route == "/v1/completions":
        reference = body | {"stream": False, "logprobs": 5}
        where = route
    else:
        reference = BODIES["/v1/chat/completions"] | {"logprobs": True, "top_logprobs": 5}
        where = "/v1/chat/completions"
    details = {"return_token_ids": True, "return_tokens_as_token_ids": True}
    given = json.loads(post(vllm_server, where, reference | details))
    choice = given["choices"][0]
    prompt = given.get("prompt_token_ids") or choice["prompt_token_ids"]
    assert np.frombuffer(answer.prompt_ids, "<i4").tolist() == prompt
    assert np.frombuffer(answer.token_ids, "<i4").tolist() == choice["token_ids"]
    ids = np.frombuffer(answer.candidate_ids, "<i4").reshape(9, 6)
    logprobs = np.frombuffer(answer.candidate_logprobs, "<f4").reshape(9, 6)
    for position in range(9):
        if where == "/v1/completions":
            top = choice["logprobs"]["top_logprobs"][position]
        else:
            entry = choice["logprobs"]["content"][position]
            top = {token["token"]: token["logprob"] for token in entry["top_logprobs"]}
        want = {int(token.removeprefix("token_id:")): value for token, value in top.items()}
        result = {int(i): float(v) for i, v in zip(ids[position], logprobs[position], strict=True) if i >= 0}
        assert result.keys() == want.keys()
        assert result == pytest.approx(want, abs=1e-4)


def test_logprobs_of_the_prompt_are_what_the_client_asked_for(vllm_server: Any) -> None:
    """vLLM refuses them in a stream."""
    body = BODIES["/v1/completions"] | {"prompt_logprobs": 2}
    plain = post(vllm_server, "/v1/completions", body)
    tapped = post(vllm_server, "/v1/completions", body | xargs(vllm_server, "prompt"))
    assert without_varying(tapped) == without_varying(plain)
    (answer,) = answers_of(vllm_server, "prompt", 1)
    assert answer.tokens == 9


def test_every_choice_of_a_request(vllm_server: Any) -> None:
    body = {"prompt": "Once", "max_tokens": 12, "n": 3, "temperature": 1.5, "seed": 7, "return_token_ids": True}
    given = json.loads(post(vllm_server, "/v1/completions", body | xargs(vllm_server, "choices")))
    answers = answers_of(vllm_server, "choices", 3)
    result = [np.frombuffer(answer.token_ids, "<i4").tolist() for answer in answers]
    assert result == [choice["token_ids"] for choice in given["choices"]]
    assert [answer.choice for answer in answers] == [0, 1, 2]
    # The numbers of the logits processor, too, are found by the ids of each choice.
    give_up = time.monotonic() + 60
    taken = []
    while len(taken) < 3 and time.monotonic() < give_up:
        with vllm_server.admin.lock:
            taps = vllm_server.admin.registry.taps
            if all(taps.covered("choices", answer.token_ids) >= answer.tokens for answer in answers):
                taken = [taps.take("choices", 99, answer.token_ids) for answer in answers]
        time.sleep(0.05)
    assert None not in taken
    assert len(taken) == 3


def test_the_clients_own_logprobs_are_what_it_asked_for(vllm_server: Any) -> None:
    body = BODIES["/v1/chat/completions"] | {"logprobs": True, "top_logprobs": 2}
    plain = post(vllm_server, "/v1/chat/completions", body)
    tapped = post(vllm_server, "/v1/chat/completions", body | xargs(vllm_server, "own"))
    assert without_varying(tapped) == without_varying(plain)
    (answer,) = answers_of(vllm_server, "own", 1)
    assert answer.top_k == 5


def test_a_number_of_candidates_above_the_servers_limit_is_no_error(vllm_server: Any) -> None:
    post(vllm_server, "/v1/messages", BODIES["/v1/messages"] | xargs(vllm_server, "limit", 128))
    (answer,) = answers_of(vllm_server, "limit", 1)
    assert answer.top_k == 64


def test_a_client_neither_fills_the_recordings_nor_forces_tokens(vllm_server: Any) -> None:
    body = BODIES["/v1/completions"] | {"return_token_ids": True}
    own = {"hemostat_tap": "client", "hemostat_tap_top": "5", "hemostat_force": [7, 7, 7], "hemostat_kv_precision": 1}
    plain = json.loads(post(vllm_server, "/v1/completions", body))["choices"][0]["token_ids"]
    for sent in (own, own | {"hemostat_mac": "a." + "0" * 32}):
        answer = json.loads(post(vllm_server, "/v1/completions", body | {"vllm_xargs": sent}))
        assert answer["choices"][0]["token_ids"] == plain
    post(vllm_server, "/v1/completions", body | xargs(vllm_server, "after"))
    answers_of(vllm_server, "after", 1)
    with vllm_server.admin.lock:
        assert not vllm_server.admin.registry.answers.complete("client", 1)
        assert vllm_server.admin.registry.taps.take("client", 1) is None
    forced = vllm_server.admin.signed({"hemostat_force": [7, 7, 7]})
    answer = json.loads(post(vllm_server, "/v1/completions", body | {"vllm_xargs": forced}))
    assert answer["choices"][0]["token_ids"][:3] == [7, 7, 7]


def test_checksums_of_the_weights_are_computed_between_requests_and_are_the_same_twice(
    vllm_server: RunningVllm,
) -> None:
    found = []
    for nonce in ("checksums-1", "checksums-2"):
        signed = vllm_server.admin.signed({"hemostat_checksums": nonce})
        post(vllm_server, "/v1/completions", {"prompt": "x", "max_tokens": 1, "vllm_xargs": signed})
        give_up = time.monotonic() + 60
        while nonce not in vllm_server.admin.registry.checksums and time.monotonic() < give_up:
            time.sleep(0.1)
        found.append(vllm_server.admin.registry.checksums[nonce])
    assert [message.detail for message in found] == ["", ""]
    assert found[0].digests == found[1].digests
    assert len(found[0].digests) > 200
    assert any("layers.9." in name and "down_proj" in name for name in found[0].digests)
    assert found[0].facts["tensor parallel size"] == "1"
    assert {"vLLM", "dtype", "KV cache dtype", "device"} <= found[0].facts.keys()
