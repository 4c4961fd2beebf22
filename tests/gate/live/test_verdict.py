"""The verdict on live traffic: what it waits for, kinds, clocks, and what is stored."""

from __future__ import annotations

import numpy as np
import pytest

from hemostat_calibration import state_codec
from hemostat_calibration.elapsed import TimeBreak
from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.gate import live
from hemostat_calibration.gate.live import RUN, LiveGate, LiveRules, LiveState, LiveVerdict
from hemostat_calibration.gate.verdict import Outcome, Question

DAY = 86_400.0
NEAR = Question("near", "farther from the reference", 0.05, 0.15)
OWN = Question("own", "farther on its own answers", 0.05, 0.15)


@pytest.fixture
def without_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """No request is taken to fail together with others before that has been seen: a pass takes fewer units."""
    monkeypatch.setattr(live, "RUN", 1)


def gate(cycle: float = 0.0, *questions: Question, waived: bool = False) -> LiveGate:
    return LiveGate(LiveState(LiveRules(questions or (NEAR,), 0.05, cycle, 26, waived)))


def feed(
    gate: LiveGate,
    units: int,
    mean: float,
    *,
    kind: str = "chat",
    begin: float = 1.0,
    seconds: float = 60.0,
    seed: int = 0,
) -> float:
    """Counts independent units; returns the time after them."""
    noise = np.random.default_rng([seed, units]).normal(0.0, 0.05, units)
    for unit, value in enumerate((mean + noise).tolist()):
        gate.update_met(kind)
        gate.update(kind, {question.name: value for question in gate.state.rules.questions}, begin + seconds * unit)
    return begin + seconds * units


def verdict(gate: LiveGate, noted: float = 1.0) -> LiveVerdict:
    return gate.verdict(lambda kind, units: noted)


@pytest.mark.usefixtures("without_runs")
def test_a_pass_and_a_fail_wait_for_two_cycles() -> None:
    for mean, outcome in ((0.0, Outcome.PASS), (0.3, Outcome.FAIL)):
        made = gate(DAY)
        now = feed(made, 200, mean)
        found = verdict(made)
        assert (found.outcome, found.early) == (Outcome.UNDECIDED, outcome)
        feed(made, 50, mean, begin=now + 3600.0, seconds=4000.0)
        found = verdict(made)
        assert (found.outcome, found.early) == (outcome, None)
        waived = gate(DAY, waived=True)
        feed(waived, 200, mean)
        assert verdict(waived).outcome is outcome


@pytest.mark.usefixtures("without_runs")
def test_what_is_noted_of_the_traffic_costs_units() -> None:
    made = gate()
    feed(made, 200, 0.0)
    assert verdict(made).outcome is Outcome.PASS
    assert verdict(made, noted=20.0).outcome is Outcome.UNDECIDED


def test_runs_of_bad_answers_are_expected_where_distances_come_in_runs() -> None:
    """Before the first run of bad answers their own v̂ is 1: two fifths of these lives passed, whose mean is the
    margin."""
    passed = 0
    for life in range(40):
        random, made = np.random.default_rng(life), gate(0.0, NEAR, OWN)
        for unit in range(240):
            if unit % 10 == 0:
                bad, common = float(random.random() < 0.05), random.normal(-0.1, 0.05)
            near = float(common + random.normal(0.0, 0.01))
            made.update("chat", {"near": near, "own": bad}, now=1.0 + unit)
            if unit % 20 == 19 and verdict(made).outcome is Outcome.PASS:
                passed += 1
                break
    assert passed <= 6


@pytest.mark.parametrize("share", [1, 5])
def test_a_pass_allows_for_runs_of_bad_answers_that_have_not_come_yet(share: int) -> None:
    """A question that only a part of the requests is asked gets that part of a run."""
    made = gate(0.0, NEAR, OWN)
    units = 0
    while verdict(made).outcome is Outcome.UNDECIDED:
        for _ in range(20):
            made.update("chat", {"near": -0.5} | ({"own": 0.0} if units % share == 0 else {}), now=1.0 + units)
            units += 1
    own = units / share
    assert 60 < own / (1.0 + (RUN - 1.0) / share) < 85


