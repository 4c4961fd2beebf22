"""The console in a browser: what has to be readable in each state of `tests.support.console_states`, every page, and
the files of which it consists.

The figures and actions of a `Control`: test_console_of_control.py. On a real run: tests/e2e/test_console.py.
"""

from __future__ import annotations

import copy
import json
import re
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect
from tests.support.admin_server import KINDS, Served
from tests.support.chromium import needs_chromium
from tests.support.console_page import (
    FITS_PHONE,
    PAGES,
    PHONE,
    SCREEN,
    assert_accessible,
    get,
    rows,
    show,
)
from tests.support.console_states import CHANGES, SERVING, State, failed_gate, make
from tests.support.console_text import interval, nats
from tests.support.dashboards import load
from tests.support.paths import ROOT

from hemostat.admin.app import ASSETS
from hemostat.measurement.dependence import CARRIED_BY_FEW
from hemostat_lab.demo.view import UNKNOWN_INTERVAL

GUIDE = ROOT / "docs" / "console.md"
"""Has a picture of each state, and what it says."""
MAX_WORDS = 320
"""On the overview. The page that it replaced had 3,000."""


@pytest.fixture(scope="module")
def state(instance: Served) -> Callable[[str], State]:
    """Makes a state of `console_states` from what the real one says."""
    status, profiles = get(instance, "status"), get(instance, "profiles")
    return lambda name: make(name, copy.deepcopy(status), copy.deepcopy(profiles))


# --- what has to be seen ---------------------------------------------------------------------------------------------


@needs_chromium
@pytest.mark.parametrize("name", CHANGES)
def test_the_first_screen_says_what_is_wrong(
    page: Page, instance: Served, state: Callable[[str], State], name: str
) -> None:
    at = state(name)
    show(page, instance, at=at)
    expect(page.get_by_role("status")).to_have_text(at.says)
    assert f"\n| {name} | {at.says} | ![{name}](console/{name.lower().replace(' ', '-')}.png) |" in GUIDE.read_text()
    if at.status["requests"]["scored"]:
        expect(page.locator(".timeline canvas")).to_be_visible()
    text = page.locator("body").inner_text()
    for sentence in at.shows:
        assert sentence in text
    if at.status["state"]["problems"]:
        began = time.localtime(at.status["state"]["problems"][0]["since"])
        day, minute = time.strftime("%Y-%m-%d ", began), time.strftime("%H:%M", began)
        assert re.search(f"Since ({day})?{minute}", text), "the day is there if it is not the browser's today"
        expect(page.locator(".verdict > .sub").get_by_role("link", name="Runbook")).to_have_attribute(
            "href", at.status["state"]["problems"][0]["runbook"]
        )
    assert page.evaluate("document.documentElement.scrollHeight") <= SCREEN["height"], "everything without scrolling"
    assert page.locator("table:not(.u-legend)").count() == 0
    assert len(text.split()) <= MAX_WORDS
    steps = page.locator(".next li")
    assert steps.count() <= 5
    assert all(step.locator("a, button").count() == 1 for step in steps.all()), "each has one action"
    assert bool(steps.count()) == (name not in {"healthy", "promoted", "25 kinds", "first hour"})
    red = at.status["state"]["level"] == "critical"
    prefix = "ALARM – " if red else "WARNING – " if at.status["state"]["problems"] else ""
    assert page.title() == f"{prefix}Hemostat"
    assert page.locator(".verdict.bad").count() == red


@needs_chromium
def test_what_compression_costs_what_serves_since_when_and_what_is_measured(
    page: Page, instance: Served, state: Callable[[str], State]
) -> None:
    at = state("promoted")
    show(page, instance, at=at)
    expect(page.locator(".tile").nth(3)).to_contain_text("Last score")
    traffic, cost, profile, measured = (tile.inner_text() for tile in page.locator(".tile").all())
    assert "12.0 requests/s" in traffic
    assert "Failed in the last minute: 0 of" in traffic
    assert "99 % of requests at most 0.8" in traffic
    assert "≥ 0.082 nats per token" in cost
    assert "1 to 2 of 10 tokens differ" in cost
    assert "95 % [0.076, 0.088]; 55 % of the budget of 0.150" in cost
    assert f"{SERVING[:8]} 63 % of the traffic" in profile
    assert "(15 min)" in profile
    assert "Treated minus control: −0.017 [−0.023, −0.011] nats" in profile
    assert "97 % of sampled tokens scored" in measured
    assert "1 wait, the oldest 0 s. Last score 0 s ago." in measured
    assert page.locator("figure.spark polyline").count() == 6


