"""`hemostat canaries` against a real vLLM with LoRA (model runner V1, on a CPU)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tests.support.adapter_profiles import smollm_adapter
from tests.support.running_vllm import RunningVllm

from hemostat.canaries import client
from hemostat.cli import main
from hemostat.commands.canaries import CHANGED, EQUAL
from hemostat_calibration.canaries import CanarySet

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

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
