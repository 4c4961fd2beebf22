"""The console in a browser: what has to be readable in each state of `tests.support.console_states`, that the pages
show what the API says, and the operator's actions on a real `Control`.

On a real run: tests/e2e/test_console.py.
"""

from __future__ import annotations

import copy
import re
import shutil
import time
from asyncio import StreamWriter
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright
from tests.support import adapter_status
from tests.support.admin_server import GRAMMAR_REQUESTS, KINDS, Served, everything, served
from tests.support.console_states import CHANGES, SERVING, State, make
from tests.support.console_text import divergence_interval, interval, nats, percent
from tests.support.control import TOKEN, connect_relay, relay_stats
from tests.support.dashboards import load
from tests.support.waiting import HANG_SECONDS

from hemostat.admin.app import ASSETS
from hemostat.control.composition import Control
from hemostat.reference.pair import ReferenceState

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium (CI does)")
SCREEN = {"width": 1280, "height": 800}
PHONE = {"width": 400, "height": 800}
FITS_PHONE = "innerWidth === 400 && document.documentElement.scrollWidth <= innerWidth"
"""Charts take their width when the browser has told them its new size."""
expect.set_options(timeout=1000 * HANG_SECONDS)
PAGES = ("", "divergence", "kinds", f"kinds/{KINDS[0]}", "profiles", f"profiles/{SERVING[:8]}", "engines",
         "engines/10.0.0.1:8000", "alarm", "measurement", "events")  # fmt: skip
MAX_WORDS = 320
"""On the overview. The page that it replaced had 3,000."""


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    settings: dict[str, Any] = {"alarm": {"baseline_requests": 30, "budget_nats": 0.5}, "labels": ["batch"]}
    with served(tmp_path_factory.mktemp("served"), everything, **settings) as made:
        yield made


@pytest.fixture(scope="module")
def state(one: Served) -> Callable[[str], State]:
    """Makes a state of `console_states` from what the real one says."""
    status, profiles = get(one, "status"), get(one, "profiles")
    return lambda name: make(name, copy.deepcopy(status), copy.deepcopy(profiles))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM)
        yield made
        made.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """An error or warning of the browser, also about the content security policy, fails the test."""
    said: list[str] = []
    made = browser.new_page(viewport=SCREEN)  # type: ignore[arg-type]
    made.on("console", lambda message: said.append(message.text) if message.type in {"error", "warning"} else None)
    made.on("pageerror", lambda error: said.append(str(error)))
    yield made
    made.close()
    assert not said


def get(one: Served, path: str) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{one.url}/api/v1/{path}").raise_for_status().json()
    return found


def show(page: Page, one: Served, path: str = "", at: State | None = None) -> None:
    """Open a page of the console, of a made state or of the real one, and wait until it shows it."""
    if at is not None:
        at.answer(page)
    page.goto(f"{one.url}/#/{path}")
    expect(page.locator("main")).to_have_attribute("data-page", path.partition("/")[0].partition("?")[0] or "overview")
    expect(page.locator("main section").first).to_be_visible(timeout=15_000)


def rows(page: Page, caption: str) -> list[str]:
    """The text of each row of a table, cells apart."""
    table = page.get_by_role("region", name=caption, exact=True)
    return [" | ".join(row.locator("th, td").all_inner_texts()) for row in table.locator("tbody tr").all()]


def assert_accessible(page: Page) -> None:
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


# --- what has to be seen ---------------------------------------------------------------------------------------------


@needs_chromium
@pytest.mark.parametrize("name", CHANGES)
def test_the_first_screen_says_what_is_wrong(page: Page, one: Served, state: Callable[[str], State], name: str) -> None:
    at = state(name)
    show(page, one, at=at)
    expect(page.get_by_role("status")).to_have_text(at.says)
    if at.status["requests"]["scored"]:
        expect(page.locator(".timeline canvas")).to_be_visible()
    text = page.locator("body").inner_text()
    for sentence in at.shows:
        assert sentence in text
    if at.status["state"]["problems"]:
        assert f"Since {time.strftime('%H:%M', time.localtime(at.status['state']['problems'][0]['since']))}" in text
        expect(page.locator(".verdict").get_by_role("link", name="Runbook")).to_have_attribute(
            "href", at.status["state"]["problems"][0]["runbook"]
        )
    assert page.evaluate("document.documentElement.scrollHeight") <= SCREEN["height"], "everything without scrolling"
    assert page.locator("table:not(.u-legend)").count() == 0
    assert len(text.split()) <= MAX_WORDS
    steps = page.locator(".next li")
    assert steps.count() <= 5
    assert all(step.locator("a, button").count() == 1 for step in steps.all()), "each has one action"
    assert bool(steps.count()) == (name not in {"healthy", "promoted", "25 kinds"})
    red = name in {"vLLM dead", "alarm"}
    prefix = "ALARM – " if red else "WARNING – " if at.status["state"]["problems"] else ""
    assert page.title() == f"{prefix}Hemostat"
    assert page.locator(".verdict.bad").count() == red


