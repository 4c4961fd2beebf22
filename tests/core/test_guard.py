"""The guard on profiles that were really learned. Its rules: test_guard_kinds.py; its guarantees: tests/bench/guard."""

import numpy as np
from tests.support.hidden_state_world import HiddenStateWorld
from tests.support.oracle import apply
from tests.support.records import log_softmax

from hemostat_calibration.guard.decisions import Action
from hemostat_calibration.guard.guard import Guard
from hemostat_calibration.profiles.contextual import contextual_profile

TEST, KIND = "candidate", "rest"


def won(world, profile, prompts):
    """KL that a profile recovers, exactly, mean of each prompt's tokens."""
    result = []
    for seed in prompts:
        truth = world.truth(seed)
        after = log_softmax(apply(profile, truth.compressed))
        result.append(float((np.exp(truth.reference) * (after - truth.compressed)).sum(-1).mean()))
    return result


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
        guard = Guard()
        guard.begin_candidate(TEST, {KIND: (2.0, 1.0)})
        assert guard.decide(TEST, KIND).action is Action.WAIT, "nor without any evidence"
        for n, gain in enumerate(won(world, profile, range(1000, 1400))):
            guard.update(TEST, KIND, n.to_bytes(8, "big"), b"client %d" % (n % 10), gain, gain, 20)
            if guard.decide(TEST, KIND).action is Action.PROMOTE:
                break
        assert guard.decide(TEST, KIND).action is action
