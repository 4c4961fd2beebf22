"""The plugin inside a real vLLM server (model runner V1, on a CPU)."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from hemostat_calibration.profile import CalibrationProfile, temperature_bias

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

PROMPT = "The capital of France is"
VOCAB_SIZE = 49_152
FORCED = 100
"""A token that greedy decoding of PROMPT does not come to by itself."""


class Client:
    """Completions with token ids and logprobs, from the server itself."""

    def __init__(self, server: Any) -> None:
        self._server = server

    def complete(self, xargs: dict[str, Any] | None = None, **more: Any) -> tuple[int, dict[str, Any]]:
        body = {
            "model": self._server.model,
            "prompt": PROMPT,
            "max_tokens": 8,
            "temperature": 0,
            "logprobs": 5,
            "return_token_ids": True,
            **({"vllm_xargs": xargs} if xargs else {}),
            **more,
        }
        request = urllib.request.Request(
            f"{self._server.url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    def tokens(self, xargs: dict[str, Any] | None = None, **more: Any) -> list[int]:
        status, answer = self.complete(xargs, **more)
        assert status == 200, answer
        ids: list[int] = answer["choices"][0]["token_ids"]
        return ids


@pytest.fixture(scope="module")
def client(vllm_server: Any) -> Client:
    return Client(vllm_server)


@pytest.fixture(scope="module")
def plain(client: Client) -> list[int]:
    ids = client.tokens()
    assert FORCED not in ids
    return ids


def force(strength: float = 20.0) -> CalibrationProfile:
    bias = np.full(VOCAB_SIZE, -20.0, dtype=np.float32)
    bias[FORCED] = strength
    return temperature_bias("", VOCAB_SIZE, 1.0, bias, 20.0, {"strength": str(strength)})


@pytest.fixture(scope="module")
def forcing(vllm_server: Any, client: Client) -> str:
    """A profile that makes greedy decoding say one token only, held by the engine."""
    profile = force()
    held_after(vllm_server, client, profile)
    return profile.version


def held_after(server: Any, client: Client, profile: CalibrationProfile) -> float:
    """Put the profile into the engine's folder; seconds until the engine applies it."""
    partial = server.profile_dir / "partial"
    partial.write_bytes(profile.to_bytes())
    os.replace(partial, server.profile_dir / f"{profile.version}.safetensors")
    started = time.monotonic()
    while time.monotonic() - started < 30:
        if client.tokens({"hemostat": profile.version}, max_tokens=1) == [FORCED]:
            return time.monotonic() - started
        time.sleep(0.2)
    raise AssertionError("the engine does not apply the profile")


def test_a_profile_changes_the_greedy_text_and_only_where_it_is_named(
    client: Client, plain: list[int], forcing: str
) -> None:
    assert client.tokens({"hemostat": forcing}) == [FORCED] * 8
    assert client.tokens() == plain
    assert client.tokens({"other": 1}) == plain


def test_raw_logprobs_are_what_the_model_said_itself(client: Client, plain: list[int], forcing: str) -> None:
    _, untreated = client.complete()
    _, treated = client.complete({"hemostat": forcing})
    before, after = (answer["choices"][0]["logprobs"] for answer in (untreated, treated))
    # The first position has the same context: the candidates are the same, whatever was then emitted.
    emitted = set(after["top_logprobs"][0]) - set(before["top_logprobs"][0])
    assert len(emitted) == 1
    for token, logprob in before["top_logprobs"][0].items():
        assert after["top_logprobs"][0][token] == pytest.approx(logprob, abs=0.02)


def test_rows_without_a_profile_in_the_same_batch_are_untouched(client: Client, plain: list[int], forcing: str) -> None:
    asked = [{"hemostat": forcing} if i % 2 else None for i in range(16)]
    lengths = [8 + (i * 5) % 24 for i in range(16)]
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda a, n: client.tokens(a, max_tokens=n, ignore_eos=True), asked, lengths))
    for xargs, length, ids in zip(asked, lengths, found, strict=True):
        assert len(ids) == length
        if xargs:
            assert set(ids) == {FORCED}
        else:
            assert ids[:4] == plain[:4]
            assert FORCED not in ids


def test_an_unknown_version_is_identity(client: Client, plain: list[int]) -> None:
    assert client.tokens({"hemostat": "0" * 32, "hemostat_tap": "nonce"}) == plain


def test_a_version_that_arrives_in_the_middle_changes_no_running_request(
    vllm_server: Any, client: Client, forcing: str
) -> None:
    late = force(19.5)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(client.tokens, {"hemostat": late.version}, max_tokens=1500, ignore_eos=True)
        time.sleep(0.5)
        held_after(vllm_server, client, late)
        assert not running.done(), "the request ended before the profile arrived: nothing was shown"
        assert FORCED not in running.result()[:8]
        assert set(running.result()) != {FORCED}
        assert running.result().count(FORCED) < 100


def test_the_clients_own_edits_win(client: Client, forcing: str) -> None:
    assert client.tokens({"hemostat": forcing}, logit_bias={"200": 100}) == [200] * 8


@pytest.mark.parametrize(
    ("xargs", "named"),
    [
        ({"hemostat": "../../etc/passwd"}, "vllm_xargs.hemostat must be a profile version"),
        ({"hemostat": 5}, "vllm_xargs.hemostat must be a profile version"),
        ({"hemostat": ["a"]}, "vllm_xargs.hemostat must be a profile version"),
        ({"hemostat_tap": "no spaces"}, "vllm_xargs.hemostat_tap must be"),
    ],
)
def test_a_malformed_xarg_is_the_clients_400_with_the_text(client: Client, xargs: dict[str, Any], named: str) -> None:
    status, answer = client.complete(xargs)
    assert status == 400
    assert named in answer["error"]["message"]