@needs_chromium
def test_what_compression_costs_what_serves_since_when_and_what_is_measured(
    page: Page, one: Served, state: Callable[[str], State]
) -> None:
    at = state("promoted")
    show(page, one, at=at)
    expect(page.locator(".tile").nth(3)).to_contain_text("Last score")
    traffic, cost, profile, measured = (tile.inner_text() for tile in page.locator(".tile").all())
    assert "12.0 requests/s" in traffic
    assert "Failed in the last minute: 0 of" in traffic
    assert "99 % of requests at most 0.8" in traffic
    assert "≥ 0.082 nats per token" in cost
    assert "About 1 of 10 tokens differ" in cost
    assert "95 % [0.076, 0.088]; 55 % of the budget of 0.150" in cost
    assert f"{SERVING[:8]} 63 % of the traffic" in profile
    assert "(15 min)" in profile
    assert "Treated minus control: −0.017 [−0.023, −0.011] nats" in profile
    assert "97 % of sampled tokens scored" in measured
    assert "1 wait, the oldest 0 s. Last score 0 s ago." in measured
    assert page.locator("figure.spark polyline").count() == 6


@needs_chromium
def test_more_problems_than_fit_are_counted_and_the_worst_is_first(
    page: Page, one: Served, state: Callable[[str], State]
) -> None:
    at = state("alarm")
    for alert in ("HemostatRecordsLost", "HemostatStoreErrors", "HemostatReferenceDown", "HemostatUpstreamDown"):
        at.problem(alert, f"text of {alert}", 60.0)
    show(page, one, at=at)
    expect(page.get_by_role("status")).to_have_text("text of HemostatUpstreamDown")
    also = page.locator(".also").all_inner_texts()
    assert also[0].startswith("ALARM: the compressed model no longer matches its baseline")
    assert also[1].startswith("text of HemostatReferenceDown")
    assert also[2].startswith("and 2 more problems")
    chips = page.locator(".chips li").all_inner_texts()
    assert [chip.partition(":")[0] for chip in chips if chip.endswith("problem")] == [
        "vLLM", "reference", "store", "alarm", "measurement"]  # fmt: skip
    assert chips[4].endswith("problem"), "those that are wrong come first"
    assert page.locator(".next li").count() == 5
    assert page.evaluate("document.documentElement.scrollHeight") <= SCREEN["height"]


@needs_chromium
def test_after_a_restart_there_is_no_history_and_everything_else(
    page: Page, one: Served, state: Callable[[str], State]
) -> None:
    at = state("promoted")
    at.history = {"points": {name: [] for name in at.history["points"]}, "events": []}
    show(page, one, at=at)
    expect(page.locator(".timeline")).to_contain_text("No history yet")
    assert "Since " in page.locator(".tile").nth(2).inner_text(), "events are kept in the store"
    assert "≥ 0.082" in page.locator(".tile").nth(1).inner_text()
    show(page, one, "divergence")
    expect(page.locator("main")).to_contain_text("No history yet")
    assert len(rows(page, "By kind of traffic")) == len(KINDS)


