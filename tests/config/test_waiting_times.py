"""The waiting times by the settings, which serve prints, and the table of the quick start."""

from __future__ import annotations

import re
from typing import Any

import pytest
from tests.support.paths import ROOT

from hemostat.config.schema import Settings
from hemostat.config.waiting_times import waiting_times

QUICK_START = ROOT / "docs" / "quickstart.md"


def settings(**more: Any) -> Settings:
    reference = {"backend": "vllm", "url": "http://127.0.0.1:1"}
    return Settings.model_validate({"upstream": {"url": "http://127.0.0.1:1"}, "reference": reference} | more)


def told(**more: Any) -> dict[str, str]:
    return {time.step: time.when for time in waiting_times(settings(**more))}


def test_the_quick_start_has_the_waiting_times_of_the_defaults() -> None:
    section = QUICK_START.read_text().partition("## What comes when")[2].partition("\n## ")[0]
    rows = [tuple(cells) for cells in re.findall(r"^\| (.+) \| (.+) \|$", section, re.MULTILINE)]
    assert rows == [("what", "when"), *((time.what, time.when) for time in waiting_times(settings()))]


def test_the_settings_change_them() -> None:
    trial = told(evidence={"cycle_hours": 0}, alarm={"baseline_requests": 30}, canaries={"enabled": False})
    assert trial == {
        "figure": "with the first scored request",
        "interval": "after about 50 scored requests",
        "alarm": "after 30 scored requests of a kind",
        "promotion": "after 96 scored conversations of a kind, and only with proof",
    }
    week = told(evidence={"cycle_hours": 168}, calibration={"mode": "off"})
    assert week["cycle"] == "after 7 days"
    assert week["alarm"].endswith("over at least 7 days")
    assert "promotion" not in week
    assert "alarm" not in told(alarm={"baseline_requests": None})
    assert told(alarm={"baseline_requests": None, "budget_nats": 0.1})["alarm"].startswith("after 96 scored requests")
    assert told(calibration={"mode": "auto"}) == told()


@pytest.mark.parametrize("mode", ["observe", "auto"])
def test_a_promotion_takes_two_cycles(mode: str) -> None:
    assert "over at least 3 days" in told(evidence={"cycle_hours": 36}, calibration={"mode": mode})["promotion"]


def test_without_a_reference_nothing_will_ever_be_known() -> None:
    assert told(reference={"backend": "none"}) == {}
