"""The console on states that a short real run does not reach: an alarm, profiles that serve and wait, arms, drops.

On a real run: tests/e2e/test_console.py.
"""

from __future__ import annotations

import math
import re
import shutil
import time
from asyncio import StreamWriter
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright
from tests.support import adapter_status
from tests.support.admin_server import GRAMMAR_REQUESTS, KINDS, VOCABULARY, Served, everything, served
from tests.support.console_text import divergence_interval, interval, nats, percent
from tests.support.control import TOKEN, connect_relay, relay_stats
from tests.support.served_models import pair, served_models

from hemostat.admin.app import ASSETS
from hemostat.control.composition import Control
from hemostat.engines.upstreams import UpstreamEngine
from hemostat.ipc.messages import REST_KIND
from hemostat.reference.pair import ReferenceState
from hemostat_calibration.adapters.factors import LowRank
from hemostat_calibration.profiles.adapter import adapter_profile

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium (CI does)")


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    settings: dict[str, Any] = {"alarm": {"baseline_requests": 30, "budget_nats": 0.5}, "labels": ["batch"]}
    with served(tmp_path_factory.mktemp("served"), everything, **settings) as made:
        yield made


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM)
        yield made
        made.close()


@pytest.fixture
def page(one: Served, browser: Browser) -> Iterator[Page]:
    said: list[str] = []
    made = browser.new_page()
    made.on("console", lambda message: said.append(message.text) if message.type in {"error", "warning"} else None)
    made.on("pageerror", lambda error: said.append(str(error)))
    made.goto(f"{one.url}/")
    expect(made.locator("#connection")).to_contain_text("reference ready", timeout=15_000)
    yield made
    made.close()
    assert not said


def rows(page: Page, table: str) -> list[str]:
    """The text of each row, cells apart."""
    return [" | ".join(row.locator("th, td").all_inner_texts()) for row in page.locator(f"#{table} tbody tr").all()]


def get(one: Served, path: str) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{one.url}/api/v1/{path}").raise_for_status().json()
    return found


@needs_chromium
def test_an_alarm_is_seen_first_and_since_when(page: Page, one: Served) -> None:
    [raised] = [test for test in get(one, "status")["alarm"]["tests"] if test["raised"]]
    since = time.strftime("%H:%M:%S", time.localtime(raised["since"]))
    expect(page.locator("#alarm")).to_have_text("ALARM: the compressed model no longer matches its baseline")
    assert page.locator("#alarm-sub").inner_text().startswith(f"since {since}, for ")
    assert page.locator("#verdict").get_attribute("class") == "verdict bad"
    assert page.title() == "ALARM – Hemostat"
    [row] = [row for row in rows(page, "tests") if "raised" in row]
    assert row.startswith(f"change | {raised['kind']} | raised")
    assert percent(raised["evidence"], 0) in row
    assert f"{raised['on_tokens']} tokens of {raised['on_requests']} requests" in row
    assert len(rows(page, "tests")) == len(get(one, "status")["alarm"]["tests"])
    box = page.locator("#verdict").bounding_box()
    assert box is not None
    assert box["y"] < 150, "before anything else"
    page.get_by_role("link", name="What to do").click()
    expect(page.get_by_role("heading", name="HemostatModelChanged")).to_be_in_viewport()
    page.get_by_role("link", name="Back to the console").click()
    expect(page.locator("#alarm")).to_contain_text("ALARM")


@needs_chromium
def test_vllm_that_does_not_answer_comes_before_the_alarm(page: Page, one: Served) -> None:
    dead = {"10.0.0.1:8000": UpstreamEngine(relays=2, requests=70)}
    before = one.control.upstreams.current
    one.do(lambda control: setattr(control.upstreams, "current", lambda: dead))
    try:
        expect(page.locator("#alarm")).to_have_text("vLLM does not answer", timeout=10_000)
        state = get(one, "status")["state"]
        assert page.locator("#verdict").get_attribute("class") == "verdict bad"
        assert page.locator("#connection").get_attribute("class") == "pill bad"
        assert page.title() == "ALARM – Hemostat"
        since = time.strftime("%H:%M:%S", time.localtime(state["problems"][0]["since"]))
        assert page.locator("#alarm-sub").inner_text().startswith(f"since {since}, for ")
        [also] = rows(page, "problems")
        assert also.startswith("ALARM: the compressed model no longer matches its baseline | ")
        assert also.endswith("HemostatModelChanged")
        assert "10.0.0.1:8000 | failing" in rows(page, "engines")[0]
        found = Axe().run(page)
        assert found.violations_count == 0, found.generate_report()
        page.get_by_role("link", name="What to do").click()
        expect(page.get_by_role("heading", name="HemostatUpstreamDown")).to_be_in_viewport()
    finally:
        one.do(lambda control: setattr(control.upstreams, "current", before))


