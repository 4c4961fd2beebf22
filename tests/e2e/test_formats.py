"""The whole loop on a real vLLM with a checkpoint of each format that its CPU build serves: measured, adapted,
promoted, vLLM restarted, rolled back. `-s` prints the figures."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.support.fake_vllm import FakeVllm
from tests.support.running_vllm import LORA_ARGUMENTS, LORA_ENVIRONMENT
from tests.support.served import AUTHORIZED, TOKEN, Served, hemostat

from hemostat.demo.checkpoints import Checkpoints
from hemostat.demo.vllm_server import VllmServer, dtype, free_port

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1800)]

SCHEMES = ("w4a16", "w4a16_gptq", "w4a16_awq", "w8a8", "fp8")
LONG = 300.0
"""Seconds that only a hang takes: reference and copies are loaded, vLLM starts."""
PROMPTS = ("The three states of matter are", "Dear Sir or Madam, I am writing", "Here is a story about a fox:")
TOKENS = 16


def command(*arguments: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "hemostat", *map(str, arguments)], check=True)


def texts(url: str, model: str, prompts: Sequence[str] = PROMPTS) -> list[str]:
    """Greedy completions."""
    result = []
    for prompt in prompts:
        body = {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=LONG)
        assert answer.status_code == 200, answer.text
        result.append(answer.json()["choices"][0]["text"])
    return result


async def divergence(served: Served, **labels: str) -> float:
    """KL to the reference by token, once something was scored; `labels` say of which requests."""
    labels |= {"direction": "reference_compressed", "stage": "raw"}
    async with asyncio.timeout(LONG):
        while not (tokens := await served.metric("hemostat_token_kl_nats_count", **labels)):
            await asyncio.sleep(0.5)
    return await served.metric("hemostat_token_kl_nats_sum", **labels) / tokens


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_the_whole_loop(scheme: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    compressed, adapter = tmp_path / scheme, tmp_path / "adapter"
    command("compress", checkpoints.reference, compressed, "--scheme", scheme, "--calibrate", "none")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{prompt} {n}"}) + "\n" for prompt in PROMPTS for n in range(5)))
    command(
        "adapt", checkpoints.reference, compressed, "--out", adapter, "--prompts", prompts, "--metric", "diagonal",
        "--max-new-tokens", f"{TOKENS}",
    )  # fmt: skip
    report = json.loads((adapter / "report.json").read_text())
    version, port = report["version"], free_port()
    settings: dict[str, Any] = {
        "reference": {"backend": "transformers", "model": str(checkpoints.reference), "dtype": dtype()},
        "calibration": {"mode": "auto", "control_fraction": 1e-9},
        "adapter": {"enabled": True, "compressed": str(compressed), "rank": report["rank"]},
        "store": {"url": f"sqlite:///{tmp_path / 'store.db'}"},
    }
    with hemostat(tmp_path, FakeVllm(), f"http://127.0.0.1:{port}", **settings) as served:
        environment = {"HEMOSTAT_ADMIN_URL": served.admin, "HEMOSTAT_ENGINE_TOKEN": TOKEN, **LORA_ENVIRONMENT}

        def started(log: str) -> VllmServer:
            server = VllmServer(compressed, "smollm2", tmp_path / log, LORA_ARGUMENTS, environment, port)
            server.start()
            server.wait_ready(600.0)
            return server

        async def treated() -> None:
            """Wait until clients' requests are answered with the adapter."""
            await served.until(lambda s: s["adapter"]["engine"]["ready"] == [version], LONG)
            await served.until(lambda _: texts(served.data, vllm.model, PROMPTS[:1]) == adapted[:1], LONG)
            assert texts(served.data, vllm.model) == adapted

        vllm = started("vllm.log")
        try:
            # Measured.
            await served.until(lambda s: s["reference"]["state"] == "ready", LONG)
            plain = texts(served.data, vllm.model)
            assert texts(vllm.url, vllm.model) == plain
            before = await divergence(served)
            assert before > 0.0

            # Adapted and promoted. An adapter is ready once the engine computes with it what our copy computes.
            async with httpx.AsyncClient(base_url=served.admin, headers=AUTHORIZED, timeout=LONG) as admin:
                profile = (adapter / "profile.safetensors").read_bytes()
                assert (await admin.post("/api/v1/profiles", content=profile)).status_code == 200
                await served.until(lambda s: s["adapter"]["engine"]["ready"] == [version], LONG)
                adapted = texts(vllm.url, version)
                assert adapted != plain
                answer = await admin.post("/api/v1/profiles/promote", json={"version": version})
                assert answer.status_code == 200, answer.text
                await treated()
                after = await divergence(served, arm="treated")

                # Restarted.
                vllm.stop()
                vllm = started("again.log")
                await treated()

                # Rolled back.
                assert (await admin.post("/api/v1/profiles/rollback")).status_code == 200
                await served.until(lambda _: texts(served.data, vllm.model, PROMPTS[:1]) == plain[:1], LONG)
                assert texts(served.data, vllm.model) == plain
        finally:
            vllm.stop()
    held_out = report["held_out"]
    print(f"{scheme}: KL {before:.4f} → {after:.4f} nats a token; held out {json.dumps(held_out)[:300]}")
