"""The picture, the plain line and the report, from a status as the admin port gives it."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from hemostat.demo import view
from hemostat.demo.traffic import Traffic


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
        "calibration": {"learned_tokens": 900, "candidates": []},
        "learner": {"state": "training", "detail": "network 42%", "tokens": 1234567},
        "records_written": 0,
    }


@pytest.fixture
def scene(status: dict[str, Any]) -> view.Scene:
    traffic = Traffic(sent=12, ok=11, failed=1, last_failure="demo-0-3: [HTTP 503]", last_text="Paris,\nof course")
    return view.Scene("smollm2", "http://127.0.0.1:1", "http://127.0.0.1:2", "/logs", traffic, status, 61.0)


def rendered(scene: view.Scene) -> str:
    console = Console(width=110, record=True, markup=False, highlight=False, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(view.picture(scene))
    return console.export_text()


def test_the_picture_shows_every_figure(scene: view.Scene) -> None:
    text = rendered(scene)
    for expected in (
        "12 sent, 11 ok, 1 failed",
        "9, scored 7, 2 waiting (1.5 s behind)",
        "1,234",
        "2 (grammar 2)",
        "ready  smollm2 [bfloat16]",
        "training  network 42%  1,234,567 tokens",
        "at least (from the top 64)",
        "0.412 [0.390, 0.430]",
        "0.399 [0.380, 0.420]",
        "0.570 [–, –]",
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


def test_before_anything_is_known_the_picture_stands(scene: view.Scene) -> None:
    scene.status = {}
    text = rendered(scene)
    assert "starting" in text
    assert view.UNKNOWN in text
    assert view.UNKNOWN in view.line(scene)


def test_the_plain_line_has_the_figures(scene: view.Scene) -> None:
    line = view.line(scene)
    assert "\n" not in line
    for expected in ("sent 12, ok 11, failed 1", "scored 7 (1234 tokens)", "KL 0.412 [0.390, 0.430] nats", "57.6 %"):
        assert expected in line


def test_the_report_is_as_promised(scene: view.Scene, status: dict[str, Any]) -> None:
    report = view.report(scene)
    assert report["requests"] == {"sent": 12, "ok": 11, "failed": 1, **status["requests"]}
    assert report["tokens_scored"] == 1234
    assert report["top_k"] == 64
    assert report["raw"]["kl_nats"] == {"estimate": 0.41234, "ci95": [0.39, 0.43], "bound": "lower"}
    assert report["calibrated"]["kl_nats"]["estimate"] == 0.399
    assert report["profile"] == {"version": "ab" * 16, "family": "temperature_bias", "mode": "auto"}
