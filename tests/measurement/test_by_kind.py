"""Figures by kind of traffic, gains in both weightings, and the finite-sample intervals beside the asymptotic ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tests.support.records import Truth, make_record
from tests.support.samples import values
from tests.support.temperature_bias import temperature_bias
from tests.support.world import V, World

from hemostat.measurement.by_kind import MAX_KINDS
from hemostat.measurement.figures import HEADLINE
from hemostat.measurement.measurements import Measurements
from hemostat_calibration.divergence.per_token import divergence
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_calibration.records import Arm, TokenRecord

WORLD = World(bias=0.6, noise=0.3)
SHORT, LONG = "chat text sampled", "chat json greedy"


def profile_of(scale: float = 1.0) -> CalibrationProfile:
    return temperature_bias("m", V, 1.0, -scale * WORLD.bias, 1.0)


def record(seed: int, tokens: int, profile: CalibrationProfile, kind: str, arm: Arm = Arm.NONE) -> TokenRecord:
    truth = WORLD.truth(seed)
    truth = Truth(truth.reference[:tokens], truth.compressed[:tokens], truth.emitted[:tokens])
    made = make_record(truth, 20, profile=profile, applied=profile.version if arm is Arm.TREATED else None)
    return replace(made, kind=kind, arm=arm)


def test_a_kind_has_its_own_figures_arms_and_gain() -> None:
    profile, measured = profile_of(), Measurements()
    given = [
        record(n, 4 + n % 7, profile, SHORT if n % 3 else LONG, Arm.TREATED if n % 2 else Arm.CONTROL)
        for n in range(120)
    ]
    for item in given:
        measured.update(item, profile, profile if item.arm is Arm.TREATED else None)
    short, long = measured.by_kind.report()
    assert (short["kind"], short["requests"]) == (SHORT, 80)
    assert (long["kind"], long["requests"]) == (LONG, 40)
    told = np.concatenate(
        [divergence(item, profile if item.applied else None).kl_rc for item in given if item.kind == LONG]
    )
    assert long["tokens"] == len(told)
    assert long["raw"]["kl_nats"]["estimate"] == pytest.approx(told.mean())
    for kind in (short, long):
        assert kind["arms"]["treated"]["requests"] + kind["arms"]["control"]["requests"] == kind["requests"]
        assert kind["arms"]["treated_minus_control"]["kl_nats_estimate"]["estimate"] < 0.0
        assert kind["profile"] == profile.version
        assert kind["gain_nats"]["estimate"] > 0.0
        assert 0.0 < kind["recovered"]["estimate"] < 1.0
    gauges = values(measured.samples())
    assert gauges["hemostat_kind_gain_nats", LONG, "token"] == long["gain_nats"]["estimate"]
    assert gauges["hemostat_recovered_divergence_ratio", SHORT] == short["recovered"]["estimate"]
    accepted = short["raw"]["draft_acceptance"]
    assert gauges["hemostat_kind_draft_acceptance_ratio", SHORT, "lower"] == accepted["lower"]
    assert gauges["hemostat_kind_draft_acceptance_ratio", SHORT, "upper"] == accepted["upper"]
    tokens = sum(gauges["hemostat_kind_kl_tokens_total", LONG, str(arm)] for arm in Arm)
    assert tokens == long["tokens"]


def test_both_weightings_are_reported() -> None:
    """A long request moves the mean by token more than the mean by request."""
    good = profile_of()
    measured = Measurements()
    for n in range(40):
        measured.update(record(n, 2, good, SHORT), good, None)
    gain = measured.gained(good.version)
    assert gain is not None
    assert gain["by_request"]["estimate"] == pytest.approx(gain["estimate"]), "all requests have two tokens"
    measured = Measurements()
    for n in range(20):
        measured.update(record(n, 2, good, SHORT), good, None)
    before = measured.gained(good.version)
    measured.update(record(41, 30, good, SHORT), good, None)
    after = measured.gained(good.version)
    assert before is not None
    assert after is not None
    assert after["requests"] == 21
    share = (after["estimate"] - before["estimate"]) / (
        after["by_request"]["estimate"] - before["by_request"]["estimate"]
    )
    assert share > 5.0, "30 of 70 tokens, and one of 21 requests"


def test_finite_intervals_say_when_there_is_not_enough() -> None:
    profile, measured = profile_of(), Measurements()
    measured.update(record(0, 20, profile, SHORT), profile, None)
    raw = measured.summary(None)
    assert raw["kl_nats"]["by_request"]["ci95_finite"] is None
    assert [raw["by_request"][name]["ci95_finite"] for name in ("total_variation", "top1_agreement")] == [None, None]
    for n in range(1, 250):
        measured.update(record(n, 20, profile, SHORT), profile, None)
    raw, gain = measured.summary(None), measured.gained(profile.version)
    assert gain is not None
    for name in HEADLINE:
        told = raw[name]["by_request"] if isinstance(raw[name], dict) else raw["by_request"][name]
        low, high = told["ci95_finite"]
        assert low <= told["estimate"] <= high, name
    by_request = raw["kl_nats"]["by_request"]
    assert by_request["estimate"] == pytest.approx(raw["kl_nats"]["estimate"]), "all requests have as many tokens"
    low, high = by_request["ci95_finite"]
    assert low < by_request["estimate"] < high
    assert high - low > raw["kl_nats"]["ci95"][1] - raw["kl_nats"]["ci95"][0], "what no limit theorem is needed for"
    low, high = gain["by_request"]["ci95_finite"]
    assert low < gain["by_request"]["estimate"] < high


def test_kinds_are_bounded_and_later_turns_only_count() -> None:
    profile, measured = profile_of(), Measurements()
    for n in range(MAX_KINDS + 10):
        measured.update(record(0, 5, profile, f"kind {n}"), None, None)
    assert len(measured.by_kind.report()) == MAX_KINDS
    measured.update(record(0, 5, profile, "kind 70"), None, None, fresh=False)
    (result,) = (kind for kind in measured.by_kind.report() if kind["kind"] == "kind 70")
    assert result["requests"] == 1
    assert values(measured.samples())["hemostat_kind_kl_tokens_total", "kind 70", "none"] == 10
    measured.update(record(0, 5, profile, ""), None, None)
    assert "rest" in {kind["kind"] for kind in measured.by_kind.report()}