# --- every page ------------------------------------------------------------------------------------------------------


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_is_accessible_and_fits_a_phone(
    page: Page, one: Served, state: Callable[[str], State], scheme: Any
) -> None:
    page.emulate_media(color_scheme=scheme)
    at = state("alarm")
    long = "word" * 50
    at.status["learner"]["detail"] = at.status["configuration"]["error"] = long
    at.status["compressed"]["models"] = [long]
    at.answer(page)
    for path in PAGES:
        page.set_viewport_size(SCREEN)  # type: ignore[arg-type]
        show(page, one, path)
        page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
        assert_accessible(page)
        page.set_viewport_size(PHONE)  # type: ignore[arg-type]
        page.wait_for_function(FITS_PHONE)
        text = page.locator("main").inner_text()
        if not path.startswith("profiles/"):
            assert not re.search(r"\b[0-9a-f]{32}\b", text), "versions have 8 digits"
        assert "undefined" not in text
        assert "NaN" not in text
    assert page.title().startswith("ALARM – ")


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_runbook_is_a_page_that_phones_can_show(page: Page, one: Served, scheme: Any) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size(PHONE)  # type: ignore[arg-type]
    page.goto(f"{one.url}/runbook#hemostatreferencedown")
    expect(page.get_by_role("heading", name="HemostatReferenceDown")).to_be_in_viewport()
    page.wait_for_function(FITS_PHONE)
    assert_accessible(page)


@needs_chromium
def test_everything_is_reached_by_the_keyboard(page: Page, one: Served, state: Callable[[str], State]) -> None:
    show(page, one, "profiles", state("healthy"))
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.textContent.trim().slice(0, 40)"))
    assert reached[0] == "Skip to the content"
    assert {"Overview", "Runbook", "off", "observe", "auto", "Roll back all kinds to identity"} <= set(reached)
    page.get_by_role("button", name="observe").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    inside = set()
    for _ in range(8):
        page.keyboard.press("Tab")
        inside.add(
            page.evaluate(
                "document.activeElement === document.body || Boolean(document.activeElement.closest('dialog'))"
            )
        )
    assert inside == {True}, "the focus stays in the dialog"
    assert_accessible(page)
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    assert page.evaluate("document.activeElement.textContent") == "observe", "and returns to where it was"
    page.get_by_role("link", name="Kinds").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Kinds of traffic")).to_be_visible()
    assert page.evaluate("document.activeElement.id") == "main", "a new page begins at its content"


@needs_chromium
def test_addresses_name_the_page_the_group_and_the_time(page: Page, one: Served, state: Callable[[str], State]) -> None:
    show(page, one, "divergence?by=decoding&range=15m", state("alarm"))
    expect(page.get_by_role("region", name="By decoding strategy")).to_be_visible()
    page.get_by_label("Group by").select_option("position")
    expect(page).to_have_url(re.compile(r"#/divergence\?by=position&range=15m$"))
    expect(page.get_by_role("region", name="By position in the output")).to_be_visible()
    page.go_back()
    expect(page.get_by_role("region", name="By decoding strategy")).to_be_visible()
    page.locator("#range").select_option("6h")
    expect(page).to_have_url(re.compile(r"range=6h$"))
    page.get_by_role("link", name="Events").click()
    expect(page).to_have_url(re.compile(r"#/events\?range=6h$")), "the time is kept"
    page.goto(f"{one.url}/#/nothing-of-this-name")
    expect(page.get_by_role("status")).to_be_visible()


@needs_chromium
def test_links_lead_to_grafanas_panels(page: Page, one: Served, state: Callable[[str], State]) -> None:
    show(page, one, at=state("healthy"))
    asked = ["javascript:alert(1)", "https://grafana.example/x/"]
    page.on("dialog", lambda dialog: dialog.accept(asked.pop(0)))
    page.get_by_role("button", name="Grafana").click()
    expect(page.get_by_role("button", name="Grafana")).to_be_visible()
    page.get_by_role("button", name="Grafana").click()
    link = page.get_by_role("link", name="Grafana")
    expect(link).to_have_attribute("href", re.compile("^https://grafana.example/x/d/hemostat-overview"))
    panels = {(board["uid"], panel["id"]) for board in load().values() for panel in board["panels"]}
    for path in PAGES:
        show(page, one, f"{path}?range=6h")
        found = re.search(r"/d/([\w-]+)\?viewPanel=(\d+)&from=now-6h&to=now$", link.get_attribute("href") or "")
        assert found is not None
        assert (found[1], int(found[2])) in panels, path