@needs_chromium
def test_the_last_minute_is_red_only_where_an_alarm_is_raised_for_it(
    page: Page, instance: Served, state: Callable[[str], State]
) -> None:
    at = state("healthy")
    last = at.history["points"]["kl_recent"][-1]
    at.status["alarm"]["budget_nats"] = None
    show(page, instance, at=at)
    cost = page.locator(".tile").nth(1)
    expect(cost).to_contain_text(f"Last minute {nats(last)}.")
    assert cost.locator(".bad-text").count() == 0, "no budget"
    at.status["alarm"]["budget_nats"] = last / 2
    at.answer(page)
    page.reload()
    expect(cost).to_contain_text(f"Last minute {nats(last)}.")
    assert cost.locator(".bad-text").count() == 0, "over the budget for a minute, which proves nothing"
    next(test for test in at.status["alarm"]["tests"] if test["test"] == "budget")["raised"] = True
    at.answer(page)
    page.reload()
    expect(cost.locator(".bad-text")).to_have_text(f"Last minute {nats(last)}.")


@needs_chromium
@pytest.mark.parametrize(("failed", "colour"), [(0, "good"), (7, "wait"), (720, "bad")])
def test_errors_are_those_of_the_last_minute(
    page: Page, instance: Served, state: Callable[[str], State], failed: int, colour: str
) -> None:
    at = state("healthy")
    at.status["proxy"]["recent"]["failed"] = failed
    show(page, instance, at=at)
    chip = page.locator(".chips li", has_text="errors")
    expect(chip).to_have_text(f"errors: {failed} of 720 requests in the last minute")
    expect(chip).to_have_class(colour)


@needs_chromium
def test_how_figures_are_written(page: Page, instance: Served, state: Callable[[str], State]) -> None:
    show(page, instance, at=state("healthy"))

    def told(call: str) -> str:
        result: str = page.evaluate(f"import('/console/format.js').then((f) => f.{call})")
        return result

    for ends in ([0.1, 0.2], [0.1, None], [None, 0.2], [None, None]):
        assert told(f"range({json.dumps(ends)})") == interval(ends)  # type: ignore[arg-type]
    assert told("range(null)") == told("UNKNOWN_INTERVAL") == UNKNOWN_INTERVAL
    few = {"estimate": 0.4, "ci95": [None, None], "ci95_seen": [None, None], "cap": 20.0, "no_interval": CARRIED_BY_FEW}
    assert told(f"interval({json.dumps(few)})") == CARRIED_BY_FEW
    assert told("ofTokens(0.239, 0.576)") == "2 to 6 of 10"
    assert told("ofTokens(0.239, 0.241)") == "About 2 of 10"
    assert told("ofTokens(0.239, null)") == "At least 2 of 10"
    assert told("ofTokens(0.031, 0.2)") == "3 to 20 of 100"
    assert told("ofTokens(0, 0.04)") == "At most 4 of 100"
    assert told("ofTokens(0, 0.0004)") == "Fewer than 1 of 1,000"


@needs_chromium
@pytest.mark.parametrize("apart", [1, 5, 15, 30, 60, 300, 3600])
def test_no_label_of_a_time_axis_is_there_twice(
    page: Page, instance: Served, state: Callable[[str], State], apart: int
) -> None:
    show(page, instance, at=state("healthy"))
    ticks = [1_700_000_000 // apart * apart + apart * n for n in range(12)]
    labels = page.evaluate(f"import('/console/parts.js').then((parts) => parts.clock({ticks}))")
    assert len(set(labels)) == len(ticks)


@needs_chromium
def test_more_problems_than_fit_are_counted_and_the_worst_is_first(
    page: Page, instance: Served, state: Callable[[str], State]
) -> None:
    at = state("alarm")
    for alert in ("HemostatRecordsLost", "HemostatStoreErrors", "HemostatReferenceDown", "HemostatUpstreamDown"):
        at.problem(alert, f"text of {alert}", 60.0)
    show(page, instance, at=at)
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
    page: Page, instance: Served, state: Callable[[str], State]
) -> None:
    at = state("promoted")
    at.history = {"points": {name: [] for name in at.history["points"]}, "events": []}
    show(page, instance, at=at)
    expect(page.locator(".timeline")).to_contain_text("No history yet")
    assert "Since " in page.locator(".tile").nth(2).inner_text(), "events are kept in the store"
    assert "≥ 0.082" in page.locator(".tile").nth(1).inner_text()
    show(page, instance, "divergence")
    expect(page.locator("main")).to_contain_text("No history yet")
    assert len(rows(page, "By kind of traffic")) == len(KINDS)


