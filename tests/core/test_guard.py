import math

import numpy as np
import pytest
from tests.support.hidden_state_world import HiddenStateWorld
from tests.support.oracle import apply
from tests.support.records import log_softmax

from hemostat_calibration import guard
from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.guard import Action, Reason, Role
from hemostat_calibration.profiles.contextual import contextual_profile

A, B = "a" * 32, "b" * 32


def run(state, version, gains, unsure=0.0):
    """Observe until something is decided; the decision, and how many it took."""
    for n, gain in enumerate(gains, start=1):
        state = guard.update(state, version, gain - unsure, gain + unsure, 20)
        decision = guard.decide(state, version)
        if decision.action in (Action.PROMOTE, Action.ROLL_BACK):
            return decision, n
    return decision, len(gains)


def gains(seed, mean, n=600, spread=0.05):
    return np.random.default_rng(seed).normal(mean, spread, n).clip(-0.5, 0.5)


def candidate(width=1.0, alpha=0.05):
    return guard.begin_test(guard.init(alpha), A, Role.CANDIDATE, width)


def test_what_helps_is_promoted_with_its_evidence():
    decision, n = run(candidate(), A, gains(0, 0.04))
    assert decision.action is Action.PROMOTE
    assert decision.name == A
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


def won(world, profile, prompts):
    """KL that a profile recovers, exactly, mean of each prompt's tokens."""
    found = []
    for seed in prompts:
        truth = world.truth(seed)
        after = log_softmax(apply(profile, truth.compressed))
        found.append(float((np.exp(truth.reference) * (after - truth.compressed)).sum(-1).mean()))
    return found


def test_what_was_learned_from_too_little_with_a_weak_penalty_harms_and_identity_is_held():
    """Least squares without a penalty on 20 tokens of two prompts; what cross-validation makes of 60 prompts serves."""
    world = HiddenStateWorld(strength=0.3, noise=0.6)
    rows = [world.record(seed, 10) for seed in range(2)]
    x = np.column_stack([np.concatenate([r.features.values[:, :14] for r in rows]), np.ones(20)])
    target = np.concatenate([np.subtract(*world.hidden(seed, 10)) for seed in range(2)])
    fit = np.linalg.lstsq(x, target, rcond=None)[0]
    weak = contextual_profile(
        model="m", anchors=world.anchors, linear=fit[:-1].T, offset=fit[-1], up=world.weight, clamp_nats=1.0
    )
    chosen = world.learner(clamp_nats=1.0).propose(world.learn(range(60)))
    before = world.divergence()
    assert world.divergence(weak) > before > world.divergence(chosen)
    for profile, action in ((weak, Action.WAIT), (chosen, Action.PROMOTE)):
        decision, _ = run(candidate(2.0), A, won(world, profile, range(1000, 1400)))
        assert decision.action is action
    assert guard.decide(candidate(), A).action is Action.WAIT, "nor without any evidence"


def serving(width=1.0, window=200, alpha=0.05):
    return guard.begin_test(guard.init(alpha), A, Role.SERVING, width, window)


def test_what_turns_harmful_is_rolled_back_at_once():
    state = serving()
    for gain in gains(0, 0.04, n=400):
        state = guard.update(state, A, gain, gain, 20)
        assert guard.decide(state, A).action is Action.HOLD
    decision, n = run(state, A, gains(1, -0.04))
    assert (decision.action, decision.reason) == (Action.ROLL_BACK, Reason.HARM)
    assert decision.evidence.upper < 0.0
    assert decision.evidence.mean_gain < 0.0
    assert not decision.evidence.supported
    assert decision.evidence.test == 3
    assert n < 200, "before the window's end"


def test_what_no_longer_helps_is_rolled_back_at_the_windows_end():
    state = serving()
    helped, n = run(state, A, gains(0, 0.04, n=399))
    assert (helped.action, n) == (Action.HOLD, 399)
    for gain in gains(0, 0.04, n=400):
        state = guard.update(state, A, gain, gain, 20)
    decision, n = run(state, A, gains(1, 0.0))
    assert (decision.action, decision.reason, n) == (Action.ROLL_BACK, Reason.UNSUPPORTED, 200)
    assert decision.evidence.lower <= 0.0 <= decision.evidence.upper
    # Not acted upon (a pinned profile): the next window begins with the next request.
    state = guard.update(state, A, 0.0, 0.0, 20)
    assert guard.decide(state, A).action is Action.HOLD


def test_support_within_a_window_lasts_to_its_end():
    state = serving()
    early = [*gains(0, 0.1, n=100), *gains(1, -0.005, n=100)]
    decision, n = run(state, A, early)
    assert (decision.action, n) == (Action.HOLD, 200)
    assert decision.evidence.supported
    assert (decision.evidence.window, decision.evidence.requests) == (200, 200)


