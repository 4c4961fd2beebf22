"""`hemostat canaries` against a real vLLM with LoRA (model runner V1, on a CPU)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy as np
import pytest
from tests.support.adapter_profiles import smollm_adapter
from tests.support.running_vllm import (
    FAULTS_ARGUMENTS,
    FAULTS_ENVIRONMENT,
    VLLM_ARGUMENTS,
    RunningVllm,
    running_vllm,
)

from hemostat.canaries import client, texts
from hemostat.canaries.prompts import load
from hemostat.canaries.variants import VariantClient
from hemostat.cli import main
from hemostat.commands.canaries import CHANGED, EQUAL
from hemostat.reference.server import VllmServer
from hemostat_calibration.canaries import TOLERANCE_NATS, Canary, CanarySet
from hemostat_calibration.canary_cause import Cause, CauseBaseline
from hemostat_lab.demo.checkpoints import Checkpoints

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

T = TypeVar("T")
PROMPTS = ("The capital of France is", "def add(a, b):", "Die Hauptstadt von Italien ist", "1, 2, 3,")
STRENGTH = 0.01
"""Standard deviation of the weights' change."""


@pytest.fixture
def adapter(lora_server: RunningVllm) -> Iterator[str]:
    """One that is loaded."""
    profile = smollm_adapter(4, 7, strength=STRENGTH)
    lora_server.admin.files[profile.version] = profile.to_bytes()
    with httpx.Client(base_url=lora_server.url, timeout=300) as http:
        body = {"model": profile.version, "prompt": "x", "max_tokens": 1}
        assert http.post("/v1/completions", json=body).status_code == 200
        yield profile.version
        http.post("/v1/unload_lora_adapter", json={"lora_name": profile.version})
    lora_server.admin.files.pop(profile.version)


