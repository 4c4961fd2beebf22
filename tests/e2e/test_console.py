"""The console in a browser, on a real run: what it shows is what the API says; it recovers.

States that a run does not reach, accessibility and the keyboard: tests/admin/test_console.py."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from playwright.sync_api import ConsoleMessage, Page, expect
from tests.support.chromium import chromium, needs_chromium
from tests.support.console_text import divergence_interval, nats, percent
from tests.support.stack import ADMIN_TOKEN, Stack, hemostat, kill, sampling_settings, wait_for

from hemostat_lab.demo import vllm_server as vllm_process

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,  # the same of a control process without a vLLM: tests/admin/test_console_of_control.py
    pytest.mark.timeout(900),  # the first test starts a vLLM: half a minute, or five where other work has the cores
    needs_chromium,
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
    with hemostat(settings, tmp_path_factory.mktemp("console")) as running:
        running.wait_scoring()  # by requests to the other route

        def send(n: int) -> None:
            message = {"role": "user", "content": f"Tell me fact {n} about the sea."}
            body = {"messages": [message], "max_tokens": 12, "temperature": n % 2}
            httpx.post(f"{running.url}/v1/chat/completions", json=body, timeout=120).raise_for_status()

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(send, range(REQUESTS)))
        running.wait_settled(REQUESTS)
        wait_for("both noise floors", lambda: len(running.status()["noise_floor"]) == 2)
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


@pytest.fixture
def page(browser: Any, stack: Stack) -> Iterator[Page]:
    complaints: list[str] = []
    opened: Page = browser.new_page()

    def said(message: ConsoleMessage) -> None:
        # The browser's own remarks on what tests do on purpose: a restarting server, a wrong token.
        if message.type in {"error", "warning"} and not re.search(r"ERR_|status of 401", message.text):
            complaints.append(message.text)

    opened.on("console", said)
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.goto(f"{stack.admin.base_url}/")
    expect(opened.locator(".chips")).to_contain_text("reference: ready", timeout=15_000)
    yield opened
    opened.close()
    assert not complaints


def test_what_is_shown_is_what_the_api_says(page: Page, stack: Stack) -> None:
    status = stack.status()
    # The noise floor is still measured, so the page is told this one status and nothing after it.
    told = json.dumps({"status": status | {"at": 7}, "profiles": stack.admin.get("/api/v1/profiles").json()})
    page.add_init_script(
        "window.EventSource = class extends EventTarget { constructor() { super(); setTimeout(() => "
        f"this.dispatchEvent(new MessageEvent('state', {{ data: {json.dumps(told)} }}))); }} }};"
    )

    def shown(path: str) -> str:
        page.goto(f"{stack.admin.base_url}/#/{path}")
        page.reload()
        expect(page.locator("html")).to_have_attribute("data-at", "7", timeout=30_000)
        return page.locator("main").inner_text()

    raw, overview = status["raw"], shown("")
    assert f"≥ {nats(raw['kl_nats']['estimate'])} nats per token" in overview
    assert divergence_interval(raw["kl_nats"]) in overview
    assert " tokens differ" in overview
    assert "mode observe" in overview
    assert f"{percent(status['coverage']['scored_share']['tokens'], 0)} of sampled tokens scored" in overview
    problems = status["state"]["problems"]
    assert (problems[0]["text"] if problems else "No problem found") in overview
    by_decoding = shown("divergence?by=decoding")
    assert {told["strategy"] for told in status["decoding"]} >= {"greedy", "t1"}
    for told in status["decoding"]:
        assert nats(told["kl_nats"]["estimate"]) in by_decoding
    assert f"≥ {nats(status['excess']['kl_nats']['estimate'])}" in by_decoding
    assert percent(raw["top1_agreement"]) in by_decoding
    assert f"{status['trajectory']['sampled']['half_life_tokens']['estimate']:.1f}" in by_decoding
    kinds = [kind["kind"] for kind in status["alarm"]["kinds"]]
    assert any(kind.startswith("chat") for kind in kinds)
    by_kind = shown("kinds")
    assert {kind["kind"] for kind in status["calibration"]["kinds"]} >= {*kinds, "rest"}
    for kind in status["calibration"]["kinds"]:
        assert kind["kind"] in by_kind
        assert kind["summary"] in by_kind
    assert all(kind in shown("alarm") for kind in kinds[:1])
    measured = shown("measurement")
    assert f"{status['requests']['scored']} choices scored" in measured
    floor = status["noise_floor"]["compressed"]["kl_nats"]["estimate"]
    assert f"compressed {nats(floor)} nats" in measured
    engines = shown("engines")
    assert f"ok {status['proxy']['by_outcome']['ok']}" in engines
    assert status["upstream"][0]["engine"] in engines
    finished = sum(status["endings"]["none"]["finished"].values())
    assert re.search(rf"none\s+{finished}\b", shown("profiles"))


def test_charts_have_the_historys_points(page: Page, stack: Stack) -> None:
    expect(page.locator(".timeline canvas")).to_be_visible(timeout=40_000)
    last = stack.admin.get("/api/v1/history").json()["points"]["kl_nats"][-1]
    expect(page.locator(".timeline .u-legend")).to_contain_text(nats(last), timeout=15_000)


def test_switching_asks_for_the_token_and_says_what_happens(page: Page, stack: Stack) -> None:
    page.get_by_role("link", name="Profiles").click()
    page.get_by_role("button", name="off", exact=True).click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("Set calibration to off?")
    page.get_by_label("Admin token").fill("wrong")
    with page.expect_response("**/api/v1/calibration") as answer:
        page.get_by_role("button", name="Confirm").press("Enter")
    assert answer.value.status == 401
    expect(dialog.get_by_role("alert")).to_contain_text("Refused (401)")
    assert stack.status()["profile"]["mode"] == "observe"
    page.get_by_label("Admin token").fill(ADMIN_TOKEN)
    page.get_by_label("Admin token").press("Enter")
    expect(dialog).to_be_hidden()
    expect(page.locator("#mode")).to_have_text("off")
    assert stack.status()["profile"]["mode"] == "off"
    page.get_by_role("button", name="observe").click()
    page.get_by_role("button", name="Confirm").click()
    expect(page.locator("#mode")).to_have_text("observe")


def test_the_stream_comes_back_after_a_restart(page: Page, stack: Stack) -> None:
    before = page.evaluate("Number(document.documentElement.dataset.at)")
    kill(stack.process("hemostat.control.process"))
    expect(page.get_by_role("status")).to_contain_text("does not answer", timeout=10_000)
    expect(page.get_by_role("status")).not_to_contain_text("does not answer", timeout=30_000)
    wait_for("a newer state", lambda: page.evaluate("Number(document.documentElement.dataset.at)") > before)
