"""Length of the thinking and how often it does not end, by arm."""

from __future__ import annotations

import numpy as np
import pytest
from tests.support.samples import values

from hemostat.measurement.thinking import CUT, ENDED, NONE, STOPPED, ThinkingFigures, ending
from hemostat.metrics import names
from hemostat_calibration.reasoning import Thinking


def test_how_a_thinking_ended() -> None:
    endless = Thinking(0, 9, ended=False)
    assert ending(None, "stop") == NONE
    assert ending(Thinking(0, 9, ended=True), "length") == ENDED
    assert ending(endless, "length") == CUT
    assert ending(endless, "stop") == STOPPED


def filled(control: float, treated: float, requests: int = 400) -> ThinkingFigures:
    """Shares that do not end their thinking, which is twice as long then."""
    figures, rng = ThinkingFigures(1000), np.random.default_rng(5)
    for _ in range(requests):
        for arm, share in (("control", control), ("treated", treated)):
            endless = bool(rng.random() < share)
            tokens = int(rng.integers(50, 150)) * (2 if endless else 1)
            figures.update(arm, Thinking(0, tokens, ended=not endless), "length" if endless else "stop", fresh=True)
    return figures


def test_an_arm_that_ends_its_thinking_less_often_is_seen_with_its_interval() -> None:
    report = filled(0.05, 0.4).report()
    never = report["treated_minus_control"]["never_ended"]
    assert never["ci95"][0] > 0.1
    assert never["ci95"][0] < never["estimate"] < never["ci95"][1]
    assert report["treated_minus_control"]["tokens"]["ci95"][0] > 0.0
    treated = report["arms"]["treated"]
    assert treated["requests"] == 400
    assert treated["endings"][CUT] == round(400 * treated["never_ended"]["estimate"])
    low, high = treated["tokens"]["ci95"]
    assert low < treated["tokens"]["estimate"] < high
    assert "none" not in report["arms"]


def test_no_difference_is_found_between_arms_that_are_alike() -> None:
    never = filled(0.1, 0.1).report()["treated_minus_control"]["never_ended"]
    assert never["ci95"][0] < 0.0 < never["ci95"][1]


@pytest.mark.parametrize("length", [1, 5])
def test_intervals_are_of_the_effective_requests(length: int) -> None:
    """Runs of alike requests."""
    figures, rng, covered = [ThinkingFigures(1000) for _ in range(30)], np.random.default_rng(1), 0
    for measured in figures:
        for _ in range(400 // length):
            endless = bool(rng.random() < 0.3)
            for _ in range(length):
                measured.update(
                    "none", Thinking(0, 100, ended=not endless), "length" if endless else "stop", fresh=True
                )
        share = measured.report()["arms"]["none"]["never_ended"]
        assert 0.8 * length <= share["inflation"] <= 3.0 * length
        assert share["effective_requests"] == pytest.approx(400 / share["inflation"])
        covered += share["ci95"][0] <= 0.3 <= share["ci95"][1]
    assert covered >= 29


def test_too_few_requests_have_no_interval() -> None:
    report = filled(0.1, 0.1, requests=20).report()
    assert report["arms"]["treated"]["never_ended"]["ci95"] == [None, None]
    assert report["treated_minus_control"]["never_ended"]["ci95"] == [None, None]


def test_requests_without_thinking_count_beside_the_figures() -> None:
    figures = ThinkingFigures(1000)
    figures.update("none", None, "stop", fresh=True)
    figures.update("none", Thinking(2, 12, ended=True), "stop", fresh=True)
    figures.update("none", Thinking(0, 30, ended=True), "stop", fresh=False)
    report = figures.report()
    none = report["arms"]["none"]
    assert (none["requests"], none["tokens"]["estimate"], none["never_ended"]["estimate"]) == (1, 10.0, 0.0)
    assert none["endings"] == {ENDED: 2, CUT: 0, STOPPED: 0, NONE: 1}
    assert report["treated_minus_control"]["never_ended"] == {"estimate": None, "ci95": [None, None]}
    exported = values(figures.samples())
    assert exported[names.THINKING_TOKENS, "none"] == 40.0
    assert exported[names.THINKING_REQUESTS, "none", ENDED] == 2.0
    assert exported[names.THINKING_REQUESTS, "treated", CUT] == 0.0


def test_nothing_yet() -> None:
    report = ThinkingFigures(1000).report()
    assert report["arms"] == {}
    assert report["treated_minus_control"]["tokens"] == {"estimate": None, "ci95": [None, None]}


@pytest.mark.parametrize("tokens", [1000, 5000])
def test_a_thinking_longer_than_the_limit_is_clipped_in_the_mean(tokens: int) -> None:
    figures = ThinkingFigures(1000)
    figures.update("none", Thinking(0, tokens, ended=False), "length", fresh=True)
    assert figures.report()["arms"]["none"]["tokens"]["estimate"] == 1000.0