@needs_chromium
def test_the_alarm_says_by_kind_what_it_waits_for_and_what_is_only_the_workload(page: Page, one: Served) -> None:
    alarm = get(one, "status")["alarm"]
    baselines = {row.partition(" | ")[0]: row for row in rows(page, "baselines")}
    for kind in alarm["kinds"]:
        state = "complete" if kind["watched"] else f"{kind['baseline_requests']} of 30 requests"
        assert state in baselines[kind["kind"]]
    assert any(kind["watched"] for kind in alarm["kinds"])
    assert not all(kind["watched"] for kind in alarm["kinds"])
    mix = alarm["workload"]
    assert page.locator("#workload").inner_text() == (
        "Workload: no change of the mix of kinds is proven; distance from the baseline's mix "
        f"{percent(mix['distance'], 0)}; spread of the divergence in the baseline's mix ×{mix['spread_ratio']:.2f}"
    )


@needs_chromium
def test_what_serves_each_kind_and_on_what_evidence(page: Page, one: Served) -> None:
    status = get(one, "status")
    shown = {row.partition(" | ")[0]: row for row in rows(page, "kinds")}
    kinds = {kind["kind"]: kind for kind in status["calibration"]["kinds"]}
    assert shown.keys() == kinds.keys() == {*KINDS, REST_KIND}
    assert sum(kind["share"] for kind in kinds.values()) == pytest.approx(1.0)
    for name, kind in kinds.items():
        assert f"{name} | {percent(kind['share'])} | " in shown[name]
        assert kind["summary"] in shown[name]
        assert kind["client_share"] in shown[name]
    serves, harmed, lacks = (shown[name] for name in KINDS)
    version = kinds[KINDS[0]]["version"]
    assert f"{version[:8]}, by an operator" in serves
    assert "held-out conversations of its window" in serves
    assert "no harm proven in 120 conversations" in serves
    assert "active: 5 clients, at most 25% each" in serves
    assert serves.endswith("Roll back")
    assert "identity, held" in harmed
    assert "harmed: cut" in harmed
    assert harmed.endswith("Release")
    assert "| identity |" in lacks
    assert "not enough requests" in lacks
    assert "inactive: 1 client seen, needs 4" in lacks
    assert page.locator("#kinds-sub").inner_text() == (
        "3 kinds followed, all others are “rest”. One client contributes at most 25 % of a test's conversations; "
        "this limit is inactive below 4 clients."
    )
    gains = {row.partition(" | ")[0]: row for row in rows(page, "gains")}
    for kind in status["kinds"]:
        assert nats(kind["raw"]["kl_nats"]["estimate"]) in gains[kind["kind"]]
        gain = kind["gain_nats"]
        if gain is not None and gain["requests"]:
            assert f" | {nats(gain['estimate'])} " in gains[kind["kind"]]
            assert f" | {nats(gain['by_request']['estimate'])} " in gains[kind["kind"]]
            assert "not enough requests" in gains[kind["kind"]]
    outcomes = rows(page, "outcomes")
    assert any(
        row.startswith(f"{KINDS[0]} | cut | {version[:8]} | 0.0 % of 60 | 0.0 % of 60 | 0.0 % | [") for row in outcomes
    )
    models = rows(page, "by-model")
    assert models[0].startswith("m | ")
    assert "for this model" in models[0]
    assert models[1].startswith("unmatched | none: not scored, not treated")


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_runbook_is_a_page_that_phones_can_show(page: Page, one: Served, scheme: Any) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": 390, "height": 800})
    page.goto(f"{one.url}/runbook#hemostatreferencedown")
    expect(page.get_by_role("heading", name="HemostatReferenceDown")).to_be_in_viewport()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