def test_a_set_is_equal_on_the_same_model_and_changed_on_another(
    lora_server: RunningVllm,
    adapter: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(client, "ANSWER_TOKENS", 6)
    monkeypatch.setattr(texts, "FREE_TOKENS", 8)
    prompts, path = tmp_path / "prompts", tmp_path / "set.json"
    prompts.write_text("".join(f"{n}. {text}\n" for n in range(4) for text in PROMPTS))
    assert main(["canaries", "take", lora_server.url, str(path), "--prompts", str(prompts)]) == EQUAL
    taken = CanarySet.from_bytes(path.read_bytes())
    assert taken.origin.version.startswith("0.")
    assert main(["canaries", "replay", lora_server.url, str(path)]) == EQUAL
    assert main(["canaries", "replay", f"{lora_server.url}#{adapter}", str(path)]) == CHANGED
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("equal: ")
    assert lines[2].startswith("changed: ")
    assert f"  model: {lora_server.model}, now {adapter}" in lines


async def _at_once() -> None:
    """A gate that is open."""


def asked(server: RunningVllm, ask: Callable[[VllmServer, VariantClient], Awaitable[T]]) -> T:
    async def run() -> T:
        vllm = VllmServer(server.url, timeout=300.0)
        try:
            return await ask(vllm, VariantClient(vllm, server.model, _at_once, sign=server.admin.signed))
        finally:
            await vllm.close()

    return asyncio.run(run())


def test_forced_tokens_are_decoded_with_the_log_probabilities_of_before(lora_server: RunningVllm) -> None:
    words = "The moon is a lamp of stone, and seven blue horses sang about the price of bread in Lisbon."

    async def ask(vllm: VllmServer, _: VariantClient) -> tuple[list[int], Any, list[float]]:
        ids = await vllm.tokenize(lora_server.model, words)
        body = {
            "model": lora_server.model,
            "prompt": ids[:8],
            "max_tokens": len(ids) - 8,
            "temperature": 0.0,
            "logprobs": 0,
            "return_token_ids": True,
            "vllm_xargs": lora_server.admin.signed({"hemostat_force": ids[8:]}),
        }
        answer = await vllm.post("/v1/completions", body, dict[str, Any])
        return ids, answer["choices"][0], await vllm.prompt_logprobs(lora_server.model, ids)

    ids, choice, scored = asked(lora_server, ask)
    assert choice["token_ids"] == ids[8:]
    decoded = np.array(choice["logprobs"]["token_logprobs"])
    assert np.abs(decoded - scored[7:]).mean() < 0.05  # kernels of another shape


@pytest.mark.slow
def test_faults_of_a_real_engine_have_their_causes(checkpoints: Checkpoints, tmp_path: Path) -> None:
    arguments = [argument for argument in VLLM_ARGUMENTS if argument != "--no-enable-prefix-caching"]
    arguments += ["--max-num-batched-tokens", "512", "--block-size", "32", *FAULTS_ARGUMENTS]
    faults: dict[Cause, Any] = {
        Cause.NONE: [],
        Cause.WEIGHTS: ["weights", {"layer": 9, "name": "down_proj", "scale": 1.02}],
        Cause.KV_CACHE: ["kv_cast", {"parts": "v"}],
        Cause.PREFIX_CACHE: ["stale_prefix", {}],
        Cause.BATCH: ["batch", {"layer": 7, "name": "down_proj"}],
        Cause.CHUNK_BOUNDARY: ["chunk", {"layer": 11, "name": "down_proj"}],
    }
    found: dict[Cause, str] = {}

    async def take(vllm: VllmServer, client: VariantClient) -> CauseBaseline | None:
        # A text that the model predicts with certainty, such as a repeated one, hardly changes.
        sequences = [await vllm.tokenize(server.model, prompt.prompt) for prompt in load().prompts]
        canaries = [Canary("", np.array(ids[:-1], np.int32), np.array(ids[-1:], np.int32)) for ids in sequences]
        return await client.baseline(canaries, 578)

    with running_vllm(checkpoints, tmp_path, arguments, FAULTS_ENVIRONMENT) as server:
        baseline = asked(server, take)
        assert baseline is not None
        for cause, fault in faults.items():
            body = {"method": "inject", "args": [json.dumps(fault)]}
            asked(server, lambda vllm, _: vllm.post("/collective_rpc", body, dict[str, Any]))  # noqa: B023
            verdict = baseline.explain(asked(server, lambda _, client: client.measure(baseline.text)), TOLERANCE_NATS)
            found[cause] = verdict.text if verdict.cause is not cause else ""
    assert found == dict.fromkeys(faults, "")


class WithDefault(VllmServer):
    """A server whose default temperature is another one."""

    async def post(self, path: str, body: Any, answer: type[T], **more: Any) -> T:
        default = {"temperature": 0.5} if "/completions" in path else {}
        return await super().post(path, default | body, answer, **more)


@pytest.mark.slow
@pytest.mark.usefixtures("without_variants")
def test_a_set_with_decoded_answers_finds_what_a_prefill_does_not(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "ANSWER_TOKENS", 16)
    prompts = tmp_path / "prompts"
    prompts.write_text("".join(f"{n}. {text}\n" for n in range(4) for text in PROMPTS))
    faults: dict[str, Any] = {
        "none": [],
        "decoding": ["decoding", {"layer": 9, "name": "o_proj", "scale": 1.3}],
        "none again": [],
        "not a number": ["not_a_number", {"layer": 9, "name": "o_proj"}],
        "none at last": [],
    }
    found: dict[str, tuple[bool, bool]] = {}

    async def run(server: RunningVllm) -> None:
        vllm = VllmServer(server.url, timeout=300.0)
        signed = client.CanaryClient(vllm, server.model, sign=server.admin.signed)
        plain = client.CanaryClient(vllm, server.model)
        decoded = await signed.take(load(prompts))
        with monkeypatch.context() as patch:
            patch.setattr(texts, "FREE_TEXTS", 0)  # the texts of one set are enough
            prefilled = await plain.take(load(prompts))
        assert (decoded.decoded, prefilled.decoded) == (True, False)
        for name, fault in faults.items():
            body = {"method": "inject", "args": [json.dumps(fault)]}
            await vllm.post("/collective_rpc", body, dict[str, Any])
            first = await signed.compare(decoded, TOLERANCE_NATS)
            second = await plain.compare(prefilled, TOLERANCE_NATS)
            found[name] = first[1], second[1]
        assert decoded.texts is not None
        assert len(decoded.texts.taken.excess) == texts.BASELINE_ROUNDS * texts.FREE_TEXTS * texts.FREE_TOKENS
        same, changed = await signed.texts().compare(decoded.texts)
        assert (same.other_ids, changed) == (0, False), same
        colder = WithDefault(server.url, timeout=300.0)
        _, changed = await client.CanaryClient(colder, server.model).texts().compare(decoded.texts)
        assert changed
        await vllm.close()
        await colder.close()

    with running_vllm(checkpoints, tmp_path, [*VLLM_ARGUMENTS, *FAULTS_ARGUMENTS], FAULTS_ENVIRONMENT) as server:
        asyncio.run(run(server))
    assert found == {
        "none": (False, False),
        "decoding": (True, False),
        "none again": (False, False),
        "not a number": (True, True),
        "none at last": (False, False),
    }
