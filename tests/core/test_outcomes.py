"""The trial of one profile in one kind: what is counted, what is proven, what one client can do, and restarts."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.guard.kind_test import MIN_UNITS_OF_FEW_CLIENTS
from hemostat_calibration.outcomes import CAP_UNITS, LENGTH, MAX_CLIENTS, TESTS, Outcome, Settings, Trial, Unit
from hemostat_calibration.statistics.two_arms import TwoArms


def clients(count):
    return [bytes([37 * n % 256, n]) for n in range(count)]


def life(seed, units, treated_rate, control_rate, *, control_fraction=0.5, lengths=None, every=20, trial=None):
    """The trial after `units` units, or after the one with which harm is proven."""
    rng = np.random.default_rng(seed)
    trial = trial or Trial(Settings(), "v", 1)
    who = clients(20)
    for n in range(units):
        treated = bool(rng.random() >= control_fraction)
        bad = bool(rng.random() < (treated_rate if treated else control_rate))
        tokens = None if lengths is None else float(rng.gamma(2.0, 0.5 * lengths[treated]))
        trial.update(Unit(who[rng.integers(20)], treated, {Outcome.JSON: bad}, tokens))
        if n % every == 0 and trial.harm() is not None:
            break
    return trial


def test_harm_is_proven_and_described():
    trial = life(1, 1500, 0.9, 0.625)
    result = trial.harm()
    assert result.outcome == "json"
    assert result.harm
    assert result.difference.low > 0.05
    assert 0.15 < result.difference.mean < 0.45
    assert trial.units == result.treated_units + result.control_units < 700


def test_a_harmless_profile_is_not_harmful():
    assert sum(life(seed, 400, 0.45, 0.4, lengths=(60, 80)).harm() is not None for seed in range(20)) == 0


@pytest.mark.parametrize("lengths", [(100, 260), (260, 100)], ids=["longer", "shorter"])
def test_a_changed_length_is_found(lengths):
    trial = life(1, 3000, 0.1, 0.1, lengths=lengths)
    result = trial.harm()
    assert result.outcome == LENGTH
    assert trial.cap == pytest.approx(4.0 * 180, rel=0.5)
    assert abs(result.difference.mean) > 0.5


def test_a_length_that_changes_within_the_margin_is_not():
    trial = life(1, 2000, 0.1, 0.1, lengths=(100, 140))
    assert trial.harm() is None
    reading = next(r for r in trial.readings() if r.outcome == LENGTH)
    assert -0.5 < reading.difference.low < 0.4 < reading.difference.high
    assert reading.treated_units + reading.control_units == trial.units - CAP_UNITS


def test_later_versions_spend_less():
    spent = [Trial(Settings(alpha=0.05), "v", k).alpha for k in range(1, 2000)]
    assert spent[0] == pytest.approx(0.05 / 2 / TESTS)
    assert sum(spent) * TESTS < 0.05


class Units(list):
    """All units, as a trial is given them."""

    update = list.append


def attack(trial, honest, attacker, seed=0, share=0.2, units=3000):
    """One client's treated answers are all bad, and its control answers all good."""
    rng = np.random.default_rng(seed)
    for _ in range(units):
        treated = bool(rng.random() < 0.5)
        if rng.random() < share:
            trial.update(Unit(attacker, treated, {Outcome.JSON: treated}))
        else:
            trial.update(Unit(honest[rng.integers(len(honest))], treated, {Outcome.JSON: bool(rng.random() < 0.3)}))
    return trial


def test_one_client_cannot_prove_harm():
    trial = attack(Trial(Settings(), "v", 1), clients(40)[:-1], clients(40)[-1])
    total, everything = TwoArms(), Units()
    attack(everything, clients(40)[:-1], clients(40)[-1])
    for unit in everything:
        total = total.update(treated=unit.treated, bad=unit.bad[Outcome.JSON])
    assert total.log_e(0.05) > 3 * -math.log(trial.alpha), "the attack would succeed against all units together"
    assert trial.harm() is None


def test_a_client_has_at_most_its_share():
    who = clients(30)
    trial = Trial(Settings(client_share=0.25), "v", 1)
    counted = 0
    for n in range(400):
        before = trial.units
        trial.update(Unit(who[0] if n % 10 else who[1 + n // 10 % 29], True, {}))
        counted += trial.units - before if n % 10 else 0
    assert trial.limits_clients
    assert trial.refused > 200
    assert counted <= 0.25 * trial.units + 31


def test_few_clients_are_not_limited():
    trial = Trial(Settings(), "v", 1)
    assert all(trial.update(Unit(client, True, {})) for client in clients(3) * 50)
    assert not trial.limits_clients


def test_a_burst_of_one_client_decides_nothing_at_the_beginning():
    """It knows its arm by the answers, so that all treated ones can be bad and all control ones good."""
    trial = Trial(Settings(), "v", 1)
    for n in range(MIN_UNITS_OF_FEW_CLIENTS - 1):
        trial.update(Unit(b"one client", n % 2 == 0, {Outcome.JSON: n % 2 == 0}))
        assert trial.harm() is None
        assert trial.readings()[0].evidence == 0.0
    trial.update(Unit(b"one client", True, {Outcome.JSON: True}))
    assert trial.harm() is not None, "the evidence was there before"


def test_memory_is_bounded():
    trial = Trial(Settings(), "v", 1)
    for n in range(1000):
        trial.update(Unit(n.to_bytes(8, "little"), bool(n % 2), dict.fromkeys(Outcome, bool(n % 3)), 1e6 + n))
    assert len(trial.save()["clients"]) == MAX_CLIENTS
    assert len(json.dumps(trial.save())) < 15_000


@settings(max_examples=20, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(clients(6)), st.booleans(), st.booleans(), st.sampled_from([None, 5.0, 900.0])),
        max_size=80,
    ),
    st.integers(0, 80),
)
def test_a_restart_changes_nothing(units, at):
    whole, part = Trial(Settings(), "v", 2), Trial(Settings(), "v", 2)
    for n, (client, treated, bad, tokens) in enumerate(units):
        if n == at:
            part = Trial.load(json.loads(json.dumps(part.save())), part.settings)
        unit = Unit(client, treated, {Outcome.CUT: bad}, tokens)
        assert whole.update(unit) == part.update(unit)
    assert part.save() == whole.save()
    assert (part.harm() is None) == (whole.harm() is None)


@pytest.mark.parametrize(
    "change",
    [
        {"counts": {"json": [[0, 0, 0, 0]]}},
        {"counts": {"json": [[1, 0, 0, 0]] * 16}},
        {"clients": {"x": 1}},
        {"lengths": {}},
    ],
)
def test_a_damaged_state_is_refused(change):
    saved = {**Trial(Settings(), "v", 1).save(), **change}
    with pytest.raises(InvalidArgumentError):
        Trial.load(saved, Settings())


@pytest.mark.parametrize("wrong", [{"alpha": 0.0}, {"margin": 1.0}, {"length_margin": 0.0}, {"client_share": 0.0}])
def test_wrong_settings(wrong):
    with pytest.raises(InvalidArgumentError):
        Settings(**wrong)
    with pytest.raises(InvalidArgumentError):
        Trial(Settings(), "v", 0)