def test_few_units_decide_nothing() -> None:
    made = gate()
    feed(made, 40, -0.5)
    assert verdict(made).outcome is Outcome.UNDECIDED


def test_a_candidate_that_is_good_in_the_mean_and_bad_in_a_kind_fails() -> None:
    made = gate()
    now = feed(made, 600, -0.05)
    assert verdict(made).outcome is Outcome.PASS
    feed(made, 160, 0.35, kind="code", begin=now)
    found = verdict(made)
    assert found.outcome is Outcome.FAIL
    assert found.failed is not None
    assert found.failed.kind == "code"


@pytest.mark.usefixtures("without_runs")
def test_a_kind_has_to_pass_once_it_is_seen_enough_and_is_named_before() -> None:
    made, now = gate(), 1.0
    for turn in range(80):
        now = feed(made, 9, -0.05, begin=now, seed=turn)
        now = feed(made, 1, 0.14, kind="code", begin=now, seed=turn)
        if turn == 30:
            found = verdict(made)
            assert found.outcome is Outcome.PASS
            assert found.unseen == pytest.approx({"code": 0.1})
    found = verdict(made)
    assert (found.outcome, found.unseen) == (Outcome.UNDECIDED, {})
    assert [finding.kind for finding in found.waiting] == ["code"]


@pytest.mark.usefixtures("without_runs")
def test_a_kind_of_which_one_question_is_not_seen_enough_is_named() -> None:
    made = gate(0.0, NEAR, OWN)
    for unit in range(200):
        made.update_met("chat")
        made.update("chat", {"near": 0.0} | ({"own": 0.0} if unit % 5 == 0 else {}), now=1.0 + unit)
    found = verdict(made)
    assert found.unseen == {"chat": 1.0}
    assert [finding.question.name for finding in found.waiting] == ["own"]


def test_a_clock_that_is_set_ends_no_cycle() -> None:
    made = gate(DAY)
    now = feed(made, 200, 0.0)
    feed(made, 20, 0.0, begin=now + 10 * DAY)
    assert verdict(made).outcome is Outcome.UNDECIDED
    made = gate(DAY)
    now = feed(made, 200, 0.0, seconds=500.0)
    before = verdict(made).seconds
    made.after_break(TimeBreak(now + 5 * DAY, 5 * DAY, anew=False))
    feed(made, 20, 0.0, begin=now + 5 * DAY)
    assert verdict(made).seconds == pytest.approx(before + 500.0 + 19 * 60.0, abs=600.0)
    made.after_break(TimeBreak(0.0, -1e9, anew=True))
    assert verdict(made).seconds == 0.0


def test_what_is_stored_is_all_that_a_gate_knows() -> None:
    made = gate(DAY, NEAR, OWN)
    feed(made, 100, 0.02)
    stored = state_codec.encode(made.state, 1)
    again = LiveGate(state_codec.decode(LiveState, stored, 1))
    for each in (made, again):
        feed(each, 60, 0.02, begin=1e5)
    assert verdict(again) == verdict(made)
    assert state_codec.encode(again.state, 1) == state_codec.encode(made.state, 1)


@pytest.mark.parametrize(
    ("kind", "excess", "said"),
    [
        ("", {"near": 0.0}, "the kind has no name"),
        ("chat", {"far": 0.0}, "of \\['far'\\]"),
        ("chat", {"near": 2.0}, "is 2.0"),
    ],
)
def test_what_cannot_be_counted_is_refused(kind: str, excess: dict[str, float], said: str) -> None:
    with pytest.raises(InvalidArgumentError, match=said):
        gate().update(kind, excess, 1.0)
