"""The whole loop on a real vLLM with a checkpoint of each format that its CPU build serves: measured, adapted,
promoted, vLLM restarted, rolled back. `-s` prints the figures.

The adapter is made by `hemostat adapt`: to learn one live takes 2,000 tokens of traffic, and does not depend on the
format (`test_adapters.py` in tests/control; a profile that is learned live in a real engine: `test_demo.py`).
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import transformers
from tests.support.constant_profile import constant_profile
from tests.support.fake_vllm import FakeVllm
from tests.support.running_vllm import LORA_ARGUMENTS, LORA_ENVIRONMENT, VLLM_ARGUMENTS
from tests.support.served import AUTHORIZED, TOKEN, Served, hemostat

from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_lab.demo.checkpoints import Checkpoints
from hemostat_lab.demo.vllm_server import VllmServer, dtype, free_port

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1800)]

MODEL, VOCABULARY = "smollm2", 49_152
LAYERS = 4
"""Of SmolLM2-135M's 30: probes and scores of the whole model take minutes more."""
SCHEMES = ("w4a16", "w4a16_gptq", "w4a16_awq", "w8a8", "fp8")
WITHOUT_ADAPTER = ("w8a8", "fp8")
"""What is promoted adds to logits, by the plugin. W8A8: with --enable-lora the server ends at the start
(`tests/lab/compression/test_in_vllm.py`). FP8: rounded inputs differ between engine and copy by as much as an adapter
changes, so that the probe cannot confirm it, and it is refused."""
LONG = 300.0
"""Seconds that only a hang takes: reference and copies are loaded, vLLM starts."""
PROMPTS = ("The three states of matter are", "Dear Sir or Madam, I am writing", "Here is a story about a fox:")
TOKENS = 16
SAME_NATS = 0.01
"""Two computations of the same are this near. An adapter on 8-bit weights may leave greedy texts as they are: it is
recognized by the tokens' log-probabilities, too."""


@dataclass(frozen=True, slots=True)
class Answers:
    """Greedy completions of `PROMPTS`."""

    texts: list[str]
    logprobs: list[float]

    def same(self, other: Answers) -> bool:
        return self.texts == other.texts and np.allclose(self.logprobs, other.logprobs, rtol=0.0, atol=SAME_NATS)


def answers(url: str, **more: Any) -> Answers:
    """more: members of the request."""
    result = Answers([], [])
    for prompt in PROMPTS:
        body = {"model": MODEL, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "logprobs": 1} | more
        answer = httpx.post(f"{url}/v1/completions", json=body | {"ignore_eos": True}, timeout=LONG)
        if answer.status_code in {502, 503}:  # the relay has not noticed yet that vLLM is back
            return Answers([], [])
        assert answer.status_code == 200, answer.text
        choice = answer.json()["choices"][0]
        result.texts.append(choice["text"])
        result.logprobs.extend(choice["logprobs"]["token_logprobs"])
    return result


def command(*arguments: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "hemostat", *map(str, arguments)], check=True)


async def divergence(served: Served, stage: str, arm: str) -> float:
    """KL(r‖c) in nats a token, once something was scored."""
    labels = {"direction": "reference_compressed", "stage": stage, "arm": arm}
    async with asyncio.timeout(LONG):
        while True:
            tokens, nats = await served.metrics("hemostat_token_kl_nats_count", "hemostat_token_kl_nats_sum", **labels)
            if tokens:
                return nats / tokens
            await asyncio.sleep(0.5)


@pytest.fixture(scope="module")
def reference(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first layers of the demo's reference."""
    whole, folder = checkpoints.reference, tmp_path_factory.mktemp("reference")
    model = transformers.AutoModelForCausalLM.from_pretrained(whole, dtype="auto", num_hidden_layers=LAYERS)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(whole).save_pretrained(folder)
    return folder


def adapter(reference: Path, compressed: Path, folder: Path) -> CalibrationProfile:
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{prompt} {n}"}) + "\n" for prompt in PROMPTS for n in range(5)))
    command(
        "adapt", reference, compressed, "--out", folder / "adapter", "--prompts", prompts, "--metric", "diagonal",
        "--max-new-tokens", f"{TOKENS}",
    )  # fmt: skip
    return CalibrationProfile.from_bytes((folder / "adapter" / "profile.safetensors").read_bytes())


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_the_whole_loop(scheme: str, reference: Path, tmp_path: Path) -> None:
    compressed, lora, port = tmp_path / scheme, scheme not in WITHOUT_ADAPTER, free_port()
    command("compress", reference, compressed, "--scheme", scheme, "--calibrate", "none")
    if lora:
        profile = adapter(reference, compressed, tmp_path)
        asked: dict[str, Any] = {"model": profile.version}
    else:
        bias = np.random.default_rng(0).normal(0.0, 1.0, VOCABULARY)
        profile = constant_profile(MODEL, bias, 1.0)
        asked = {"vllm_xargs": {"hemostat": profile.version}}
    settings: dict[str, Any] = {
        "reference": {"backend": "transformers", "model": str(reference), "dtype": dtype()},
        # vLLM answers only clients and probes: nothing is computed in a batch with the answers that are compared.
        "shadow": {"rate": 1.0, "top_k": 8, "floor_fraction": 0.0},
        "calibration": {"mode": "auto", "control_fraction": 1e-9},
        "adapter": {"enabled": lora, "compressed": str(compressed)},
        "store": {"url": f"sqlite:///{tmp_path / 'store.db'}"},
    }
    with hemostat(tmp_path, FakeVllm(), f"http://127.0.0.1:{port}", **settings) as served:
        arguments = LORA_ARGUMENTS if lora else VLLM_ARGUMENTS
        environment = {"HEMOSTAT_ADMIN_URL": served.admin, "HEMOSTAT_ENGINE_TOKEN": TOKEN}
        environment |= LORA_ENVIRONMENT if lora else {}

        def started(log: str) -> VllmServer:
            server = VllmServer(compressed, MODEL, tmp_path / log, arguments, environment, port)
            server.start()
            server.wait_ready(600.0)
            return server

        async def answered(expected: Answers) -> None:
            """Wait until clients get these answers: relays learn what serves a moment later."""
            await served.until(lambda _: answers(served.data).same(expected), LONG)

        vllm = started("vllm.log")
        try:
            # Measured.
            await served.until(lambda s: s["reference"]["state"] == "ready", LONG)
            plain = answers(vllm.url)
            await answered(plain)
            before = await divergence(served, "raw", "none")
            assert before > 0.0

            # Adapted and promoted. An adapter is ready once the engine computes with it what our copy computes.
            async with httpx.AsyncClient(base_url=served.admin, headers=AUTHORIZED, timeout=LONG) as admin:
                assert (await admin.post("/api/v1/profiles", content=profile.to_bytes())).status_code == 200
                if lora:
                    await served.until(lambda s: s["adapter"]["engine"]["ready"] == [profile.version], LONG)
                await served.until(lambda _: not answers(vllm.url, **asked).same(plain), LONG)
                adapted = answers(vllm.url, **asked)
                answer = await admin.post("/api/v1/profiles/promote", json={"version": profile.version})
                assert answer.status_code == 200, answer.text
                await answered(adapted)
                after = await divergence(served, "calibrated", "treated")
                assert not lora or after < before

                # Restarted.
                vllm.stop()
                vllm = started("again.log")
                await answered(adapted)

                # Rolled back.
                assert (await admin.post("/api/v1/profiles/rollback")).status_code == 200
                await answered(plain)
        finally:
            vllm.stop()
    print(f"{scheme}: KL {before:.4f} → {after:.4f} nats a token")