@needs_chromium
def test_tables_sort_and_fold(page: Page, one: Served, state: Callable[[str], State]) -> None:
    show(page, one, "kinds", state("25 kinds"))
    caption = "By part of the traffic"
    assert len(rows(page, caption)) == 10
    page.get_by_role("button", name="Show all 25").click()
    assert len(rows(page, caption)) == 25
    shares = [float(row.split(" | ")[1].removesuffix(" %")) for row in rows(page, caption)]
    page.get_by_role("button", name="part of the traffic").click()
    assert [float(row.split(" | ")[1].removesuffix(" %")) for row in rows(page, caption)] == sorted(shares)[::-1]
    page.get_by_role("button", name="part of the traffic").click()
    assert [float(row.split(" | ")[1].removesuffix(" %")) for row in rows(page, caption)] == sorted(shares)
    assert page.get_by_role("columnheader", name="part of the traffic").get_attribute("aria-sort") == "ascending"


@needs_chromium
def test_the_chart_has_ink_and_marks(page: Page, one: Served, state: Callable[[str], State]) -> None:
    at = state("alarm")
    show(page, one, at=at)
    expect(page.locator(".timeline .u-legend")).to_contain_text(nats(at.history["points"]["kl_recent"][-1]))
    assert [mark.partition(" ")[0] for mark in page.locator(".marks li").all_inner_texts()] == ["A", "C", "L"]

    def inked() -> list[int]:
        """Pixels in the colours of the last minute, and of the budget and the alarm."""
        found: list[int] = page.evaluate(
            """() => {
              const canvas = document.querySelector(".timeline canvas");
              const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
              return [[29, 78, 216], [164, 22, 26]].map(([red, green, blue]) => {
                let count = 0;
                for (let i = 0; i < data.length; i += 4) {
                  count += Math.hypot(data[i] - red, data[i + 1] - green, data[i + 2] - blue) < 60 && data[i + 3] > 128;
                }
                return count;
              });
            }"""
        )
        return found

    line, marked = inked()
    assert line > 300
    assert marked > 100
    at.status["alarm"]["events"] = []
    at.answer(page)
    page.reload()
    expect(page.locator(".marks li")).to_have_count(2)
    assert inked()[1] < marked


# --- what the API says -----------------------------------------------------------------------------------------------


@needs_chromium
def test_the_divergence_by_each_group_is_the_apis(page: Page, one: Served) -> None:
    status = get(one, "status")
    show(page, one, "divergence")
    groups = {
        "route": [(f"{w['route']}, {w['label']}" if w["label"] else w["route"], w) for w in status["where"]],
        "decoding": [(d["strategy"], d) for d in status["decoding"]],
        "kind": [(k["kind"], k["raw"]) for k in status["kinds"]],
        "arm": [(arm, status["arms"][arm]) for arm in ("control", "treated", "none")],
        "position": [(p["place"], p) for p in status["places"]["position"]],
        "context": [(p["place"], p) for p in status["places"]["context"]],
        "phase": [(p["place"], p) for p in status["places"]["phase"]],
        "grammar": [("all, on the allowed ids", status["conditional"]["raw"])],
    }
    assert status["conditional"]["raw"]["requests"] == GRAMMAR_REQUESTS
    for by, expected in groups.items():
        page.get_by_label("Group by").select_option(by)
        expect(page).to_have_url(re.compile(f"by={by}$"))
        heading = page.get_by_label("Group by").locator("option:checked").inner_text()
        shown = rows(page, f"By {heading}")
        for (name, found), row in zip(expected, shown, strict=False):
            kl = found["kl_nats"]
            start = " | ".join([name, str(found["requests"]), nats(kl["estimate"]), divergence_interval(kl)])
            assert row.startswith(start), by
        assert len(shown) == len(expected) + (by == "grammar")
    # The wider interval is drawn wider, on one scale.
    page.get_by_label("Group by").select_option("route")
    boxes = [box.bounding_box() for box in page.locator("rect.span").all()]
    widths = [box["width"] for box in boxes if box is not None]
    ends = [found["kl_nats"]["ci95"] for _, found in groups["route"]]
    spans = [np.inf if high is None else high - low for low, high in ends]  # without an interval: the whole scale
    assert [*np.argsort(widths, kind="stable")] == [*np.argsort(spans, kind="stable")]
    facts = page.locator(".facts").inner_text()
    excess, raw = status["excess"]["kl_nats"], status["raw"]
    assert (
        f"≥ {nats(excess['estimate'])}, 95 % {interval(excess['ci95'])}; noise floor {nats(excess['floor'])}" in facts
    )
    assert f"≥ {nats(raw['total_variation'])}" in facts
    assert f"{percent(raw['top1_agreement'])}, 95 % {interval(raw['ci95']['top1_agreement'], percent)}" in facts
    page.get_by_label("Group by").select_option("phase")
    thinking = {row.partition(" | ")[0]: row for row in rows(page, "Thinking, by arm")}
    assert thinking.keys() == {*status["thinking"]["arms"], "treated minus control"}
    for arm, found in status["thinking"]["arms"].items():
        assert f"{percent(found['never_ended']['estimate'])} [" in thinking[arm]
        assert f"ended {found['endings']['ended']}" in thinking[arm]