@needs_chromium
def test_the_excess_has_the_interval_that_the_floor_allows(
    page: Page, one: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    excess = get(one, "status")["excess"]["kl_nats"]
    expect(page.locator("#excess")).to_have_text(f"≥ {nats(excess['estimate'])}")
    expect(page.locator("#excess-sub")).to_have_text(
        f"95 % {interval(excess['ci95'])}; noise floor {nats(excess['floor'])}"
    )
    # A floor that is known from too few requests has the cap as its upper end: that is no news.
    few = {"kl_nats": {"estimate": 0.4, "ci95": [-39.6, 0.5], "floor": 0.1}}
    monkeypatch.setattr(one.control.measured.measurements, "excess", lambda: few)
    expect(page.locator("#excess-sub")).to_have_text(
        "95 % [–, 0.500]; noise floor 0.100, too few requests to bound it", timeout=10_000
    )


@needs_chromium
def test_where_it_bleeds_by_route_label_and_decoding(page: Page, one: Served) -> None:
    status = get(one, "status")
    where, strategies = rows(page, "where"), rows(page, "strategies")
    assert len(where) == len(status["where"]) == 4
    for told, row in zip(status["where"], where, strict=True):
        kl = told["kl_nats"]
        cells = [
            told["route"],
            told["label"] or "–",
            str(told["requests"]),
            nats(kl["estimate"]),
            divergence_interval(kl),
        ]
        assert row.startswith(" | ".join(cells))
    assert [row.partition(" | ")[0] for row in strategies] == [told["strategy"] for told in status["decoding"]]
    drawn = next(told["drawn_from"]["total_variation"] for told in status["decoding"] if told["strategy"] == "t1")
    assert any(row.endswith(f"{nats(drawn['lower'])} – {nats(drawn['upper'])}") for row in strategies)
    # The wider interval is drawn wider, on one scale.
    widths = {row: page.locator("#where rect.span").nth(n).bounding_box() for n, row in enumerate(where)}
    spans = [told["kl_nats"]["ci95"] for told in status["where"]]
    narrow = min(range(4), key=lambda n: spans[n][1] - spans[n][0])
    drawn_widths = [box["width"] for box in widths.values() if box is not None]
    assert drawn_widths.index(min(drawn_widths)) == narrow


@needs_chromium
def test_whether_calibration_helps_and_what_serves(page: Page, one: Served) -> None:
    status, profiles = get(one, "status"), get(one, "profiles")
    assert page.locator("#won").inner_text() == percent(status["recovered"]["ratio"])
    low, high = status["recovered"]["ci95"]
    assert f"95 % [{percent(low)}, {percent(high)}], by " in page.locator("#won-sub").inner_text()
    less = status["arms"]["treated_minus_control"]
    name = "total_variation" if less["kl_nats_estimate"]["estimate"] is None else "kl_nats_estimate"
    assert page.locator("#arms").inner_text() == nats(less[name]["estimate"])
    assert interval(less[name]["ci95"]) in page.locator("#arms-sub").inner_text()
    raw, calibrated = rows(page, "stages")
    assert nats(status["calibrated"]["raw_same_requests"]["kl_nats"]["estimate"]) in raw
    assert nats(status["calibrated"]["kl_nats"]["estimate"]) in calibrated
    for arm in ("control", "treated"):
        [row] = [row for row in rows(page, "by-arm") if row.startswith(arm)]
        assert nats(status["arms"][arm]["kl_nats"]["estimate"]) in row
    version = profiles["serving"]
    [share] = [kind["share"] for kind in status["calibration"]["kinds"] if kind["version"] == version]
    part = f"1 of 4 kinds, {math.floor(100 * share + 0.5)} % of the traffic"
    assert page.locator("#serving").inner_text() == f"{version} serves {part}."
    assert f"in {part}" in page.locator("#won-sub").inner_text()
    selected = status["calibration"]["selected"]
    [row] = [row for row in rows(page, "profiles") if row.startswith(version[:8])]
    assert (
        f"{KINDS[0]}: {selected['requests']} held-out conversations, mean gain {nats(selected['mean_gain'])} nats "
        "by request" in row
    )
    decisions = rows(page, "events")
    assert len(decisions) == len(profiles["events"]) + len(status["alarm"]["events"])
    assert any("promote" in row and version[:8] in row for row in decisions)
    treated = next(row for row in rows(page, "endings") if row.startswith("treated"))
    assert treated == "treated | 89 | 10.1 % | 38.2 | 1 | json: valid 7"


@needs_chromium
def test_what_it_costs_and_whether_the_proxy_is_well(page: Page, one: Served) -> None:
    status = get(one, "status")
    assert page.locator("#rate").inner_text() == percent(status["shadow"]["rate"])
    assert page.locator("#dropped").inner_text() == "3"
    assert page.locator("#dropped-sub").inner_text() == "queue_full 3"
    assert page.locator("#queue").inner_text() == "0"
    assert page.locator("#failed").inner_text() == percent(status["proxy"]["failed_ratio"], 2)
    assert page.locator("#overhead").inner_text() == f"≤ {1000 * status['proxy']['overhead_seconds']['p50']:.2f}"
    assert f"{status['proxy']['requests']} so far" in page.locator("#requests-sub").inner_text()
    expect(page.locator("#reference")).to_have_text("0.0", timeout=10_000)
    before = get(one, "status")["shadow"]["reference_tokens"]

    def score(control: Any) -> None:
        control.pipeline.scorer.reference_tokens = before + 5000

    one.do(score)
    expect(page.locator("#reference")).not_to_have_text("0.0", timeout=10_000)
    assert 5000 / 12 < float(page.locator("#reference").inner_text()) <= 5000 / 1.5


@needs_chromium
def test_the_operators_actions(page: Page, one: Served) -> None:
    version = get(one, "profiles")["serving"]
    other = next(p["version"] for p in get(one, "profiles")["profiles"] if p["version"] != version)

    def confirm(asks: str) -> None:
        expect(page.get_by_role("dialog")).to_contain_text(asks)
        page.get_by_label("Admin token").fill(TOKEN)
        page.get_by_role("button", name="Confirm").click()
        expect(page.get_by_role("dialog")).to_be_hidden()

    page.get_by_role("button", name=f"Pin {other}").click()
    page.keyboard.press("Escape")
    assert get(one, "profiles")["pinned"] is False, "nothing without a confirmation"
    page.get_by_role("button", name=f"Roll back {KINDS[0]}").click()
    confirm("Roll back this kind?")
    expect(page.locator("#serving")).to_have_text("identity serves all kinds.")
    page.get_by_role("button", name=f"Release {KINDS[1]}").click()
    confirm("Release this kind?")
    expect(page.get_by_role("button", name=f"Release {KINDS[1]}")).to_be_hidden()
    assert get(one, "profiles")["held"] == []
    page.get_by_role("button", name=f"Pin {other}").click()
    confirm("Pin this profile?")
    expect(page.locator("#serving")).to_have_text(f"{other} serves 4 of 4 kinds, 100 % of the traffic; pinned.")
    page.get_by_role("button", name="Unpin").click()
    confirm("Unpin?")
    expect(page.get_by_role("button", name="Unpin")).to_be_hidden()
    page.get_by_role("button", name=f"Promote {version}").click()
    confirm("Promote this profile?")
    expect(page.locator("#serving")).to_have_text(f"{version} serves 4 of 4 kinds, 100 % of the traffic.")
    page.get_by_role("button", name="Roll back all kinds to identity").click()
    confirm("Roll back?")
    expect(page.locator("#serving")).to_have_text("identity serves all kinds.")
    page.get_by_role("button", name=f"Accept {KINDS[0]} as baseline").click()
    confirm("Accept as the new baseline?")
    expect(page.locator("#verdict")).not_to_have_class("verdict bad")
    expect(page.get_by_role("link", name="What to do")).to_be_hidden()
    assert page.title() == "Hemostat"
    assert not get(one, "status")["alarm"]["raised"]
    assert get(one, "status")["state"] == {"level": "ok", "problems": []}
    assert TOKEN not in page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])")


