"""The plugin inside a real vLLM server (model runner V1, on a CPU)."""

from __future__ import annotations

import json
import os
import re
import time
import urllib.error
import urllib.request
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from tests.support import oracle
from tests.support.constant_profile import constant_profile
from tests.support.raising_processor import RAISING_CLAMP
from tests.support.stack import wait_for

from hemostat_calibration import __version__, plugin_version
from hemostat_calibration.profiles.contextual import contextual_profile
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_engine.weights import fingerprint
from hemostat_lab.demo import vllm_server as vllm_process
from hemostat_lab.demo.checkpoints import Checkpoints

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

PROMPT = "The capital of France is"
VOCAB_SIZE = 49_152
FORCED = 100
"""A token that greedy decoding of PROMPT does not produce without a profile."""


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
            with urllib.request.urlopen(request, timeout=280) as answer:
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
    return constant_profile("", bias, 20.0, {"strength": str(strength)})


@pytest.fixture(scope="module")
def forcing(vllm_server: Any, client: Client) -> str:
    """A profile, held by the engine, that makes greedy decoding repeat one token."""
    profile = force()
    load_profile(vllm_server, client, profile)
    return profile.version


def load_profile(server: Any, client: Client, profile: CalibrationProfile) -> None:
    """Put the profile into the engine's folder and wait until the engine applies it."""
    partial = server.profile_dir / "partial"
    partial.write_bytes(profile.to_bytes())
    os.replace(partial, server.profile_dir / f"{profile.version}.safetensors")
    give_up = time.monotonic() + 120
    while time.monotonic() < give_up:
        if client.tokens({"hemostat": profile.version}, max_tokens=1) == [FORCED]:
            return
        time.sleep(0.2)
    raise AssertionError("the engine does not apply the profile")


def test_profile_changes_the_greedy_text_of_requests_that_name_it(
    client: Client, plain: list[int], forcing: str
) -> None:
    assert client.tokens({"hemostat": forcing}) == [FORCED] * 8
    assert client.tokens() == plain
    assert client.tokens({"other": 1}) == plain


def test_raw_logprobs_are_those_of_the_model(client: Client, plain: list[int], forcing: str) -> None:
    _, untreated = client.complete()
    _, treated = client.complete({"hemostat": forcing})
    before, after = (answer["choices"][0]["logprobs"] for answer in (untreated, treated))
    # The first position has the same context: the candidates are the same, whatever was then emitted.
    emitted = set(after["top_logprobs"][0]) - set(before["top_logprobs"][0])
    assert len(emitted) == 1
    for token, logprob in before["top_logprobs"][0].items():
        assert after["top_logprobs"][0][token] == pytest.approx(logprob, abs=0.02)


def test_rows_without_a_profile_in_the_same_batch_are_unchanged(client: Client, plain: list[int], forcing: str) -> None:
    asked = [{"hemostat": forcing} if i % 2 else None for i in range(16)]
    lengths = [8 + (i * 5) % 24 for i in range(16)]
    with ThreadPoolExecutor(16) as pool:
        result = list(pool.map(lambda a, n: client.tokens(a, max_tokens=n, ignore_eos=True), asked, lengths))
    for xargs, length, ids in zip(asked, lengths, result, strict=True):
        assert len(ids) == length
        if xargs:
            assert set(ids) == {FORCED}
        else:
            assert ids[:4] == plain[:4]
            assert FORCED not in ids


def test_unknown_version_is_identity(vllm_server: Any, client: Client, plain: list[int]) -> None:
    assert client.tokens(vllm_server.admin.signed({"hemostat": "0" * 32, "hemostat_tap": "nonce"})) == plain