def test_what_is_unknown_neither_harms_nor_supports():
    decision, n = run(serving(), A, gains(0, -0.04, n=199), unsure=0.05)
    assert (decision.action, n) == (Action.HOLD, 199)
    decision, n = run(serving(), A, gains(0, 0.04), unsure=0.05)
    assert (decision.reason, n) == (Reason.UNSUPPORTED, 200)


def test_a_profile_of_no_use_outlasts_a_window_with_alpha_at_most():
    alpha, runs = 0.1, 150
    stayed = 0
    for seed in range(runs):
        decision, _ = run(serving(0.5, 60, alpha), A, gains(seed, 0.0, n=60, spread=0.15))
        stayed += decision.action is Action.HOLD
    assert stayed / runs <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / runs)


def test_a_good_profile_outlasts_its_windows():
    """As the docstring says: a spread of 2.5 times the mean, windows as long as the proof makes them."""
    stayed, runs = 0, 20
    for seed in range(runs):
        proof, _ = run(candidate(0.5), A, gains(seed, 0.04, n=400, spread=0.1))
        assert proof.action is Action.PROMOTE
        window = guard.window_after_promotion(proof.evidence)
        assert window == max(200, 4 * proof.evidence.requests)
        decision, _ = run(serving(0.5, window), A, gains(100 + seed, 0.02, n=window, spread=0.1))
        stayed += decision.action is Action.HOLD
    assert stayed >= 17, "even when half of its gain is gone"


def test_what_was_spent_before_stays_spent():
    state = guard.init(0.06, {Role.CANDIDATE: 2})
    state = guard.begin_test(state, A, Role.CANDIDATE, 1.0)
    found = guard.decide(state, A).evidence
    assert (found.test, found.alpha) == (3, pytest.approx(0.005))
    with pytest.raises(InvalidArgumentError, match="negative"):
        guard.init(0.05, {Role.SERVING: -1})


def test_alpha_is_spent_over_all_tests():
    state = guard.init(alpha=0.06)
    spent = []
    for k in range(50):
        version = f"{k:032x}"
        state = guard.begin_test(state, version, Role.CANDIDATE, 1.0)
        spent.append(guard.decide(state, version).evidence.alpha)
        state = guard.end_test(state, version)
    assert spent[:3] == pytest.approx([0.03, 0.01, 0.005])
    assert 0.05 < sum(spent) < 0.06
    state = guard.begin_test(state, A, Role.SERVING, 1.0)
    assert guard.decide(state, A).evidence.alpha == 0.03


@pytest.mark.parametrize("mean", [0.0, -0.01])
def test_the_error_holds_over_a_run_of_useless_candidates(mean):
    """Five candidates in turn, none of any use or a little harmful, looked at after every request."""
    alpha, runs, wrong = 0.1, 80, 0
    for seed in range(runs):
        state = guard.init(alpha)
        for k in range(5):
            version = f"{k:032x}"
            state = guard.begin_test(state, version, Role.CANDIDATE, 0.5)
            decision, _ = run(state, version, gains(1000 * seed + k, mean, n=60, spread=0.1))
            if decision.action is Action.PROMOTE:
                wrong += 1
                break
    assert wrong / runs <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / runs)


def test_versions_do_not_mix():
    state = guard.begin_test(candidate(), B, Role.CANDIDATE, 1.0)
    state = guard.update(state, A, 0.3, 0.3, 5)
    assert guard.decide(state, B).evidence.requests == 0
    assert math.isnan(guard.decide(state, B).evidence.mean_gain)
    assert guard.decide(state, A).evidence.tokens == 5
    assert A not in guard.end_test(state, A).running
    assert guard.end_test(state, "c" * 32) == state


def test_observing_leaves_the_old_state():
    state = candidate()
    guard.update(state, A, 0.1, 0.1, 5)
    assert guard.decide(state, A).evidence.requests == 0


def test_arguments():
    for alpha in (0.0, 1.0, math.nan):
        with pytest.raises(InvalidArgumentError, match="alpha"):
            guard.init(alpha)
    with pytest.raises(InvalidArgumentError, match="window"):
        guard.begin_test(guard.init(), A, Role.SERVING, 1.0, window=0)
    for width in (0.0, math.inf, math.nan):
        with pytest.raises(InvalidArgumentError, match="width"):
            guard.begin_test(guard.init(), A, Role.CANDIDATE, width)
    with pytest.raises(InvalidArgumentError, match="not under test"):
        guard.decide(guard.init(), A)
    with pytest.raises(InvalidArgumentError, match="above upper"):
        guard.update(candidate(), A, 0.2, 0.1, 5)
    with pytest.raises(InvalidArgumentError, match="observation"):
        guard.update(candidate(), A, -1.5, 0.1, 5)
