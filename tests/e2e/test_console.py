"""The console in a browser, on a real run: what it shows is what the API says; it recovers; it is accessible."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import ConsoleMessage, Page, expect, sync_playwright
from tests.support.console_text import divergence_interval, interval, nats, percent
from tests.support.stack import ADMIN_TOKEN, Stack, hemostat, kill, sampling_settings, wait_for

from hemostat.demo import vllm_server as vllm_process

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(900),  # the first test starts a vLLM: half a minute, or five where other work has the cores
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium (CI does)"),
]
REQUESTS = 30


@pytest.fixture(scope="module")
def stack(vllm_server: Any, checkpoints: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    reference = {"backend": "transformers", "model": str(checkpoints.reference), "dtype": vllm_process.dtype()}
    settings = sampling_settings(
        vllm_server.url,
        reference,
        admin={"host": "127.0.0.1", "port": vllm_process.free_port(), "token": ADMIN_TOKEN},
        calibration={"mode": "observe"},
        alarm={"baseline_requests": 30},
    )
    settings["shadow"]["floor_fraction"] = 0.5
    settings["upstream"]["openai_sampling_defaults"] = True
    with hemostat(settings, tmp_path_factory.mktemp("console")) as one:
        one.wait_scoring()  # by requests to the other route

        def send(n: int) -> None:
            message = {"role": "user", "content": f"Tell me fact {n} about the sea."}
            body = {"messages": [message], "max_tokens": 12, "temperature": n % 2}
            httpx.post(f"{one.url}/v1/chat/completions", json=body, timeout=120).raise_for_status()

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(send, range(REQUESTS)))
        one.wait_settled(REQUESTS)
        wait_for("both noise floors", lambda: len(one.status()["noise_floor"]) == 2)
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
    # The noise floor is still measured, so the page is told this one status and nothing after it.
    told = json.dumps({"status": status | {"at": 7}, "profiles": stack.admin.get("/api/v1/profiles").json()})
    stream = {"content_type": "text/event-stream", "body": f"retry: 600000\nevent: state\ndata: {told}\n\n"}
    page.route("**/api/v1/stream", lambda route: route.fulfill(**stream))
    page.reload()
    expect(page.locator("html")).to_have_attribute("data-at", "7", timeout=30_000)
    raw = status["raw"]

    def shown(name: str) -> str:
        return page.locator(f"#{name}").inner_text()

    assert shown("kl") == f"≥ {nats(raw['kl_nats']['estimate'])}"
    assert divergence_interval(raw["kl_nats"]) in shown("kl-sub")
    assert f"≤ {nats(raw['kl_nats_upper']['estimate'])}" in shown("kl-sub")
    assert shown("excess") == f"≥ {nats(status['excess']['kl_nats']['estimate'])}"
    low, high = status["excess"]["kl_nats"]["ci95"]
    if low <= raw["kl_nats"]["ci95"][0] - raw["kl_nats"]["cap"]:
        assert f"[–, {nats(high)}]" in shown("excess-sub"), "the few requests of the floor bound nothing"
    else:
        assert interval([low, high]) in shown("excess-sub")
    assert shown("top1") == percent(raw["top1_agreement"])
    assert shown("tv") == f"≥ {nats(raw['total_variation'])}"
    assert shown("ppl") == nats(raw["perplexity_ratio"]["estimate"])
    assert shown("half") == f"{status['trajectory']['sampled']['half_life_tokens']['estimate']:.1f}"
    assert f"{status['requests']['scored']} scored choices" in shown("divergence-note")
    where, strategies = shown("where"), shown("strategies")
    for told in status["where"]:
        assert told["route"] in where
        assert nats(told["kl_nats"]["estimate"]) in where
        assert divergence_interval(told["kl_nats"]) in where
    assert {told["strategy"] for told in status["decoding"]} >= {"greedy", "t1"}
    for told in status["decoding"]:
        assert nats(told["kl_nats"]["estimate"]) in strategies
    kinds = [kind["kind"] for kind in status["alarm"]["kinds"]]
    assert any(kind.startswith("chat") for kind in kinds)
    assert all(kind in shown("baselines") for kind in kinds)
    by_kind = shown("kinds")
    assert {kind["kind"] for kind in status["calibration"]["kinds"]} >= {*kinds, "rest"}
    for kind in status["calibration"]["kinds"]:
        assert kind["kind"] in by_kind
        assert kind["summary"] in by_kind
    for kind in status["kinds"]:
        assert nats(kind["raw"]["kl_nats"]["estimate"]) in shown("gains")
    assert "nothing to compare" in shown("outcomes")
    assert shown("workload").startswith("Workload: ")
    assert shown("mode") == "observe"
    assert status["compressed"]["models"][0] in shown("models")
    assert f"{status['requests']['scored']} choices scored" in shown("rate-sub")
    floor = status["noise_floor"]["compressed"]["kl_nats"]["estimate"]
    assert f"compressed {nats(floor)} nats" in shown("cost")
    assert f"ok {status['proxy']['by_outcome']['ok']}" in shown("proxy")
    assert shown("requests-sub") == f"{status['proxy']['requests']} so far"
    finished = sum(status["endings"]["none"]["finished"].values())
    assert re.search(rf"none\s+{finished}\b", shown("endings"))


def test_plots_have_the_historys_points(page: Page, stack: Stack) -> None:
    expect(page.locator("#plot-kl canvas")).to_be_visible(timeout=40_000)
    last = stack.admin.get("/api/v1/history").json()["kl_nats"][-1]
    expect(page.locator("#plot-kl .u-legend")).to_contain_text(f"since the start{nats(last)}", timeout=15_000)


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
    wide = page.evaluate(
        """(width) => [...document.querySelectorAll("*")]
          .filter((one) => one.getBoundingClientRect().right > width && !one.closest(".scroll"))
          .map((one) => `${one.tagName} ${one.id} ${one.className}: ${one.textContent.slice(0, 200)}`)""",
        width,
    )
    assert not wide, "tables scroll, the page does not"
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_every_action_is_reached_by_the_keyboard(page: Page) -> None:
    reached = []
    for _ in range(80):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.textContent.trim().slice(0, 40)"))
    assert reached[0] == "Skip to the figures"
    assert {
        "off",
        "observe",
        "auto",
        "Roll back all kinds to identity",
        "Explain all",
        "When is an alarm raised?",
    } <= set(reached)
    page.get_by_role("button", name="observe").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    inside = set()
    for _ in range(8):
        page.keyboard.press("Tab")
        inside.add(
            page.evaluate(
                "document.activeElement.closest('dialog') !== null || document.activeElement === document.body"
            )
        )
    assert inside == {True}, "the focus stays in the dialog"
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    assert page.evaluate("document.activeElement.textContent") == "observe", "and returns to where it was"


def test_the_stream_comes_back_after_a_restart(page: Page, stack: Stack) -> None:
    before = page.evaluate("Number(document.documentElement.dataset.at)")
    kill(stack.process("hemostat.control.process"))
    expect(page.locator("#connection")).to_contain_text("does not answer", timeout=10_000)
    expect(page.locator("#connection")).to_contain_text("reference", timeout=30_000)
    wait_for("a newer state", lambda: page.evaluate("Number(document.documentElement.dataset.at)") > before)