@needs_chromium
def test_what_serves_each_kind_on_what_evidence_and_with_what_outcomes(page: Page, one: Served) -> None:
    status = get(one, "status")
    show(page, one, "kinds")
    shown = {row.partition(" | ")[0]: row for row in rows(page, "By part of the traffic")}
    kinds = {kind["kind"]: kind for kind in status["calibration"]["kinds"]}
    assert shown.keys() == kinds.keys()
    for name, kind in kinds.items():
        assert f"{name} | {percent(kind['share'])} | " in shown[name]
        assert kind["summary"] in shown[name]
    version = kinds[KINDS[0]]["version"][:8]
    assert f"{version}, by an operator" in shown[KINDS[0]]
    assert "no harm proven in 120 conversations" in shown[KINDS[0]]
    assert "identity, held" in shown[KINDS[1]]
    assert "harmed: cut" in shown[KINDS[1]]
    page.get_by_role("link", name=KINDS[0]).click()
    expect(page.get_by_role("heading", name=KINDS[0])).to_be_visible()
    facts = page.locator(".facts").inner_text()
    assert f"{version}, by an operator since " in facts
    assert "active: 5 clients, at most 25% each" in facts
    gain = next(kind for kind in status["kinds"] if kind["kind"] == KINDS[0])["gain_nats"]
    assert f"{nats(gain['by_request']['estimate'])} " in facts
    outcomes = rows(page, "Outcomes of answers, treated minus control")
    assert outcomes[0].startswith("cut | 0.0 % of 60 | 0.0 % of 60 | 0.0 % | [")
    assert "0.0 % with" not in page.locator("main").inner_text()
    page.goto(f"{one.url}/#/kinds/{KINDS[1]}")
    expect(page.get_by_role("region", name="Outcomes of answers")).to_contain_text(
        "harmed: cut, 100.0 % with the profile and 0.0 % without"
    )
    assert any("rolled back" in row for row in rows(page, "Events of this kind"))


@needs_chromium
def test_which_profiles_there_are_and_what_each_has_shown(page: Page, one: Served) -> None:
    status, profiles = get(one, "status"), get(one, "profiles")
    version = profiles["serving"][:8]
    show(page, one, "profiles")
    assert "treated | 89 | 10.1 % | 38.2 | 1 | json: valid 7" in rows(page, "How answers end, all traffic, by arm")
    [row] = [row for row in rows(page, "Versions, newest first") if row.startswith(version)]
    selected = status["calibration"]["selected"]
    assert (
        f"{KINDS[0]}: {selected['requests']} held-out conversations, mean gain {nats(selected['mean_gain'])} nats "
        in row
    )
    recovered = status["recovered"]
    shown = f"{percent(recovered['ratio'])}, 95 % {interval(recovered['ci95'], percent)}"
    assert shown in page.locator("main").inner_text()
    page.get_by_role("link", name=version).first.click()
    expect(page.get_by_role("heading", name=f"Profile {version}")).to_be_visible()
    assert any(row.startswith(f"{KINDS[0]} | serves | ") for row in rows(page, "Evidence by kind"))
    assert any("promoted" in row for row in rows(page, "Decisions"))


