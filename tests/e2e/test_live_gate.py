"""The live gate in a whole `hemostat serve`: relays, scoring, the store, and a control process that is killed."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from tests.support.fake_vllm import FakeVllm, serving
from tests.support.running_vllm import RunningVllm
from tests.support.stack import ADMIN_TOKEN, Stack, hemostat, sampling_settings, wait_for

from hemostat_lab.demo import vllm_server as vllm_process
from hemostat_lab.demo.checkpoints import Checkpoints

CONTROL = "hemostat.control.process"
AUTHORIZED = {"Authorization": f"Bearer {ADMIN_TOKEN}"}


def shown(stack: Stack) -> dict[str, Any]:
    gate: dict[str, Any] = stack.admin.get("/api/v1/gate").raise_for_status().json()
    return gate


def ask(stack: Stack, model: str, prompt: list[int] | str, **more: Any) -> None:
    headers = more.pop("headers", {})
    body = {"model": model, "prompt": prompt, "max_tokens": 6, "temperature": 1.0} | more
    httpx.post(f"{stack.url}/v1/completions", json=body, headers=headers, timeout=120).raise_for_status()


@pytest.mark.parametrize(
    ("state", "stable_noise", "noise"), [("fail", 0.3, 1.0), pytest.param("pass", 1.0, 0.3, marks=pytest.mark.slow)]
)
def test_a_gate_decides_on_live_traffic_although_its_process_is_killed(
    tmp_path: Path, state: str, stable_noise: float, noise: float
) -> None:
    """A pass takes 800 requests."""
    random = np.random.default_rng(3)
    candidate = FakeVllm(noise=noise)
    store = {"url": f"sqlite:///{tmp_path / 'hemostat.db'}"}
    with serving(FakeVllm(noise=stable_noise)) as stable, serving(FakeVllm()) as judge, serving(candidate) as address:
        named = {"candidate": address, "own_answers": 1.0, "tokens_per_hour": 100_000_000}
        reference = {"backend": "vllm", "url": judge}
        settings = sampling_settings(stable, reference, gate=named, store=store)
        with hemostat(settings, tmp_path / "serve") as stack:
            stack.wait_scoring()
            hidden = [7] * 30
            ask(stack, "fake", hidden, headers={"X-Hemostat-Shadow": "off"})

            def feed(until: int) -> None:
                """Sends requests until so many have counted, or there is a verdict."""
                ends = time.monotonic() + 1200.0
                while (gate := shown(stack))["state"] == "running" and gate["units"] < until:
                    assert time.monotonic() < ends, gate
                    for _ in range(5):
                        ask(stack, "fake", random.integers(0, 200, 12).tolist())

            feed(15)
            before = shown(stack)
            os.kill(stack.process(CONTROL), signal.SIGKILL)
            wait_for("another control process", lambda: answers(stack))
            after = shown(stack)
            assert after["units"] >= before["units"] - 1  # the last one may have been shown before it was stored
            assert after["began"] == before["began"]
            stack.wait_scoring()
            feed(10_000)
            gate = shown(stack)
            assert gate["state"] == state, gate
            assert gate["compared"]
            for route, asked_for in (("confirm-promotion", "pass"), ("rollback", "fail")):
                answer = stack.admin.post(f"/api/v1/gate/{route}", json={"name": "m"})
                assert answer.status_code == (200 if state == asked_for else 409)
            assert stack.metric("hemostat_gate_state", state=state) == 1.0
            events = stack.status()["alarm"]["events"]
            assert any(f"{state}: " in event["why"] for event in events)
            asked = [body for path, body in candidate.seen if path == "/v1/completions"]
            assert asked
            assert not any(body.get("prompt", [])[:30] == hidden for body in asked)
            assert stack.admin.request("DELETE", "/api/v1/gate", headers=AUTHORIZED).json()["state"] == "none"


def answers(stack: Stack) -> bool:
    try:
        return shown(stack)["state"] == "running"
    except httpx.HTTPError:
        return False


WORDS = [
    "river",
    "winter",
    "engine",
    "letter",
    "garden",
    "copper",
    "silent",
    "market",
    "yellow",
    "doctor",
    "island",
    "window",
    "coffee",
    "planet",
    "bridge",
    "summer",
    "violin",
    "castle",
    "forest",
    "pepper",
    "rocket",
    "harbor",
    "mirror",
    "candle",
    "desert",
    "ticket",
    "basket",
    "thunder",
    "museum",
    "pencil",
    "orange",
    "tunnel",
    "soldier",
    "kitchen",
    "village",
    "compass",
    "lantern",
    "blanket",
    "ocean",
    "feather",
    "hammer",
    "cricket",
    "valley",
    "teacher",
    "ladder",
    "monkey",
    "ribbon",
]


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_candidate_with_a_broken_layer_fails_before_real_models(
    vllm_server: RunningVllm, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """W4A16 serves, and the candidate is the reference itself with one layer scaled."""
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(checkpoints.reference, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.12.mlp.down_proj.weight"] *= 8.0
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    reference = {"backend": "transformers", "model": str(checkpoints.reference), "dtype": vllm_process.dtype()}
    arguments = ["--enforce-eager", "--dtype", vllm_process.dtype(), "--max-model-len", "2048"]
    server = vllm_process.VllmServer(broken, "smollm2", tmp_path / "candidate.log", arguments)
    random = np.random.default_rng(3)
    try:
        server.start()
        server.wait_ready(600.0, progress=print)
        named = {"candidate": server.url, "own_answers": 0.5, "tokens_per_hour": 100_000_000}
        with hemostat(sampling_settings(vllm_server.url, reference, gate=named), tmp_path / "serve") as stack:
            stack.wait_scoring()
            ends = time.monotonic() + 1800.0
            while (gate := shown(stack))["state"] == "running":
                assert time.monotonic() < ends, gate
                ask(stack, vllm_server.model, " ".join(random.choice(WORDS, 9)), max_tokens=8)
                print(gate["units"], gate["why"], flush=True)
        assert gate["state"] == "fail", gate
        assert "farther from the reference than the model that serves" in gate["why"]
        print(gate["why"], gate["units"])
    finally:
        server.stop()