def test_profile_that_arrives_later_does_not_change_a_running_request(
    vllm_server: Any, client: Client, forcing: str
) -> None:
    late = force(19.5)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(client.tokens, {"hemostat": late.version}, max_tokens=240, ignore_eos=True)
        time.sleep(0.5)
        load_profile(vllm_server, client, late)
        assert not running.done(), "the request ended before the profile arrived: the test shows nothing"
        assert FORCED not in running.result()[:8]
        assert set(running.result()) != {FORCED}
        assert running.result().count(FORCED) < 100


def test_client_logit_bias_has_priority(client: Client, forcing: str) -> None:
    assert client.tokens({"hemostat": forcing}, logit_bias={"200": 100}) == [200] * 8


@pytest.mark.parametrize(
    ("xargs", "named"),
    [
        ({"hemostat": "../../etc/passwd"}, "vllm_xargs.hemostat must be a profile version"),
        ({"hemostat": 5}, "vllm_xargs.hemostat must be a profile version"),
        ({"hemostat": ["a"]}, "vllm_xargs.hemostat must be a profile version"),
    ],
)
def test_invalid_xarg_is_http_400_with_the_reason(client: Client, xargs: dict[str, Any], named: str) -> None:
    status, answer = client.complete(xargs)
    assert status == 400
    assert named in answer["error"]["message"]
    assert plugin_version.read(answer["error"]["message"]) == __version__


@dataclass(frozen=True, slots=True)
class Said:
    """A request's prompt and output ids, its raw top-20 log-probabilities [T, 20], and what the engine tapped."""

    prompt: list[int]
    output: list[int]
    ids: np.ndarray
    logprobs: np.ndarray
    tap: Any


def tapped(server: Any, client: Client, nonce: str, version: str | None = None, tokens: int = 24) -> Said:
    xargs = server.admin.signed({"hemostat_tap": nonce} | ({"hemostat": version} if version else {}))
    status, answer = client.complete(
        xargs, max_tokens=tokens, ignore_eos=True, logprobs=20, return_tokens_as_token_ids=True
    )
    assert status == 200, answer
    (choice,) = answer["choices"]
    # The emitted token is added when it is not one of the twenty.
    tops = [sorted(top.items(), key=lambda item: -item[1])[:20] for top in choice["logprobs"]["top_logprobs"]]
    ids = np.array([[int(name.removeprefix("token_id:")) for name, _ in top] for top in tops])
    logprobs = np.array([[value for _, value in top] for top in tops])
    registry = server.admin.registry
    give_up = time.monotonic() + 120
    while registry.taps.covered(nonce) < tokens:
        assert time.monotonic() < give_up, "the engine sent no tap"
        time.sleep(0.1)
    with server.admin.lock:
        tap = registry.taps.take(nonce, tokens)
    return Said(choice["prompt_token_ids"], choice["token_ids"], ids, logprobs, tap)


@pytest.fixture(scope="module")
def contextual(vllm_server: Any, client: Client, plain: list[int]) -> CalibrationProfile:
    """A contextual profile with strong shifts, held by the engine and first in what is to be held; its anchors are the
    ids that stand at the top of the plain text's positions, and as many more."""
    _, answer = client.complete(logprobs=20, return_tokens_as_token_ids=True)
    tops = answer["choices"][0]["logprobs"]["top_logprobs"]
    likely = {int(name.removeprefix("token_id:")) for top in tops for name in top}
    rng = np.random.default_rng(7)
    others = [int(i) for i in rng.permutation(VOCAB_SIZE) if int(i) not in likely][: len(likely)]
    anchors = np.array(sorted(likely) + others)
    rank, features = 16, len(anchors) // 2
    profile = contextual_profile(
        model="",
        anchors=anchors,
        linear=rng.normal(0.0, 0.3 / np.sqrt(features), (rank, features)),
        offset=rng.normal(0.0, 0.5, rank),
        up=rng.normal(0.0, 1.5, (VOCAB_SIZE, rank)),
        clamp_nats=3.0,
    )
    vllm_server.admin.files[profile.version] = profile.to_bytes()
    with vllm_server.admin.lock:
        vllm_server.admin.registry.set_wanted([profile.version])
    for _ in range(100):
        if profile.version in vllm_server.admin.registry.acknowledged(0.0):
            return profile
        time.sleep(0.2)
    raise AssertionError("the engine does not hold the profile")


