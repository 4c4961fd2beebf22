"""The verdict: error rates in simulated worlds, kinds, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.gate.verdict import MIN_UNITS, Gate, MeanTest, Outcome, Question, Verdict

NEAR = Question("near", "farther", 0.05, 0.15)
ALPHA = 0.05


def life(
    random: np.random.Generator, units: list[str], draw: dict[str, float], spread: float, questions: int = 1
) -> Verdict:
    """Asks until the verdict. units: the kind of each. draw: the mean of each kind. spread: D is the mean plus or minus
    it, so that its range is used."""
    asked = [Question(f"q{n}", "farther", 0.05, 0.15) for n in range(questions)]
    gate = Gate(asked, {kind: units.count(kind) for kind in set(units)}, ALPHA)
    for kind in units:
        value = draw[kind] + spread * float(random.choice((-1.0, 1.0)))
        gate.update(kind, {question.name: value for question in asked})
        if gate.verdict().outcome is not Outcome.UNDECIDED:
            break
    return gate.verdict()


@pytest.mark.parametrize("spread", [0.1, 0.9])
def test_a_mean_at_the_margin_is_seldom_found_on_either_side_of_it(spread: float) -> None:
    """200 lives of 250 units: 10 of each error are allowed, and 22 have a probability below 0.001."""
    random = np.random.default_rng(1)
    values = 0.05 + spread * random.choice((-1.0, 1.0), (200, 250))
    passed = failed = 0
    for row in values.tolist():
        test = MeanTest(0.05)
        most = 0.0
        for value in row:
            test.update(value)
            most = max(most, test.log_fail)
        passed += test.log_pass >= -math.log(ALPHA)
        failed += most >= -math.log(ALPHA)
    assert passed < 22
    assert failed < 22


def test_equal_candidates_pass_and_bad_ones_fail_within_16_tenths_of_the_least_possible() -> None:
    """Without noise 58 and 64 units are the least possible, for a bet that knows the means."""
    random = np.random.default_rng(2)
    equal = life(random, ["a"] * 93, {"a": 0.0}, 0.0)
    twice = life(random, ["a"] * 102, {"a": 0.1}, 0.0)
    assert (equal.outcome, twice.outcome) == (Outcome.PASS, Outcome.FAIL)


def test_one_bad_kind_prevents_a_pass_and_is_named() -> None:
    random = np.random.default_rng(3)
    units = (["usual"] * 19 + ["rare"]) * 100
    verdict = life(random, units, {"usual": -0.02, "rare": 0.3}, 0.05)
    assert verdict.outcome is Outcome.FAIL
    assert verdict.failed is not None
    assert (verdict.failed.kind, round(verdict.failed.mean, 1)) == ("rare", 0.3)


def test_a_kind_with_few_planned_units_is_not_required_and_is_named() -> None:
    units = ["usual"] * 100 + ["rare"] * (MIN_UNITS - 1)
    verdict = life(np.random.default_rng(4), units, {"usual": 0.0, "rare": 0.0}, 0.0)
    assert verdict.outcome is Outcome.PASS
    assert list(verdict.unseen) == ["rare"]
    assert verdict.unseen["rare"] == pytest.approx(29 / 129)
    required = life(np.random.default_rng(4), [*units, "rare"], {"usual": 0.0, "rare": 0.0}, 0.0)
    assert not required.unseen


JSON = Question("json", "invalid", 0.1, 0.15, min_units=60)


def test_a_question_that_applies_to_some_units_is_tested_on_these_alone() -> None:
    """One unit in ten asks for JSON, and half of these are bad: over all units that would be 0.05."""
    gate = Gate([NEAR, JSON], {"chat": 900, "data": 100}, applying={"json": {"data": 100}})
    for _ in range(100):
        gate.update("data", {"near": 0.0, "json": 0.5})
        for _ in range(9):
            gate.update("chat", {"near": 0.0})
    verdict = gate.verdict()
    assert verdict.outcome is Outcome.FAIL
    assert verdict.failed is not None
    assert (verdict.failed.question.name, verdict.failed.units) == ("json", 100)
    with pytest.raises(InvalidArgumentError, match="one of those that were planned"):
        gate.update("chat", {"near": 0.0, "json": 0.0})


@pytest.mark.parametrize(("units", "required"), [(59, False), (60, True)])
def test_a_question_is_required_if_it_applies_to_enough_units(units: int, required: bool) -> None:
    gate = Gate([NEAR, JSON], {"chat": 100 + units}, applying={"json": {"chat": units}})
    for _ in range(100):
        gate.update("chat", {"near": 0.0})
    verdict = gate.verdict()
    assert (verdict.outcome is Outcome.UNDECIDED) == required
    for _ in range(units):
        gate.update("chat", {"near": 0.0, "json": 0.0})
    verdict = gate.verdict()
    assert verdict.outcome is Outcome.PASS
    assert {finding.required for finding in verdict.findings if finding.question is JSON} == {required}


def test_several_questions_and_kinds_share_the_error_of_a_wrong_fail() -> None:
    """All means are at their margin, and all questions see the same numbers."""
    random = np.random.default_rng(5)
    kinds = [f"kind {n % 3}" for n in range(90)]
    outcomes = []
    for _ in range(100):
        gate = Gate([Question(f"q{n}", "x", 0.15, 0.15) for n in range(3)], dict.fromkeys(kinds, 30), ALPHA)
        for kind in kinds:
            gate.update(kind, {f"q{n}": 0.15 + 0.8 * float(random.choice((-1.0, 1.0))) for n in range(3)})
        outcomes.append(gate.verdict().outcome)
    assert outcomes.count(Outcome.FAIL) < 14


def test_how_many_more_units_it_takes_is_said_before() -> None:
    gate = Gate([NEAR], {"a": 200})
    for _ in range(20):
        gate.update("a", {"near": 0.0})
    more = gate.verdict().more
    assert more is not None
    for _ in range(more):
        gate.update("a", {"near": 0.0})
    assert gate.verdict().outcome is Outcome.PASS
    assert 40 < more < 70


def test_no_number_is_said_where_none_would_do() -> None:
    gate = Gate([NEAR], {"a": 200})
    gate.update("a", {"near": 0.06})
    assert gate.verdict().more is None


@pytest.mark.parametrize("value", [math.nan, 1.5, -1.01])
def test_a_difference_out_of_range_is_refused(value: float) -> None:
    with pytest.raises(InvalidArgumentError, match="must be within -1 and 1"):
        Gate([NEAR], {"a": 30}).update("a", {"near": value})


def test_what_was_not_planned_is_refused() -> None:
    gate = Gate([NEAR], {"a": 30})
    with pytest.raises(InvalidArgumentError, match="one of those that were planned"):
        gate.update("b", {"near": 0.0})
    with pytest.raises(InvalidArgumentError, match=r"must be of \['near'\]"):
        gate.update("a", {"far": 0.0})
    with pytest.raises(InvalidArgumentError, match="between 0 and 1"):
        Question("near", "x", 0.0, 0.15)
    with pytest.raises(InvalidArgumentError, match="alpha is 1"):
        Gate([NEAR], {"a": 30}, 1.0)
    with pytest.raises(InvalidArgumentError, match="a question and a kind"):
        Gate([NEAR], {})