@needs_chromium
def test_what_adapters_correct_and_why_none_serves(page: Page, one: Served) -> None:
    say = adapter_status
    show(page, one, "profiles")
    expect(page.locator("main")).to_contain_text("Adapters are off")
    before = [(part, part.status) for part in say.parts(one.control)]
    try:
        one.do(lambda control: say.report(control, say.learner(), say.judge(), say.engine()))
        expect(page.locator("main")).to_contain_text("1 adapter may be asked for: 943966cb.")
        text = page.locator("main").inner_text()
        for told in (
            "943966cb from 2,000 tokens in 49 s; ",
            "recovers 67.0 % of the KL, 95 % [65.0 %, 69.0 %], KL 0.605 to 0.200 nats on 2,032 tokens",
            "rank 64; 5.5 MB stored (9.8 % of the compressed layers), 39.1 MB in the engine (69.3 % of the compressed",
            "1 of 1 ready",
            "2 restarts",
            "0f0f0f0f: the engine",
            "57 requests judged",
            "busy 2",
        ):
            assert told in text
        types = rows(page, "Recovered, by type of layer")
        assert [row.partition(" | ")[0] for row in types] == [name.split(".")[1] for name in say.TYPES]
        assert types[0].startswith("q_proj | 30 | 16.0 | ")
        assert types[0].endswith("83.0 %")
        page.get_by_role("button", name=f"Show all {say.DEPTH}").click()
        assert len(rows(page, "Recovered, by depth")) == say.DEPTH
        assert rows(page, "Probes of the engine")[1].startswith("agreement | 1 | 1 | 0 | 3 | ")
        assert_accessible(page)
        page.set_viewport_size(PHONE)  # type: ignore[arg-type]
        page.wait_for_function(FITS_PHONE)
        failed = {"outcome": "memory", "detail": "more than adapter.memory_mib", "tokens": 2000}
        out = say.engine(state="unusable", detail="vLLM runs without --enable-lora", ready=[], loaded=[], capacity=0)
        building = say.learner(state="building", detail="layer 4 of 30", last_build=failed)
        one.do(lambda control: say.report(control, building, say.judge(), out))
        main = page.locator("main")
        expect(main).to_contain_text("No request asks for an adapter: vLLM runs without --enable-lora.")
        expect(main).to_contain_text("building: layer 4 of 30")
        expect(main).to_contain_text("the last build failed (memory): more than adapter.memory_mib")
    finally:
        one.do(lambda _: [setattr(part, "status", status) for part, status in before])


@needs_chromium
def test_what_is_measured_and_what_waits(page: Page, one: Served) -> None:
    status = get(one, "status")
    show(page, one, "measurement")
    coverage = status["coverage"]
    text = page.locator("main").inner_text()
    assert f"{percent(coverage['scored_share']['tokens'])} of 1,180 known tokens" in text
    assert "the tokens of 5 are not known" in text
    assert "queue_full 3" in text
    assert f"compressed {nats(status['noise_floor']['compressed']['kl_nats']['estimate'])} nats" in text
    assert "not scored, not treated" in text, "of the model without a reference"
    shown = rows(page, "Coverage by kind")
    assert "chat structured | 12 | 0.0 % | 700 | 0.0 % | 5" in shown
    assert rows(page, "What is not scored, by reason")[0] == "structured_output | skipped | 12 | 700 | 5"
    show(page, one, "alarm")
    alarm = get(one, "status")["alarm"]
    [raised] = [test for test in alarm["tests"] if test["raised"]]
    [row] = [row for row in rows(page, "Tests") if "raised" in row]
    assert row.startswith(f"change | {raised['kind']} | raised")
    assert f"{raised['on_tokens']} tokens of {raised['on_requests']} requests" in row
    expect(page.get_by_role("button", name=f"Accept {KINDS[0]} as baseline")).to_be_hidden()
    page.get_by_text("accept the present state").click()
    baselines = {row.partition(" | ")[0]: row for row in rows(page, "Baselines")}
    for kind in alarm["kinds"]:
        assert ("complete" if kind["watched"] else f"{kind['baseline_requests']} of 30") in baselines[kind["kind"]]
    expect(page.get_by_text("Do not accept in order to silence an alarm")).to_be_visible()
    for path in PAGES[:-3]:
        page.goto(f"{one.url}/#/{path}")
        assert page.get_by_role("button", name=re.compile("Accept")).count() == 0, "only where it is explained"


# --- actions ---------------------------------------------------------------------------------------------------------


