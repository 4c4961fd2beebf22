"""The console in a browser, on a real run: what it shows is what the API says; it recovers; it is accessible."""

from __future__ import annotations

import re
import shutil
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import ConsoleMessage, Page, expect, sync_playwright
from tests.e2e.stack import ADMIN_TOKEN, Stack, hemostat, kill, sampling_settings, wait_for

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(300),
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium (CI does)"),
]
REQUESTS = 30


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def stack(vllm_server: Any, checkpoints: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    reference = {"backend": "transformers", "model": str(checkpoints.reference)}
    settings = sampling_settings(
        vllm_server.url,
        reference,
        admin={"host": "127.0.0.1", "port": free_port(), "token": ADMIN_TOKEN},
        calibration={"mode": "observe"},
        alarm={"baseline_tokens": 200},
    )
    settings["shadow"]["floor_fraction"] = 0.5
    settings["upstream"]["openai_sampling_defaults"] = True
    with hemostat(settings, tmp_path_factory.mktemp("console")) as one:
        one.wait_scoring()

        def send(n: int) -> None:
            body = {
                "messages": [{"role": "user", "content": f"Tell me fact {n} about the sea."}],
                "max_tokens": 12,
                "temperature": n % 2,
                "seed": n,
            }
            httpx.post(f"{one.url}/v1/chat/completions", json=body, timeout=120).raise_for_status()

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(send, range(REQUESTS)))
        one.wait_settled(REQUESTS)
        wait_for("both noise floors", lambda: len(one.status()["noise_floor"]) == 2, 60)
        yield one


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as playwright:
        one = playwright.chromium.launch(executable_path=CHROMIUM)
        yield one
        one.close()


@pytest.fixture
def page(browser: Any, stack: Stack) -> Iterator[Page]:
    complaints: list[str] = []
    one: Page = browser.new_page()

    def said(message: ConsoleMessage) -> None:
        # The browser's own remarks on what tests do on purpose: a restarting server, a wrong token.
        if message.type in {"error", "warning"} and not re.search(r"ERR_|status of 401", message.text):
            complaints.append(message.text)

    one.on("console", said)
    one.on("pageerror", lambda error: complaints.append(str(error)))
    one.goto(f"{stack.admin.base_url}/")
    expect(one.locator("#connection")).to_contain_text("reference ready", timeout=15_000)
    yield one
    one.close()
    assert not complaints


def test_what_is_shown_is_what_the_api_says(page: Page, stack: Stack) -> None:
    status = stack.status()
    raw = status["raw"]
    shown = {name: page.locator(f"#{name}").inner_text() for name in ("kl", "excess", "top1", "tv", "half", "ppl")}
    assert shown["kl"] == f"≥ {raw['kl_nats']['estimate']:.3f}"
    assert shown["excess"] == f"{status['excess']['kl_nats']['estimate']:.3f}"
    assert shown["top1"] == f"{100 * raw['top1_agreement']:.1f} %"
    assert shown["tv"] == f"≥ {raw['total_variation']:.3f}"
    assert shown["ppl"] == f"{raw['perplexity_ratio']['estimate']:.3f}"
    low, high = raw["kl_nats"]["ci95"]
    assert f"[{low:.3f}, {high:.3f}]" in page.locator("#kl-sub").inner_text()
    where = page.locator("#where").inner_text()
    strategies = page.locator("#strategies").inner_text()
    for told in status["where"]:
        assert told["route"] in where
        assert f"{told['kl_nats']['estimate']:.3f}" in where
    assert {told["strategy"] for told in status["decoding"]} >= {"greedy", "t1"}
    for told in status["decoding"]:
        assert f"{told['kl_nats']['estimate']:.3f}" in strategies
    assert page.locator("#mode").inner_text() == "observe"
    cost = page.locator("#cost").inner_text()
    assert f"{status['requests']['scored']} scored" in cost
    assert re.search(r"compressed 0\.\d{5} nats", cost)
    assert f"ok {status['proxy']['by_outcome']['ok']}" in page.locator("#proxy").inner_text()
    assert page.locator("#endings").inner_text().count("none") >= 1
    expect(page.locator("#plot-kl canvas")).to_be_visible(timeout=40_000)


def test_switching_asks_for_the_token_and_says_what_happens(page: Page, stack: Stack) -> None:
    page.get_by_role("button", name="off", exact=True).click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("Set calibration to off?")
    page.get_by_label("Admin token").fill("wrong")
    with page.expect_response("**/api/v1/calibration") as answer:
        page.get_by_role("button", name="Cancel").focus()
        page.get_by_role("button", name="Confirm").press("Enter")
    assert answer.value.status == 401
    expect(page.locator("#confirm-error")).to_contain_text("Refused (401)")
    assert stack.status()["profile"]["mode"] == "observe"
    page.get_by_label("Admin token").fill(ADMIN_TOKEN)
    page.get_by_label("Admin token").press("Enter")
    expect(dialog).to_be_hidden()
    expect(page.locator("#mode")).to_have_text("off")
    assert stack.status()["profile"]["mode"] == "off"
    page.get_by_role("button", name="observe").click()
    page.get_by_role("button", name="Confirm").click()
    expect(page.locator("#mode")).to_have_text("observe")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_is_accessible_and_fits_a_phone(page: Page, scheme: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme=scheme)
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "tables scroll, the page does not"


def test_every_action_is_reached_by_the_keyboard(page: Page) -> None:
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.textContent.trim().slice(0, 30)"))
    assert {"off", "observe", "auto", "Roll back to identity", "Skip to the figures"} <= reached


def test_the_stream_comes_back_after_a_restart(page: Page, stack: Stack) -> None:
    before = page.evaluate("Number(document.documentElement.dataset.at)")
    kill(stack.process("hemostat.control"))
    expect(page.locator("#connection")).to_contain_text("no answer", timeout=10_000)
    expect(page.locator("#connection")).to_contain_text("reference", timeout=30_000)
    wait_for("a newer state", lambda: page.evaluate("Number(document.documentElement.dataset.at)") > before, 20)


def test_a_screenshot_can_be_made(page: Page, tmp_path: Path) -> None:
    path = tmp_path / "console.png"
    page.screenshot(path=path, full_page=True)
    assert path.read_bytes().startswith(b"\x89PNG")
