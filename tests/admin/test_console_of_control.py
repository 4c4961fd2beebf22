"""The console in a browser: that the pages show what the API of a `Control` says, and the operator's actions on it."""

from __future__ import annotations

import re
from asyncio import StreamWriter
from pathlib import Path

import numpy as np
from playwright.sync_api import Browser, Page, expect
from tests.support import adapter_status
from tests.support.admin_server import GRAMMAR_REQUESTS, KINDS, Served, served
from tests.support.chromium import needs_chromium
from tests.support.console_page import FITS_PHONE, PAGES, PHONE, assert_accessible, get, rows, show
from tests.support.console_text import divergence_interval, interval, nats, percent
from tests.support.control import TOKEN, connect_relay, relay_stats

from hemostat.control.composition import Control
from hemostat.reference.pair import ReferenceState

# --- what the API says -----------------------------------------------------------------------------------------------


@needs_chromium
def test_the_divergence_by_each_group_is_the_apis(page: Page, instance: Served) -> None:
    status = get(instance, "status")
    show(page, instance, "divergence")
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
        for (name, figures), row in zip(expected, shown, strict=False):
            kl = figures["kl_nats"]
            start = " | ".join([name, str(figures["requests"]), nats(kl["estimate"]), divergence_interval(kl)])
            assert row.startswith(start), by
        assert len(shown) == len(expected) + (by == "grammar")
    # The wider interval is drawn wider, on one scale.
    page.get_by_label("Group by").select_option("route")
    boxes = [box.bounding_box() for box in page.locator("rect.span").all()]
    widths = [box["width"] for box in boxes if box is not None]
    ends = [figures["kl_nats"]["ci95"] for _, figures in groups["route"]]
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
    for arm, figures in status["thinking"]["arms"].items():
        never = figures["never_ended"]
        assert f"{percent(never['estimate'])} {interval(never['ci95'], percent)}" in thinking[arm]
        assert f"ended {figures['endings']['ended']}" in thinking[arm]


@needs_chromium
def test_what_serves_each_kind_on_what_evidence_and_with_what_outcomes(page: Page, instance: Served) -> None:
    status = get(instance, "status")
    show(page, instance, "kinds")
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
    page.goto(f"{instance.url}/#/kinds/{KINDS[1]}")
    expect(page.get_by_role("region", name="Outcomes of answers")).to_contain_text(
        "harmed: cut, 100.0 % with the profile and 0.0 % without"
    )
    assert any("rolled back" in row for row in rows(page, "Events of this kind"))


@needs_chromium
def test_which_profiles_there_are_and_what_each_has_shown(page: Page, instance: Served) -> None:
    status, profiles = get(instance, "status"), get(instance, "profiles")
    version = profiles["serving"][:8]
    show(page, instance, "profiles")
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
def test_what_adapters_correct_and_why_none_serves(page: Page, instance: Served) -> None:
    say = adapter_status
    show(page, instance, "profiles")
    expect(page.locator("main")).to_contain_text("Adapters are off")
    before = [(part, part.status) for part in say.parts(instance.control)]
    try:
        instance.do(lambda control: say.report(control, say.learner(), say.judge(), say.engine()))
        expect(page.locator("main")).to_contain_text("1 adapter can be used by requests: 943966cb.")
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
        instance.do(lambda control: say.report(control, building, say.judge(), out))
        main = page.locator("main")
        expect(main).to_contain_text("No request uses an adapter: vLLM runs without --enable-lora.")
        expect(main).to_contain_text("building: layer 4 of 30")
        expect(main).to_contain_text("the last build failed (memory): more than adapter.memory_mib")
    finally:
        instance.do(lambda _: [setattr(part, "status", status) for part, status in before])


@needs_chromium
def test_what_is_measured_and_what_waits(page: Page, instance: Served) -> None:
    status = get(instance, "status")
    show(page, instance, "measurement")
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
    show(page, instance, "alarm")
    alarm = get(instance, "status")["alarm"]
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
        page.goto(f"{instance.url}/#/{path}")
        assert page.get_by_role("button", name=re.compile("Accept")).count() == 0, "only where it is explained"


# --- actions ---------------------------------------------------------------------------------------------------------


@needs_chromium
def test_the_operators_actions(page: Page, instance: Served) -> None:
    version = get(instance, "profiles")["serving"]
    other = next(p["version"] for p in get(instance, "profiles")["profiles"] if p["version"] != version)

    def confirm(asks: str) -> None:
        expect(page.get_by_role("dialog")).to_contain_text(asks)
        page.get_by_label("Admin token").fill(TOKEN)
        page.get_by_role("button", name="Confirm").click()
        expect(page.get_by_role("dialog")).to_be_hidden()

    def press(path: str, button: str, asks: str) -> None:
        show(page, instance, path)
        page.get_by_role("button", name=button).click()
        confirm(asks)

    show(page, instance, f"profiles/{other[:8]}")
    page.get_by_role("button", name=f"Pin {other[:8]}").click()
    page.keyboard.press("Escape")
    assert get(instance, "profiles")["pinned"] is False, "nothing without a confirmation"
    press(f"kinds/{KINDS[0]}", f"Roll back {KINDS[0]}", "Roll back this kind?")
    assert get(instance, "profiles")["by_kind"] == {}
    press(f"kinds/{KINDS[1]}", f"Release {KINDS[1]}", "Release this kind?")
    assert get(instance, "profiles")["held"] == []
    press(f"profiles/{other[:8]}", f"Pin {other[:8]}", "Pin this profile?")
    assert get(instance, "profiles")["pinned"] is True
    press("profiles", "Unpin", "Unpin?")
    expect(page.get_by_role("button", name="Unpin")).to_be_hidden()
    press(f"profiles/{version[:8]}", f"Promote {version[:8]}", "Promote this profile?")
    assert set(get(instance, "profiles")["by_kind"].values()) == {version}
    press("profiles", "Roll back all kinds to identity", "Roll back?")
    assert get(instance, "profiles")["by_kind"] == {}
    press("profiles", "observe", "Set calibration to observe?")
    expect(page.locator("#mode")).to_have_text("observe")
    show(page, instance, "alarm")
    page.get_by_text("accept the present state").click()
    page.get_by_role("button", name=f"Accept {KINDS[0]} as baseline").click()
    confirm("Accept as the new baseline?")
    assert not get(instance, "status")["alarm"]["raised"]
    show(page, instance)
    expect(page.get_by_role("status")).to_have_text(
        re.compile("A profile was rolled back in .+: asked for by the operator")
    )
    assert page.title() == "WARNING – Hemostat"
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