@needs_chromium
def test_the_headline_says_that_nothing_is_measured_or_that_nothing_is_known(browser: Browser, tmp_path: Path) -> None:
    async def fill(control: Control, folder: Path) -> StreamWriter:
        control.monitor.state, control.monitor.detail = ReferenceState.DOWN, "http://ref:8000 refuses connections"
        return await connect_relay(control, folder, 1, relay_stats())

    with served(tmp_path, fill) as other:
        page = browser.new_page()
        page.goto(f"{other.url}/")
        expect(page.locator("#alarm")).to_have_text(
            "The reference does not answer: nothing is measured (http://ref:8000 refuses connections)", timeout=10_000
        )
        assert page.locator("#verdict").get_attribute("class") == "verdict wait"
        assert page.title() == "WARNING – Hemostat"
        expect(page.locator("#problems-room")).to_be_hidden()
        other.do(lambda control: setattr(control.monitor, "state", ReferenceState.READY))
        expect(page.locator("#alarm")).to_have_text("No data yet", timeout=10_000)
        assert page.locator("#connection").get_attribute("class") == "pill good"
    # The admin port is gone.
    expect(page.locator("#alarm")).to_have_text(
        "Whether anything is wrong is not known: the admin port does not answer", timeout=10_000
    )
    assert page.title() == "NOT KNOWN – Hemostat"
    page.close()


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_accessible_with_everything_open(page: Page, scheme: Any) -> None:
    page.emulate_media(color_scheme=scheme)
    page.get_by_role("button", name="Explain all").click()
    assert page.locator("details[open]").count() == page.locator("details").count() > 15
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    page.get_by_role("button", name="auto").click()
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