@needs_chromium
def test_the_operators_actions(page: Page, one: Served) -> None:
    version = get(one, "profiles")["serving"]
    other = next(p["version"] for p in get(one, "profiles")["profiles"] if p["version"] != version)

    def confirm(asks: str) -> None:
        expect(page.get_by_role("dialog")).to_contain_text(asks)
        page.get_by_label("Admin token").fill(TOKEN)
        page.get_by_role("button", name="Confirm").click()
        expect(page.get_by_role("dialog")).to_be_hidden()

    def press(path: str, button: str, asks: str) -> None:
        show(page, one, path)
        page.get_by_role("button", name=button).click()
        confirm(asks)

    show(page, one, f"profiles/{other[:8]}")
    page.get_by_role("button", name=f"Pin {other[:8]}").click()
    page.keyboard.press("Escape")
    assert get(one, "profiles")["pinned"] is False, "nothing without a confirmation"
    press(f"kinds/{KINDS[0]}", f"Roll back {KINDS[0]}", "Roll back this kind?")
    assert get(one, "profiles")["by_kind"] == {}
    press(f"kinds/{KINDS[1]}", f"Release {KINDS[1]}", "Release this kind?")
    assert get(one, "profiles")["held"] == []
    press(f"profiles/{other[:8]}", f"Pin {other[:8]}", "Pin this profile?")
    assert get(one, "profiles")["pinned"] is True
    press("profiles", "Unpin", "Unpin?")
    expect(page.get_by_role("button", name="Unpin")).to_be_hidden()
    press(f"profiles/{version[:8]}", f"Promote {version[:8]}", "Promote this profile?")
    assert set(get(one, "profiles")["by_kind"].values()) == {version}
    press("profiles", "Roll back all kinds to identity", "Roll back?")
    assert get(one, "profiles")["by_kind"] == {}
    press("profiles", "observe", "Set calibration to observe?")
    expect(page.locator("#mode")).to_have_text("observe")
    show(page, one, "alarm")
    page.get_by_text("accept the present state").click()
    page.get_by_role("button", name=f"Accept {KINDS[0]} as baseline").click()
    confirm("Accept as the new baseline?")
    assert not get(one, "status")["alarm"]["raised"]
    show(page, one)
    expect(page.get_by_role("status")).to_have_text("No problem found")
    assert page.title() == "Hemostat"
    assert TOKEN not in page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])")


@needs_chromium
def test_nothing_is_measured_and_then_nothing_is_known(browser: Browser, tmp_path: Path) -> None:
    async def fill(control: Control, folder: Path) -> StreamWriter:
        control.monitor.state, control.monitor.detail = ReferenceState.DOWN, "http://ref:8000 refuses connections"
        return await connect_relay(control, folder, 1, relay_stats())

    with served(tmp_path, fill) as other:
        page = browser.new_page()
        page.goto(f"{other.url}/")
        headline = page.get_by_role("status")
        expect(headline).to_have_text(
            "The reference does not answer: nothing is measured (http://ref:8000 refuses connections)"
        )
        expect(page.locator(".checklist")).to_contain_text("✗ The reference is ready – down: http://ref:8000 refuses")
        assert page.title() == "WARNING – Hemostat"
        other.do(lambda control: setattr(control.monitor, "state", ReferenceState.READY))
        expect(headline).to_have_text("No problem found, and nothing measured yet")
        expect(page.locator(".checklist")).to_contain_text("✓ The reference is ready")
    # The admin port is gone.
    expect(headline).to_have_text("Whether anything is wrong is not known: the admin port does not answer")
    assert page.title() == "NOT KNOWN – Hemostat"
    page.close()


# --- what is not in a browser ----------------------------------------------------------------------------------------


def test_the_pages_need_no_network_and_little_room() -> None:
    folder = resources.files("hemostat.admin.console")
    own = [name for name in ASSETS if not name.startswith(("vendor/", "runbook"))]
    text = "".join(folder.joinpath(name).read_text() for name in own)
    assert set(re.findall(r"https?://[^\s\"'`]+", text)) == {"http://localhost:3000"}, "a suggestion, never loaded"
    assert "style=" not in text, "the policy would refuse it"
    assert "innerHTML" not in text
    vendored = [name for name in ASSETS if name.startswith("vendor/")]
    assert sum(len(folder.joinpath(*name.split("/")).read_bytes()) for name in vendored) <= 70_000
    for library, says in (("uPlot", "The MIT License"), ("preact", "The MIT License"), ("htm", "Apache License")):
        assert says in folder.joinpath("vendor", f"LICENSE-{library}.txt").read_text()


def test_every_file_of_the_console_is_served() -> None:
    folder = Path(str(resources.files("hemostat.admin.console")))
    files = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*.*")
        if path.suffix in {".js", ".mjs", ".css", ".html"}
    }
    assert files == ASSETS.keys()
