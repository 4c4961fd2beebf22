"""vLLM is killed while requests come, and comes back: what operators see of it, everywhere."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import expect
from tests.support.chromium import chromium, needs_chromium
from tests.support.prometheus import RULES, Prometheus, config, needs, prometheus
from tests.support.stack import Stack, fake_engine, hemostat, wait_for

from hemostat import cli
from hemostat_lab.demo import vllm_server as vllm_process
from hemostat_lab.demo.checkpoints import Checkpoints

pytestmark = [
    needs("prometheus", "prometheus"),
    needs_chromium,
]
FAILED = 4
SECONDS = 60.0
"""For what takes a few; busy machines take longer."""
DOWN = "HemostatUpstreamDown"
NOTHING = "No problem found, and nothing measured yet"
HEADLINE = re.compile(r"vLLM does not answer: \d+ % of the requests of the last minute failed")


def ask(stack: Stack) -> int:
    return httpx.post(f"{stack.url}/v1/completions", json={"prompt": "Hi", "max_tokens": 1}, timeout=60).status_code


def alerts(stack: Stack) -> list[str]:
    return [problem["alert"] for problem in stack.status()["state"]["problems"]]


def hurried(folder: Path) -> Path:
    """The rules; alerts fire after 3 seconds instead of a minute."""
    made = folder / "rules.yaml"
    made.write_text(RULES.read_text().replace("for: 1m\n", "for: 3s\n"))
    return made


def printed(stack: Stack, capsys: pytest.CaptureFixture[str]) -> str:
    """By `hemostat engines`."""
    capsys.readouterr()
    assert cli.main(["engines", "--admin", str(stack.admin.base_url)]) == 0
    return capsys.readouterr().out


def outage(
    url: str, kill: Callable[[], None], start: Callable[[], None], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """kill, start: the engine at this address, which runs."""
    settings: dict[str, Any] = {
        "upstream": {"url": url},
        "reference": {"backend": "none"},
        "workers": 2,
    }
    with hemostat(settings, folder / "hemostat") as stack, chromium() as browser:
        configuration = config({"hemostat:8081": str(stack.admin.base_url.netloc, "ascii")})
        configuration["rule_files"] = [str(hurried(folder))]
        page = browser.new_page()
        with prometheus(configuration, folder / "prometheus") as scraped:
            wait_for("all is well", lambda: ask(stack) == 200 and alerts(stack) == [], SECONDS)
            wait_for("the ratio", lambda: up_ratio(stack, scraped) == (1.0, 1.0), SECONDS)
            assert " up " in printed(stack, capsys)
            page.goto(f"{stack.admin.base_url}/")
            expect(page.locator(".headline")).to_have_text(NOTHING, timeout=SECONDS * 1000)

            kill()
            assert [ask(stack) for _ in range(FAILED)] == [502] * FAILED
            wait_for("the state", lambda: alerts(stack)[:1] == [DOWN], SECONDS)
            wait_for("the share of failures", lambda: HEADLINE.fullmatch(headline(stack)), SECONDS)
            expect(page.locator(".headline")).to_have_text(HEADLINE, timeout=SECONDS * 1000)
            expect(page.locator(".verdict")).to_have_class("verdict bad")
            wait_for("the alert", lambda: DOWN in scraped.firing(), SECONDS)
            assert up_ratio(stack, scraped) == (0.0, 0.0)
            first, *table = printed(stack, capsys).splitlines()
            assert first.startswith("critical: vLLM does not answer: ")
            assert any("failing" in line for line in table)

            start()
            wait_for("the state", lambda: DOWN not in alerts(stack), SECONDS)
            wait_for("the end of the alert", lambda: DOWN not in scraped.firing(), SECONDS)
            wait_for("the ratio", lambda: up_ratio(stack, scraped) == (1.0, 1.0), SECONDS)
            assert " up " in printed(stack, capsys)
            assert alerts(stack) == [], "what failed in the outage is over with it"
            assert stack.status()["proxy"]["recent"]["failed"] == 0
            assert ask(stack) == 200
            expect(page.locator(".headline")).to_have_text(NOTHING, timeout=SECONDS * 1000)


def headline(stack: Stack) -> str:
    text: str = stack.status()["state"]["problems"][0]["text"]
    return text


def up_ratio(stack: Stack, scraped: Prometheus) -> tuple[float, float]:
    """As exported, and as scraped."""
    name = "hemostat_upstream_up_ratio"
    [series] = scraped.query(name) or [{"value": [0, "nan"]}]
    return stack.metric(name), float(series["value"][1])


@pytest.mark.timeout(300)
def test_vllm_that_is_killed_is_the_headline_until_it_comes_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with fake_engine() as engine:
        outage(engine.url, engine.kill, engine.start, tmp_path, capsys)


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_real_vllm_that_is_killed(
    checkpoints: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--enforce-eager", "--dtype", vllm_process.dtype(), "--max-model-len", "512"]
    server = vllm_process.VllmServer(checkpoints.compressed, "smollm2", tmp_path / "vllm.log", arguments)

    def start() -> None:
        server.start()
        server.wait_ready(600)

    def kill() -> None:
        os.killpg(server.pid, signal.SIGKILL)
        while server.poll() is None:
            time.sleep(0.01)

    try:
        start()
        outage(server.url, kill, start, tmp_path, capsys)
    finally:
        server.stop()
