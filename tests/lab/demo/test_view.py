"""The live view, the plain line and the report, from a response of /api/v1/status."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from hemostat.measurement.dependence import CARRIED_BY_FEW
from hemostat_lab.demo import view
from hemostat_lab.demo.traffic import Traffic


@pytest.fixture
def status() -> dict[str, Any]:
    figures = {
        "kl_nats": {"estimate": 0.41234, "ci95": [0.39, 0.43], "bound": "lower"},
        "kl_nats_estimate": {"estimate": 0.57, "ci95": [None, None], "bound": "estimate"},
        "total_variation": 0.31,
        "top1_agreement": 0.576,
        "covered_mass": 0.87,
    }
    return {
        "requests": {"shadowed": 9, "scored": 7, "skipped": {"grammar": 2}, "dropped": {}, "pending": 2},
        "tokens_scored": 1234,
        "top_k": 64,
        "raw": figures,
        "calibrated": {**figures, "kl_nats": {"estimate": 0.399, "ci95": [0.38, 0.42], "bound": "lower"}},
        "profile": {"version": "ab" * 16, "family": "temperature_bias", "mode": "auto"},
        "queue": {"depth": 2, "lag_seconds": 1.5},
        "reference": {"state": "ready", "detail": "smollm2 [bfloat16]"},
        "calibration": {
            "kinds": [
                {
                    "kind": "chat text",
                    "requests": 90,
                    "share": 0.9,
                    "summary": "identity; cdcdcdcd: needs about 34 more",
                },
                {
                    "kind": "chat json",
                    "requests": 10,
                    "share": 0.1,
                    "summary": "identity; no held-out conversation yet",
                },
                {"kind": "rest", "requests": 0, "share": 0.0, "summary": "identity"},
            ],
        },
        "background": "adapter abababab: 38 of about 56 conversations of chat text, 4 min left",
        "learner": {"state": "training", "detail": "linear 42%", "tokens": 1234567},
        "recovered": {"ratio": None, "ci95": [None, None], "gain_nats": None},
        "arms": {"treated_minus_control": {}},
        "records_written": 0,
    }


@pytest.fixture
def scene(status: dict[str, Any]) -> view.Scene:
    traffic = Traffic(sent=12, ok=11, failed=1, last_failure="demo-0-3: [HTTP 503]", last_text="Paris,\nof course")
    return view.Scene("smollm2", "http://127.0.0.1:1", "http://127.0.0.1:2", "/logs", traffic, status, 61.0)


def rendered(scene: view.Scene) -> str:
    console = Console(width=110, record=True, markup=False, highlight=False, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(view.render(scene))
    return console.export_text()


def test_view_shows_every_figure(scene: view.Scene) -> None:
    text = rendered(scene)
    for expected in (
        "12 sent, 11 ok, 1 failed",
        "9 requests, scored 7 choices, 2 waiting (1.5 s behind)",
        "1,234",
        "2 (grammar 2)",
        "ready  smollm2 [bfloat16]",
        "training  linear 42%  1,234,567 tokens",
        "background        adapter abababab: 38 of about 56 conversations of chat text, 4 min left",
        "at least (from the top 64)",
        "0.412 [0.390, 0.430]",
        "0.399 [0.380, 0.420]",
        "0.570 interval not known yet",
        "0.310",
        "57.6 %",
        "87.0 %",
        f"{'ab' * 16} (temperature_bias); mode auto",
        "http://127.0.0.1:2/metrics",
        "http://127.0.0.1:1/v1",
        "Paris, of course",
        "demo-0-3: [HTTP 503]",
    ):
        assert expected in text, text


def promoted(scene: view.Scene) -> view.Scene:
    """The same once a profile serves, as `control.status` has it then."""

    def arm(requests: int, kl: float) -> dict[str, Any]:
        estimate = {"estimate": kl, "ci95": [0.1, 0.9], "bound": "estimate"}
        return {"requests": requests, "kl_nats_estimate": estimate, "total_variation": 0.28, "top1_agreement": 0.611}

    def differs(estimate: float) -> dict[str, Any]:
        return {"estimate": estimate, "ci95": [estimate - 0.02, estimate + 0.02]}

    top1 = {"tokens": 640, **{name: differs(at) for name, at in (("before", 0.55), ("after", 0.6), ("change", 0.05))}}
    raw = scene.status["raw"]
    same = {**raw, "kl_nats": {"estimate": 0.4711, "ci95": [0.46, 0.48], "bound": "lower"}}
    scene.status = {
        **scene.status,
        "calibrated": {
            **scene.status["calibrated"],
            "requests": 321,
            "raw_same_requests": same,
            "top1_by_decoding": {"greedy": top1, "sampled": {**top1, "tokens": 0}},
        },
        "recovered": {"ratio": 0.241, "ci95": [0.2, 0.28], "gain_nats": differs(0.123)},
        "arms": {
            "control": arm(52, 0.571),
            "treated": arm(49, 0.452),
            "treated_minus_control": {
                "kl_nats_estimate": differs(-0.119),
                "total_variation": differs(-0.04),
                "top1_agreement": differs(0.061),
            },
        },
    }
    evidence = {"units": 103, "tokens": 6000, "mean_gain": 0.1127, "mean_gain_by_token": 0.0912}
    scene.decisions = [
        {
            **{"at": 2.0, "decision": "promote", "reason": "evidence", "version": "ab" * 16, "kind": "chat"},
            **{"why": "better on held-out requests", "evidence": evidence},
        },
        {
            **{"at": 1.0, "decision": "propose", "reason": "learned", "version": "ab" * 16},
            **{
                "why": "learned from 3001 tokens: linear, rank 8",
                "evidence": {"gain": 0.2, "tokens": 3001, "requests": 65},
            },
        },
    ]
    return scene


def test_serving_profile_is_shown_with_its_gain_and_the_reason(scene: view.Scene) -> None:
    text = rendered(promoted(scene))
    for expected in (
        "promote abababab for chat (evidence): better on held-out requests; gain 0.113 nats by",
        "request, 0.091 by token, on 103 held-out conversations",
        "reference against compressed, 321 requests",
        "0.471 [0.460, 0.480]",
        "0.399 [0.380, 0.420]",
        "0.123 [0.103, 0.143]",
        "24.1 % [20.0, 28.0]",
        "55.0 % [53.0, 57.0]",
        "60.0 % [58.0, 62.0]",
        "control, 52 requests",
        "treated, 49 requests",
        "0.571 [0.100, 0.900]",
        "0.452 [0.100, 0.900]",
        "-0.119 [-0.139, -0.099]",
        "6.1 % [4.1, 8.1]",
    ):
        assert expected in text, text
    assert "learned from 3001 tokens" not in text, "what is proposed is under test"
    assert (
        view.decision_line(scene.decisions[1]) == "propose abababab (learned): learned from 3001 tokens: linear, rank 8"
    )
    variation = {
        "figure": "total_variation",
        "mean_gain": 0.2,
        "mean_gain_by_token": 0.19,
        "mean_kl_gain": 0.4,
        "units": 9,
    }
    line = view.decision_line({**scene.decisions[1], "evidence": variation})
    assert "gain of the total variation 0.200 by request, 0.190 by token, of the KL 0.400 nats, on 9 held-out" in line
    assert "0.412" not in text, "what is compared is of the same requests"
    assert "of sampled requests" not in text, "there was none"
    assert "recovered of KL: 24.1 % [20.0, 28.0], 0.123 nats [0.103, 0.143]" in view.status_line(scene)
    report = view.report(scene)
    assert report["decisions"] == scene.decisions
    assert report["arms"]["treated_minus_control"]["kl_nats_estimate"]["estimate"] == -0.119
    assert report["recovered"]["ratio"] == 0.241


def test_arms_are_compared_after_the_first_treated_request(scene: view.Scene) -> None:
    text = rendered(scene)
    assert "control" not in text


def test_every_kind_that_was_met_is_shown_with_what_serves_it_or_is_missing(scene: view.Scene) -> None:
    text = rendered(scene)
    assert "chat text         90.0 % of the traffic; identity; cdcdcdcd: needs about 34 more" in text
    assert "rest" not in text
    assert view.kind_lines(scene) == [
        "chat text (90.0 % of the traffic): identity; cdcdcdcd: needs about 34 more",
        "chat json (10.0 % of the traffic): identity; no held-out conversation yet",
    ]
    kinds = scene.status["calibration"]["kinds"]
    kinds.extend({**kinds[0], "kind": f"chat label {n}"} for n in range(view.MAX_KINDS_SHOWN))
    assert f"chat label {view.MAX_KINDS_SHOWN - 3}" in rendered(scene)
    assert f"chat label {view.MAX_KINDS_SHOWN - 2}" not in rendered(scene)
    assert len(view.kind_lines(scene)) == 2 + view.MAX_KINDS_SHOWN
    scene.status = {}
    assert view.kind_lines(scene) == []


def test_view_without_a_status(scene: view.Scene) -> None:
    scene.status = {}
    text = rendered(scene)
    assert "starting" in text
    assert view.UNKNOWN in text
    assert view.UNKNOWN in view.status_line(scene)


def test_status_line_has_the_figures(scene: view.Scene) -> None:
    line = view.status_line(scene)
    assert "\n" not in line
    for expected in (
        "sent 12, ok 11, failed 1",
        "scored 7 choices (1234 tokens)",
        "KL 0.412 nats [0.390, 0.430]",
        "57.6 %",
    ):
        assert expected in line
    scene.status = {**scene.status, "profile": {"version": "a" * 32}}
    assert f"profile {'a' * 32} serves" in view.status_line(scene)
    scene.status = {}
    assert "no profile serves" in view.status_line(scene)


def test_report_has_the_documented_fields(scene: view.Scene, status: dict[str, Any]) -> None:
    report = view.report(scene)
    assert report["requests"] == {"sent": 12, "ok": 11, "failed": 1, **status["requests"]}
    assert report["tokens_scored"] == 1234
    assert report["top_k"] == 64
    assert report["raw"]["kl_nats"] == {"estimate": 0.41234, "ci95": [0.39, 0.43], "bound": "lower"}
    assert report["calibrated"]["kl_nats"]["estimate"] == 0.399
    assert report["profile"] == {"version": "ab" * 16, "family": "temperature_bias", "mode": "auto"}


def test_what_is_made_of_adapters_and_what_the_arms_received_are_one_line_each() -> None:
    assert view.adapter_line({}) == ""
    adapter = {
        "state": "collecting",
        "detail": "",
        "tokens": 2345,
        "last_build": None,
        "judge": {"judged": 7},
        "engine": {"state": "ready", "detail": "", "ready": ["a" * 32]},
    }
    assert view.adapter_line({"adapter": adapter | {"state": "off"}}) == ""
    line = (
        "adapter collecting, 2,345 tokens known; at the engine: ready, 1 can be used; "
        "7 requests judged on copies of the model"
    )
    assert view.adapter_line({"adapter": adapter}) == line
    built = {
        "version": "b" * 32,
        "tokens": 2045,
        "rank": 16,
        "bytes": 5_520_000,
        "wall_seconds": 32.1,
        "held_out": None,
    }
    assert "bbbbbbbb from 2,045 tokens, rank 16, 5.5 MB, 32 s;" in view.adapter_line(
        {"adapter": adapter | {"last_build": built}}
    )
    won = built | {"held_out": {"share": 0.69}}
    assert "69.0 % of KL won" in view.adapter_line({"adapter": adapter | {"last_build": won}})
    failed = {"outcome": "memory", "detail": "", "tokens": 2045}
    assert "the last one failed (memory)" in view.adapter_line({"adapter": adapter | {"last_build": failed}})

    def arm(kl: float | None) -> dict[str, object]:
        ends = [None, None] if kl is None else [kl - 0.1, kl + 0.1]
        return {"requests": 30, "kl_nats_estimate": {"estimate": kl, "ci95": ends}}

    assert view.arms_line({"arms": {"control": arm(0.6), "treated": arm(None)}}) == ""
    difference = {"kl_nats_estimate": {"estimate": -0.45, "ci95": [-0.6, -0.3]}}
    arms = {"control": arm(0.6), "treated": arm(0.15), "treated_minus_control": difference}
    assert view.arms_line({"arms": arms}) == (
        "what clients received: KL 0.600 nats [0.500, 0.700] (30 requests) in the control arm, 0.150 nats [0.050, "
        "0.250] (30 requests) in the treated one: 0.25 times it; treated minus control: -0.450 nats [-0.600, -0.300]"
    )
    arms["treated_minus_control"] = {"kl_nats_estimate": {"estimate": -0.45, "ci95": [None, None]}}
    assert view.arms_line({"arms": arms}).endswith("treated minus control: -0.450 nats, interval not known yet")
    assert view.arms_line({"arms": arms | {"treated_minus_control": {}}}).endswith(f"control: {view.UNKNOWN}")


def test_enough_requests_were_sent_60_after_the_first_promotion_or_when_the_arms_have_an_interval() -> None:
    scene = view.Scene("m", "", "", "", Traffic(sent=200, began_at=1000.0))
    proposal = {"decision": "propose", "at": 1100.0}
    scene.update_decisions([proposal])
    assert (scene.finished, view.promotion_line(scene)) == (False, "")
    scene.update_decisions([{"decision": "promote", "at": 1190.0}, proposal])
    scene.traffic.sent = 259
    scene.update_decisions([{"decision": "promote", "at": 1220.0}, {"decision": "promote", "at": 1190.0}, proposal])
    assert not scene.finished
    assert scene.first_promotion == view.FirstPromotion(200, 190.0)
    assert view.promotion_line(scene) == (
        "the first profile was promoted after 200 requests, 190 s after the first one"
    )
    scene.traffic.sent = 260
    assert not scene.finished, "the difference of the arms has no interval yet"
    scene.status = {"arms": {"treated_minus_control": {"kl_nats_estimate": {"ci95": [-0.6, -0.3]}}}}
    assert scene.finished
    scene.traffic.sent = 259
    assert not scene.finished
    scene.traffic.sent, scene.status = 440, {}
    assert scene.finished


@pytest.mark.parametrize(
    ("ends", "shown"),
    [
        ([0.1, 19.9], "0.412 [0.100, 19.900]"),
        ([0.0, 20.0], "0.412 interval not known yet"),
        ([None, None], "0.412 interval not known yet"),
        ([0.1, None], "0.412 at least 0.100"),
        ([None, 0.5], "0.412 at most 0.500"),
    ],
)
def test_how_an_interval_is_shown(ends: list[float | None], shown: str) -> None:
    """After very few requests it is all that the figure can be, which says nothing."""
    assert view.interval({"estimate": 0.41234, "ci95": ends, "cap": 20.0}) == shown


def test_a_reason_that_the_status_gives_is_shown(scene: view.Scene) -> None:
    few = {"ci95": [None, None], "no_interval": CARRIED_BY_FEW}
    assert view.interval({"estimate": 0.41234, "cap": 20.0, **few}) == f"0.412 {CARRIED_BY_FEW}"
    assert view.share({"estimate": 0.722, **few}) == f"72.2 % {CARRIED_BY_FEW}"
    scene.status = {**scene.status, "recovered": {"ratio": 0.722, "gain_nats": {"estimate": 0.1, **few}, **few}}
    assert f"recovered of KL: 72.2 % {CARRIED_BY_FEW}, 0.100 nats, {CARRIED_BY_FEW}" in view.status_line(scene)


def test_a_share_without_an_interval_says_so() -> None:
    assert view.share({"estimate": 0.722, "ci95": [None, None]}) == "72.2 % interval not known yet"
    assert view.share({"estimate": 0.241, "ci95": [0.203, 0.279]}) == "24.1 % [20.3, 27.9]"