@needs_chromium
def test_what_adapters_correct_and_why_none_serves(page: Page, one: Served) -> None:
    expect(page.locator("#adapter-lead")).to_have_text(re.compile("^Adapters are off"))
    expect(page.locator("#adapter-room")).to_be_hidden()
    say = adapter_status
    before = [(part, part.status) for part in say.parts(one.control)]
    try:
        one.do(lambda control: say.report(control, say.learner(), say.judge(), say.engine()))
        expect(page.locator("#adapter-lead")).to_have_text("1 adapter may be asked for: 943966cb.", timeout=10_000)
        assert page.locator("#adapter-won").inner_text() == "67.0 %"
        assert (
            "95 % [65.0 %, 69.0 %], KL 0.605 to 0.200 nats on 2,032 tokens"
            in page.locator("#adapter-won-sub").inner_text()
        )
        assert page.locator("#adapter-rank").inner_text() == "rank 64"
        assert page.locator("#adapter-size").inner_text() == (
            "5.5 MB stored (9.8 % of the compressed layers), 39.1 MB in the engine (69.3 % of the compressed layers); "
            "ranks shared out, 16 on average by bytes"
        )
        assert page.locator("#adapter-tokens").inner_text() == "3,100"
        assert page.locator("#adapter-engine").inner_text() == "1 of 1 ready"
        arms = get(one, "status")["arms"]
        kl = [arms[arm]["kl_nats_estimate"]["estimate"] for arm in ("treated", "control")]
        treated, control = kl if None not in kl else [arms[arm]["total_variation"] for arm in ("treated", "control")]
        assert page.locator("#adapter-arms").inner_text() == f"×{treated / control:.2f}"
        types = rows(page, "adapter-types")
        assert [row.partition(" | ")[0] for row in types] == [name.split(".")[1] for name in say.TYPES]
        assert types[0].startswith("q_proj | 30 | 16.0 | ")
        assert types[0].endswith("83.0 %")
        assert len(rows(page, "adapter-depths")) == say.DEPTH
        isolation, agreement = rows(page, "adapter-probes")
        assert isolation.startswith("isolation | 1 | 0 | 0 | 0 | 0 of 8 texts without an adapter differ")
        assert agreement.startswith("agreement | 1 | 1 | 0 | 3 | ")
        detail = " ".join(rows(page, "adapter-detail"))
        for text in ("from 2,000 tokens in 49 s", "2 restarts", "0f0f0f0f: the engine", "57 requests judged", "busy 2"):
            assert text in detail
        page.get_by_role("button", name="Explain all").click()
        found = Axe().run(page)
        assert found.violations_count == 0, found.generate_report()
        page.set_viewport_size({"width": 390, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        failed = {"outcome": "memory", "detail": "more than adapter.memory_mib", "tokens": 2000}
        out = say.engine(state="unusable", detail="vLLM runs without --enable-lora", ready=[], loaded=[], capacity=0)
        building = say.learner(state="building", detail="layer 4 of 30", last_build=failed)
        one.do(lambda control: say.report(control, building, say.judge(), out))
        expect(page.locator("#adapter-lead")).to_have_text(
            "No request asks for an adapter: vLLM runs without --enable-lora.", timeout=10_000
        )
        assert page.locator("#adapter-tokens-sub").inner_text() == "building: layer 4 of 30"
        assert page.locator("#adapter-won-sub").inner_text() == (
            "the last build failed (memory): more than adapter.memory_mib"
        )
        assert page.locator("#adapter-engine").inner_text() == "0 of 1 ready"
    finally:
        one.do(lambda _: [setattr(part, "status", status) for part, status in before])


@needs_chromium
def test_a_gain_names_its_figure_and_an_adapter_its_size(page: Page, one: Served) -> None:
    nats_of = {"kind": "k", "units": 9, "mean_gain": 0.164, "mean_gain_by_token": 0.15, "figure": "nats"}
    tv = nats_of | {"figure": "total_variation", "mean_kl_gain": 0.41}
    shown = [page.evaluate("(evidence) => proof(evidence, true)", evidence) for evidence in (nats_of, tv)]
    assert shown == [
        "k: 9 held-out conversations, mean gain 0.164 nats by request, 0.150 by token",
        "k: 9 held-out conversations, mean gain of the total variation 0.164 by request, 0.150 by token; of the KL "
        "0.410 nats by request",
    ]
    layers = {"model.layers.0.mlp.up_proj": LowRank(np.ones((2, 8), np.float32), np.ones((4, 2), np.float32))}
    made = adapter_profile(model="m", vocab_size=VOCABULARY, layers=layers)
    one.do(lambda control: control.profile_manager.operator.import_profile(made))
    [entry] = [p for p in get(one, "profiles")["profiles"] if p["version"] == made.version]
    row = page.locator("#profiles tbody tr").filter(has_text=made.version[:8])
    size = f"rank 2, {entry['adapter']['bytes'] / 1000:.1f} kB"
    expect(row).to_contain_text(size, timeout=10_000)
    expect(row).to_contain_text("adapter")


@needs_chromium
def test_what_is_long_does_not_widen_the_page(page: Page, one: Served) -> None:
    long = "word" * 50
    before = one.control.monitor.detail, one.control.learner.detail, one.control.monitor.served

    def write(control: Any, detail: str, learner: str, models: Any) -> None:
        control.monitor.detail, control.learner.detail = detail, learner
        control.monitor.served = models

    one.do(lambda control: write(control, long, long, served_models(pair(long))))
    try:
        page.set_viewport_size({"width": 390, "height": 800})
        expect(page.locator("#learned-sub")).to_contain_text(long, timeout=10_000)
        expect(page.locator("#models")).to_contain_text(long)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
    finally:
        one.do(lambda control: write(control, *before))


@needs_chromium
def test_every_figure_says_what_it_answers_and_what_not_to_conclude(page: Page) -> None:
    for tile in page.locator(".tile").all():
        assert tile.locator("summary").inner_text().endswith("?")
        assert "Does not mean:" in (tile.locator("details p").text_content() or "")
    for section in page.locator("section").all():
        assert section.locator("details").count()


@needs_chromium
def test_plots_have_ink(page: Page, one: Served) -> None:
    """Of each plot, pixels in the colour of its first series."""
    expect(page.locator("#plot-kl canvas")).to_be_visible(timeout=15_000)
    for name in ("kl", "won", "cost", "proxy"):
        inked = page.evaluate(
            """(name) => {
              const canvas = document.querySelector(`#plot-${name} canvas`);
              const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
              let count = 0;
              for (let i = 0; i < data.length; i += 4) {
                count += Math.hypot(data[i] - 29, data[i + 1] - 78, data[i + 2] - 216) < 60 && data[i + 3] > 128;
              }
              return count;
            }""",
            name,
        )
        assert inked > 100, name
    last = get(one, "history")["kl_nats"][-1]
    expect(page.locator("#plot-kl .u-legend")).to_contain_text(f"since the start{nats(last)}")


@needs_chromium
def test_what_is_scored_by_kind_and_why_the_rest_is_not(page: Page, one: Served) -> None:
    found = get(one, "status")["coverage"]
    assert 0.0 < found["scored_share"]["tokens"] < 1.0
    expect(page.locator("#coverage")).to_have_text(percent(found["scored_share"]["tokens"]))
    expect(page.locator("#coverage-sub")).to_contain_text("the tokens of 5 are not known")
    shown = {row.partition(" | ")[0]: row for row in rows(page, "coverage-kinds")}
    assert shown.keys() == {kind["kind"] for kind in found["by_kind"]}
    assert shown["chat structured"] == "chat structured | 12 | 0.0 % | 700 | 0.0 % | 5"
    assert rows(page, "not-scored")[0] == "structured_output | skipped | 12 | 700 | 5"


@needs_chromium
def test_where_in_a_text_the_models_diverge_and_how_thinking_ends(page: Page, one: Served) -> None:
    status = get(one, "status")
    for table, division in (("by-position", "position"), ("by-context", "context"), ("by-phase", "phase")):
        expected = status["places"][division]
        assert expected, division
        for row, place in zip(rows(page, table), expected, strict=True):
            assert row.startswith(f"{place['place']} | {place['requests']} | {nats(place['kl_nats']['estimate'])}")
    thinking = status["thinking"]
    shown = {row.partition(" | ")[0]: row for row in rows(page, "thinking")}
    assert shown.keys() == {*thinking["arms"], "treated minus control"}
    for arm, figures in thinking["arms"].items():
        assert f"{percent(figures['never_ended']['estimate'])} [" in shown[arm]
        assert f"ended {figures['endings']['ended']}" in shown[arm]


@needs_chromium
def test_figures_under_a_grammar_are_apart(page: Page, one: Served) -> None:
    found = get(one, "status")["conditional"]
    assert found["raw"]["requests"] == GRAMMAR_REQUESTS
    assert 0.4 < found["exact_tokens_share"] < 0.9
    (shown,) = rows(page, "grammar-figures")
    kl = found["raw"]["kl_nats"]["estimate"]
    assert shown.startswith(f"{GRAMMAR_REQUESTS} | {nats(kl)} | ")
    assert shown.endswith(f" | {percent(found['exact_tokens_share'])}")
    (shown,) = rows(page, "grammar-gains")
    assert shown.startswith(f"chat grammar sampled | {GRAMMAR_REQUESTS} | {nats(kl)} ")
    assert not any("grammar" in row for row in rows(page, "gains")), "of no other table"


# --- what is not in a browser -----------------------------------------------------------------------------------------


def test_the_page_needs_no_network_and_little_room() -> None:
    folder = resources.files("hemostat.admin.console")
    text = "".join(
        folder.joinpath(name).read_text()
        for name in ("index.html", "console.css", "adapters.js", "coverage.js", "console.js")
    )
    addresses = set(re.findall(r"https?://[^\s\"'`]+", text))
    assert addresses == {"http://www.w3.org/2000/svg"}, "a name, not an address"
    assert "style=" not in text, "the policy would refuse it"
    assert "innerHTML" not in text
    vendored = [name for name in ASSETS if name.startswith("vendor/")]
    assert sum(len(folder.joinpath(*name.split("/")).read_bytes()) for name in vendored) <= 60_000
    assert "Permission is hereby granted" in folder.joinpath("vendor", "LICENSE-uPlot.txt").read_text()
