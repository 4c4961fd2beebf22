import math

import numpy as np
import pytest

from hemostat_calibration import guard
from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.guard import Action, Role

A, B = "a" * 32, "b" * 32


def run(state, version, gains, unsure=0.0):
    """Observe until something is decided; the decision, and how many it took."""
    for n, gain in enumerate(gains, start=1):
        state = guard.observe(state, version, gain - unsure, gain + unsure, 20)
        decision = guard.decide(state, version)
        if decision.action in (Action.PROMOTE, Action.ROLL_BACK):
            return decision, n
    return decision, len(gains)


def gains(seed, mean, n=600, spread=0.05):
    return np.random.default_rng(seed).normal(mean, spread, n).clip(-0.5, 0.5)


def candidate(width=1.0, alpha=0.05):
    return guard.enter(guard.init(alpha), A, Role.CANDIDATE, width)


def test_what_helps_is_promoted_with_its_evidence():
    decision, n = run(candidate(), A, gains(0, 0.04))
    assert decision.action is Action.PROMOTE
    assert decision.version == A
    found = decision.evidence
    assert (found.requests, found.tokens, found.test) == (n, 20 * n, 1)
    assert found.mean_gain == pytest.approx(gains(0, 0.04)[:n].mean())
    assert 0.0 < found.lower < found.mean_gain
    assert found.upper == math.inf
    assert found.alpha == 0.025
    assert n < 200


def test_what_harms_or_does_nothing_is_not():
    for mean in (-0.04, 0.0):
        decision, _ = run(candidate(), A, gains(1, mean))
        assert decision.action is Action.WAIT
        assert decision.evidence.lower <= 0.0


def test_promotion_needs_what_is_certain():
    """A gain known only to ±0.05 around 0.04 may be a loss."""
    assert run(candidate(), A, gains(0, 0.04), unsure=0.05)[0].action is Action.WAIT


def test_what_stops_helping_is_rolled_back():
    state = guard.enter(guard.init(window=200), A, Role.SERVING, 1.0)
    for gain in gains(0, 0.04, n=400):
        state = guard.observe(state, A, gain, gain, 20)
        assert guard.decide(state, A).action is Action.HOLD
    decision, n = run(state, A, gains(1, -0.04))
    assert decision.action is Action.ROLL_BACK
    assert decision.evidence.upper < 0.0
    assert decision.evidence.lower == -math.inf
    assert decision.evidence.mean_gain < 0.0
    assert decision.evidence.test == 3
    assert n < 400


def test_rolling_back_needs_what_is_certain():
    state = guard.enter(guard.init(), A, Role.SERVING, 1.0)
    assert run(state, A, gains(0, -0.04), unsure=0.05)[0].action is Action.HOLD


def test_alpha_is_spent_over_all_tests():
    state = guard.init(alpha=0.06)
    spent = []
    for k in range(50):
        version = f"{k:032x}"
        state = guard.enter(state, version, Role.CANDIDATE, 1.0)
        spent.append(guard.decide(state, version).evidence.alpha)
        state = guard.leave(state, version)
    assert spent[:3] == pytest.approx([0.03, 0.01, 0.005])
    assert 0.05 < sum(spent) < 0.06
    state = guard.enter(state, A, Role.SERVING, 1.0)
    assert guard.decide(state, A).evidence.alpha == 0.03


def test_the_error_holds_over_a_run_of_useless_candidates():
    """Five candidates in turn, none of any use, looked at after every request."""
    alpha, runs, wrong = 0.1, 40, 0
    for seed in range(runs):
        state = guard.init(alpha)
        for k in range(5):
            version = f"{k:032x}"
            state = guard.enter(state, version, Role.CANDIDATE, 0.5)
            decision, _ = run(state, version, gains(1000 * seed + k, 0.0, n=60, spread=0.1))
            if decision.action is Action.PROMOTE:
                wrong += 1
                break
    assert wrong / runs <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / runs)


def test_versions_do_not_mix():
    state = guard.enter(candidate(), B, Role.CANDIDATE, 1.0)
    state = guard.observe(state, A, 0.3, 0.3, 5)
    assert guard.decide(state, B).evidence.requests == 0
    assert math.isnan(guard.decide(state, B).evidence.mean_gain)
    assert guard.decide(state, A).evidence.tokens == 5
    assert A not in guard.leave(state, A).watches
    assert guard.leave(state, "c" * 32) == state


def test_observing_leaves_the_old_state():
    state = candidate()
    guard.observe(state, A, 0.1, 0.1, 5)
    assert guard.decide(state, A).evidence.requests == 0


def test_arguments():
    for alpha in (0.0, 1.0, math.nan):
        with pytest.raises(InvalidArgumentError, match="alpha"):
            guard.init(alpha)
    with pytest.raises(InvalidArgumentError, match="window"):
        guard.init(window=0)
    for width in (0.0, math.inf, math.nan):
        with pytest.raises(InvalidArgumentError, match="width"):
            guard.enter(guard.init(), A, Role.CANDIDATE, width)
    with pytest.raises(InvalidArgumentError, match="not watched"):
        guard.decide(guard.init(), A)
    with pytest.raises(InvalidArgumentError, match="above upper"):
        guard.observe(candidate(), A, 0.2, 0.1, 5)
    with pytest.raises(InvalidArgumentError, match="observation"):
        guard.observe(candidate(), A, -1.5, 0.1, 5)
