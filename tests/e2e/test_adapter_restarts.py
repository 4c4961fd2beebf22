"""An adapter that an operator promoted, in a real vLLM: it serves clients again after `kill -9` of the control process,
and after SIGHUP that replaces it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from tests.support.fake_vllm import FakeVllm
from tests.support.real_adapter_host import corrections_of
from tests.support.running_vllm import RunningVllm
from tests.support.served import AUTHORIZED, Served, hemostat

from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_lab.demo.checkpoints import Checkpoints
from hemostat_lab.demo.vllm_server import dtype

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1800)]

CONTROL = "hemostat.control.process"
LONG = 300.0
"""Seconds that only a hang takes: reference and copies are loaded anew."""
PROMPTS = ("The three states of matter are", "Dear Sir or Madam, I am writing", "Here is a story about a fox:")


def text(url: str, model: str, prompt: str) -> str:
    body = {"model": model, "prompt": prompt, "max_tokens": 24, "temperature": 0, "ignore_eos": True}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=LONG)
    assert answer.status_code == 200, answer.text
    result: str = answer.json()["choices"][0]["text"]
    return result


@pytest.fixture
def adapter(lora_server: RunningVllm, checkpoints: Checkpoints) -> Iterator[CalibrationProfile]:
    """Unloaded at the end."""
    made = corrections_of(checkpoints)[0]
    yield made
    httpx.post(f"{lora_server.url}/v1/unload_lora_adapter", json={"lora_name": made.version}, timeout=LONG)


@pytest.fixture
def served(lora_server: RunningVllm, checkpoints: Checkpoints, tmp_path: Path) -> Iterator[Served]:
    """Adapters come from a shared folder: the server's plugin reports to an admin port of the tests."""
    shared = tmp_path / "shared"
    shared.mkdir()
    settings: dict[str, Any] = {
        "reference": {"backend": "transformers", "model": str(checkpoints.reference), "dtype": dtype()},
        "shadow": {"rate": 0.0},
        "calibration": {"mode": "auto", "control_fraction": 1e-9},
        "adapter": {"enabled": True, "compressed": str(checkpoints.compressed), "folder": str(shared)},
        "store": {"url": f"sqlite:///{tmp_path / 'store.db'}"},
    }
    with hemostat(tmp_path, FakeVllm(), lora_server.url, **settings) as process:
        yield process


async def test_a_promoted_adapter_serves_again_after_kill_9_and_after_sighup(
    lora_server: RunningVllm, adapter: CalibrationProfile, served: Served
) -> None:
    version, base = adapter.version, lora_server.model

    async def treated() -> dict[str, Any]:
        """Wait until a client's request is answered with the adapter; then all of them are. The status."""
        status = await served.until(lambda s: s["reference"]["state"] == "ready", LONG)
        assert [kind["version"] for kind in status["calibration"]["kinds"]] == [version], status["calibration"]
        await served.until(lambda s: s["adapter"]["engine"]["ready"] == [version], LONG)
        await served.until(lambda _: text(served.data, base, PROMPTS[0]) == adapted[0], LONG)
        assert [text(served.data, base, prompt) for prompt in PROMPTS] == adapted
        return status

    await served.until(lambda s: s["reference"]["state"] == "ready", LONG)
    plain = [text(lora_server.url, base, prompt) for prompt in PROMPTS]
    async with httpx.AsyncClient(base_url=served.admin, headers=AUTHORIZED, timeout=LONG) as admin:
        assert (await admin.post("/api/v1/profiles", content=adapter.to_bytes())).status_code == 200
        await served.until(lambda s: s["adapter"]["engine"]["ready"] == [version], LONG)
        adapted = [text(lora_server.url, version, prompt) for prompt in PROMPTS]
        assert adapted[0] != plain[0]
        answer = await admin.post("/api/v1/profiles/promote", json={"version": version})
        assert answer.status_code == 200, answer.text
    await treated()

    (control,) = served.pids(CONTROL)
    os.kill(control, signal.SIGKILL)
    await served.until(lambda _: served.pids(CONTROL) not in (set(), {control}), LONG)
    status = await treated()
    assert status["calibration"]["kinds"][0]["chosen"]

    (control,) = served.pids(CONTROL)
    path = served.log.parent / "hemostat.yaml"
    given = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(given | {"shadow": given["shadow"] | {"top_k": 4}}))
    served.process.send_signal(signal.SIGHUP)
    await served.until(lambda s: s["top_k"] == 4, LONG)
    assert served.pids(CONTROL).isdisjoint({control})
    await treated()
    events = (await served.get("/api/v1/profiles")).json()["events"]
    assert [event["decision"] for event in events] == ["promote", "import"]