def test_contextual_profile_changes_only_treated_requests(
    client: Client, plain: list[int], contextual: CalibrationProfile
) -> None:
    asked = [{"hemostat": contextual.version} if i % 2 else None for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        result = list(pool.map(client.tokens, asked))
    treated = client.tokens({"hemostat": contextual.version})
    assert treated[:4] != plain[:4]
    for xargs, ids in zip(asked, result, strict=True):
        assert ids[:4] == (treated if xargs else plain)[:4]


def rows_masked(server: Any) -> int:
    """As the engine reports it, about once a second."""
    with server.admin.lock:
        return int(server.admin.registry.counters(0.0).get("rows_masked", 0))


def test_grammar_is_obeyed_and_rows_with_masked_anchors_are_unchanged(
    vllm_server: Any, client: Client, forcing: str, contextual: CalibrationProfile
) -> None:
    """vLLM masks first: the token that the profile forces is not allowed and stays masked."""
    grammar: dict[str, Any] = {"structured_outputs": {"regex": "[0-9]{4}-[0-9]{2}"}, "max_tokens": 12}
    _, answer = client.complete(**grammar)
    text, plain = answer["choices"][0]["text"], client.tokens(**grammar)
    assert re.fullmatch("[0-9]{4}-[0-9]{2}", text), "nothing is shown where the grammar is not at work"
    assert client.tokens({"hemostat": forcing}, **grammar) == plain
    before = rows_masked(vllm_server)
    xargs = vllm_server.admin.signed({"hemostat": contextual.version, "hemostat_tap": "grammar"})
    assert client.tokens(xargs, **grammar) == plain
    give_up = time.monotonic() + 120
    while rows_masked(vllm_server) == before or vllm_server.admin.registry.taps.covered("grammar") < len(plain):
        assert time.monotonic() < give_up, "no masked row was counted"
        time.sleep(0.1)
    with vllm_server.admin.lock:
        tap = vllm_server.admin.registry.taps.take("grammar", 99)
    assert tap.applied == contextual.version
    assert not np.isfinite(tap.features.values).any()
    assert np.abs(tap.log_normalizer[contextual.version]).max() < 1e-5


def test_a_profile_that_raises_is_off_and_the_server_continues(
    vllm_server: Any, client: Client, plain: list[int], forcing: str
) -> None:
    raising = constant_profile("", np.ones(VOCAB_SIZE), RAISING_CLAMP)
    registry = vllm_server.admin.registry
    vllm_server.admin.files[raising.version] = raising.to_bytes()

    def held() -> bool:
        with vllm_server.admin.lock:
            return raising.version in registry.acknowledged(0.0)

    with vllm_server.admin.lock:
        before = registry._wanted
        registry.set_wanted([*before, raising.version])
    wait_for("the profile is held", held)
    tap = vllm_server.admin.signed({"hemostat": raising.version, "hemostat_tap": "raises"})
    asked = [tap, {"hemostat": forcing}, None]
    with ThreadPoolExecutor(3) as pool:
        result = list(pool.map(client.tokens, asked))
    assert (result[0][:4], result[1], result[2][:4]) == (plain[:4], [FORCED] * 8, plain[:4])
    wait_for("it is not held any more", lambda: not held())
    wait_for("its tap", lambda: registry.taps.covered("raises") == 8)
    with vllm_server.admin.lock:
        tap = registry.taps.take("raises", 8)
        assert registry.counters(0.0)["profiles_failed"] == 1
        registry.set_wanted(before)
    assert (tap.applied, tap.mixed) == (None, False)
    assert client.tokens({"hemostat": raising.version})[:4] == plain[:4]
    said = f"profile {raising.version} is off in this engine: OutOfMemoryError: injected"
    assert vllm_server.log.read_text().count(said) == 1
    assert not held(), "it is not loaded again"


@pytest.fixture(scope="module")
def model(checkpoints: Any) -> Any:
    """The same checkpoint in transformers: other kernels, the same weights."""
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # compressed-tensors imports what torch deprecates
        return AutoModelForCausalLM.from_pretrained(checkpoints.compressed, dtype=vllm_process.dtype())


@pytest.mark.parametrize("treated", [False, True])
def test_taps_equal_the_model_and_the_text_equals_the_numpy_profile(
    vllm_server: Any, client: Client, contextual: CalibrationProfile, model: Any, treated: bool
) -> None:
    import torch

    version = contextual.version if treated else None
    said = tapped(vllm_server, client, f"context-{treated}", version)
    assert (said.tap.applied, said.tap.mixed) == (version, False)
    features = said.tap.features
    anchors = contextual.parameters["anchors"]
    assert features.anchors == oracle.anchors_digest(anchors)
    assert features.values.shape == (24, len(anchors))
    assert np.isfinite(features.values).all()

    # Logits and log-probabilities differ by one constant per row.
    compared = 0
    column = {int(anchor): i for i, anchor in enumerate(anchors)}
    for row, (ids, logprobs) in enumerate(zip(said.ids, said.logprobs, strict=True)):
        known = [k for k, i in enumerate(ids) if int(i) in column]
        difference = features.values[row, [column[int(ids[k])] for k in known]] - logprobs[known]
        compared += len(known)
        if known:
            assert np.ptp(difference) < 0.02
    assert compared > 100

    # The emitted tokens are those of the numpy implementation.
    shifted = said.logprobs + oracle.shift_at(
        contextual, said.ids, said.logprobs, oracle.code(contextual, features.values)
    )
    ranked = np.sort(shifted if treated else said.logprobs, axis=-1)
    best = np.take_along_axis(said.ids, (shifted if treated else said.logprobs).argmax(-1)[:, None], -1)[:, 0]
    # Below the twentieth there is more, which the clamp may lift by three nats: judge where that is not enough.
    sure = (ranked[:, -1] - ranked[:, -2] > 0.05) & (ranked[:, -1] > said.logprobs.min(-1) + contextual.clamp_nats)
    assert sure.sum() >= 4
    assert (best == np.array(said.output))[sure].all()

    # transformers makes the same features and log-normalizer of the same tokens.
    with torch.inference_mode():
        z = model(torch.tensor([said.prompt + said.output])).logits[0].float().numpy()
    z = z[len(said.prompt) - 1 : -1]
    want = z[:, anchors] - z[:, anchors].mean(-1, keepdims=True)
    # 0.059 on a processor with AMX, whose kernels round differently; features of other positions differ by more than 1.
    assert np.sqrt(np.mean((features.values - want) ** 2)) < 0.1 * want.std()
    c = np.exp(z - z.max(-1, keepdims=True).astype(np.float64))
    delta = oracle.shift(contextual, z)
    log_normalizer = np.log((c * np.exp(delta)).sum(-1) / c.sum(-1))
    got = said.tap.log_normalizer[contextual.version]
    assert np.abs(got - log_normalizer).mean() < 0.1
    assert np.corrcoef(got, log_normalizer)[0, 1] > 0.99


def test_reports_carry_the_fingerprint_of_the_checkpoint(vllm_server: Any, checkpoints: Checkpoints) -> None:
    expected = {fingerprint(str(vllm_process.runnable(checkpoints.compressed))): 1}
    for _ in range(100):
        with vllm_server.admin.lock:
            result = vllm_server.admin.registry.weights({vllm_server.model}, 0.0)
        if result:
            break
        time.sleep(0.2)
    assert result == expected