@needs_chromium
def test_a_gate_that_fails_is_said_and_its_page_says_why(
    page: Page, instance: Served, state: Callable[[str], State]
) -> None:
    at = state("healthy")
    failed_gate(at)
    show(page, instance, at=at)
    expect(page.locator(".headline")).to_contain_text(
        "The live gate: fail: the candidate is farther from the reference"
    )
    expect(page.locator(".chips")).to_contain_text("gate: problem")
    show(page, instance, "gate")
    expect(page.locator("main")).to_contain_text("in the kind 'completions text sampled'")
    expect(page.locator("main")).to_contain_text("3 times: the candidate failed: it answered 500")
    assert len(rows(page, "Excess of the candidate")) == 9


# --- every page ------------------------------------------------------------------------------------------------------


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_is_accessible_and_fits_a_phone(
    page: Page, instance: Served, state: Callable[[str], State], scheme: Any
) -> None:
    page.emulate_media(color_scheme=scheme)
    at = state("alarm")
    long = "word" * 50
    at.status["learner"]["detail"] = at.status["configuration"]["error"] = long
    at.status["compressed"]["models"] = [long]
    failed_gate(at)
    at.answer(page)
    for path in PAGES:
        page.set_viewport_size(SCREEN)  # type: ignore[arg-type]
        show(page, instance, path)
        page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
        assert_accessible(page)
        page.set_viewport_size(PHONE)  # type: ignore[arg-type]
        page.wait_for_function(FITS_PHONE)
        text = page.locator("main").inner_text()
        if not path.startswith("profiles/"):
            assert not re.search(r"\b[0-9a-f]{32}\b", text), "versions have 8 digits"
        assert "undefined" not in text
        assert "NaN" not in text
    assert page.title().startswith("WARNING – ")


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_runbook_is_a_page_that_phones_can_show(page: Page, instance: Served, scheme: Any) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size(PHONE)  # type: ignore[arg-type]
    page.goto(f"{instance.url}/runbook#hemostatreferencedown")
    expect(page.get_by_role("heading", name="HemostatReferenceDown")).to_be_in_viewport()
    page.wait_for_function(FITS_PHONE)
    assert_accessible(page)


@needs_chromium
def test_everything_is_reached_by_the_keyboard(page: Page, instance: Served, state: Callable[[str], State]) -> None:
    show(page, instance, "profiles", state("healthy"))
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
def test_addresses_name_the_page_the_group_and_the_time(
    page: Page, instance: Served, state: Callable[[str], State]
) -> None:
    show(page, instance, "divergence?by=decoding&range=15m", state("alarm"))
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
    page.goto(f"{instance.url}/#/nothing-of-this-name")
    expect(page.get_by_role("status")).to_be_visible()


@needs_chromium
def test_links_lead_to_grafanas_panels(page: Page, instance: Served, state: Callable[[str], State]) -> None:
    show(page, instance, at=state("healthy"))
    asked = ["javascript:alert(1)", "https://grafana.example/x/"]
    page.on("dialog", lambda dialog: dialog.accept(asked.pop(0)))
    page.get_by_role("button", name="Grafana").click()
    expect(page.get_by_role("button", name="Grafana")).to_be_visible()
    page.get_by_role("button", name="Grafana").click()
    link = page.get_by_role("link", name="Grafana")
    expect(link).to_have_attribute("href", re.compile("^https://grafana.example/x/d/hemostat-overview"))
    panels = {(board["uid"], panel["id"]) for board in load().values() for panel in board["panels"]}
    for path in PAGES:
        show(page, instance, f"{path}?range=6h")
        match = re.search(r"/d/([\w-]+)\?viewPanel=(\d+)&from=now-6h&to=now$", link.get_attribute("href") or "")
        assert match is not None
        assert (match[1], int(match[2])) in panels, path


@needs_chromium
def test_tables_sort_and_fold(page: Page, instance: Served, state: Callable[[str], State]) -> None:
    show(page, instance, "kinds", state("25 kinds"))
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
def test_the_chart_has_ink_and_marks(page: Page, instance: Served, state: Callable[[str], State]) -> None:
    at = state("alarm")
    show(page, instance, at=at)
    expect(page.locator(".timeline .u-legend")).to_contain_text(nats(at.history["points"]["kl_recent"][-1]))
    assert [mark.partition(" ")[0] for mark in page.locator(".marks li").all_inner_texts()] == ["A", "C", "L"]

    def inked() -> list[int]:
        """Pixels in the colours of the last minute, and of the budget and the alarm."""
        result: list[int] = page.evaluate(
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
        return result

    line, marked = inked()
    assert line > 300
    assert marked > 100
    at.status["alarm"]["events"] = []
    at.answer(page)
    page.reload()
    expect(page.locator(".marks li")).to_have_count(2)
    assert inked()[1] < marked


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
