"""Control processes and relays apart from each other, as the README starts them, and each of them killed."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.constant_profile import constant_profile
from tests.support.fake_vllm import VOCAB, FakeVllm, serving
from tests.support.planes import CONTROL, Planes, Relay, engine, planes
from tests.support.streaming_load import Load, streaming_load

pytestmark = pytest.mark.timeout(300)
PROMPTS = [f"conversation {n}" for n in range(12)]


async def arms(relay: Relay, upstream: FakeVllm) -> dict[str, str | None]:
    """What each conversation's request asks the engine for."""
    upstream.requests.clear()
    for prompt in PROMPTS:
        assert (await relay.ask(prompt)).status_code == 200
    result: dict[str, str | None] = {}
    for body in list(upstream.requests):
        text = (body.get("messages") or [{}])[-1].get("content")
        if text in PROMPTS:
            result[text] = (body.get("vllm_xargs") or {}).get("hemostat")
    assert result.keys() == set(PROMPTS)
    return result


def none_failed(*loads: Load) -> None:
    for load in loads:
        assert (load.refused, load.cut, load.failed) == (0, 0, 0), load.failures


async def served(processes: Planes, versions: list[str], more: dict[str, Any]) -> str:
    """A profile that an operator has promoted; its version."""
    active = await processes.active()
    await processes.until(active, lambda s: s["reference"]["state"] == "ready")
    bias = np.random.default_rng(0).normal(0, 0.5, VOCAB)
    profile = constant_profile("fake", bias, 1.0)
    answer = await active.post("/api/v1/profiles", content=profile.to_bytes())
    assert answer.status_code == 200, answer.text
    version = str(answer.json()["version"])
    versions.append(version)
    answer = await active.post("/api/v1/profiles/promote", json={"version": version} | more)
    assert answer.status_code == 200, answer.text
    return version


async def test_the_active_control_process_is_killed_under_load(tmp_path: Path) -> None:
    upstream, reference = FakeVllm(noise=0.5), FakeVllm()
    settings = {"calibration": {"mode": "auto"}, "shadow": {"rate": 0.2, "top_k": 8}}
    versions: list[str] = []
    with serving(upstream) as url, serving(reference) as reference_url:
        settings["reference"] = {"backend": "vllm", "url": reference_url}
        async with planes(tmp_path, url, **settings) as processes, engine(processes.controls, versions, VOCAB):
            first, second = processes.relays
            version = await served(processes, versions, {})
            before: dict[str, str | None] = {}
            end = time.monotonic() + 60
            while version not in before.values() or await arms(second, upstream) != before:
                assert time.monotonic() < end, "the profile is served, and both relays choose the same arms"
                before = await arms(first, upstream)
            active = await processes.active()
            (standby,) = (each for each in processes.controls if each is not active)
            assert (await standby.get("/readyz")).status_code == 200, "so that updates can go on"
            async with streaming_load(first.data, 4) as load, streaming_load(second.data, 4) as other:
                active.kill()
                assert await arms(first, upstream) == before, "a loss changes no arm"
                killed = time.monotonic()
                assert await processes.active(but=active) is standby
                print(f"active after {time.monotonic() - killed:.2f} s")
                await processes.until(standby, lambda s: s["engines"]["live"] == 1)
                await load.until_more(20)
                await other.until_more(20)
            none_failed(load, other)
            end = time.monotonic() + 60
            while (after := await arms(first, upstream)) != before:
                assert time.monotonic() < end, (before, after)
            active.start()  # it waits now
            assert await processes.active() is standby


async def test_relays_find_their_control_process_again(tmp_path: Path) -> None:
    """The process alone ends; its supervisor starts it anew."""
    with serving(FakeVllm()) as url:
        async with planes(tmp_path, url, controls=1, relays=1) as processes:
            (relay,) = processes.relays
            active = await processes.active()
            (pid,) = active.children(CONTROL)
            async with streaming_load(relay.data, 4) as load:
                os.kill(pid, signal.SIGKILL)
                await load.until_more(20)
                assert await processes.active() is active
                await load.until_more(20)
            none_failed(load)
            log = relay.log.read_text()
            assert log.count("lost the control process") == 1
            assert log.count("found the control process") == 2
            shown = (await relay.get("/metrics")).text
            assert "hemostat_relays 1.0" in shown
            assert 'hemostat_requests_total{outcome="ok",route="/v1/chat/completions"}' in shown
