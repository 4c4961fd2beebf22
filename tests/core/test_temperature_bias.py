"""The learner on worlds whose answer is known: a temperature, a bias, or neither."""

from dataclasses import replace

import numpy as np
import pytest
from tests.support.records import make_record
from tests.support.world import T, V, World

from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.learning.temperature_bias import TemperatureBiasLearner


@pytest.mark.parametrize("k", [20, V])
def test_it_undoes_a_temperature(k):
    world = World(beta=0.8)
    learner, state = world.learn(60, k)
    profile = learner.propose(state)
    assert float(profile.parameters["inverse_temperature"]) == pytest.approx(1.25, abs=0.08)
    assert world.divergence(profile) < 0.1 * world.divergence()


@pytest.mark.parametrize("k", [20, V])
def test_it_undoes_a_bias(k):
    world = World(bias=0.4)
    learner, state = world.learn(200, k)
    profile = learner.propose(state)
    result = profile.parameters["bias"]
    assert np.corrcoef(result, -world.bias)[0, 1] > 0.95
    assert world.divergence(profile) < 0.2 * world.divergence()


def test_it_undoes_both_among_noise():
    world = World(beta=1.2, bias=0.4, noise=0.3)
    learner, state = world.learn(150)
    before, after = world.divergence(), world.divergence(learner.propose(state))
    floor = World(noise=0.3).divergence()
    assert before - after > 0.7 * (before - floor)


@pytest.mark.parametrize("requests", [1, 4, 40])
def test_it_does_no_harm_where_there_is_nothing_to_learn(requests):
    world = World(noise=0.3)
    learner, state = world.learn(requests)
    assert world.divergence(learner.propose(state)) < 1.02 * world.divergence()


def test_little_data_moves_little():
    world = World(beta=0.8, bias=0.4)
    learner, state = world.learn(1)
    profile = learner.propose(state)
    learner, later = world.learn(60)
    assert np.abs(profile.parameters["bias"]).mean() < 0.3 * np.abs(learner.propose(later).parameters["bias"]).mean()
    assert world.divergence(profile) < world.divergence()


def test_an_id_without_evidence_keeps_its_logit():
    learner = TemperatureBiasLearner(min_requests=1, min_tokens=1)
    truth = World(bias=0.4).truth(0)
    record = make_record(truth, 3)
    profile = learner.propose(learner.update(learner.init("m", V), [record]))
    seen = np.unique(record.compressed.ids[record.compressed.ids >= 0])
    unseen = np.setdiff1d(np.arange(V), seen)
    assert len(unseen)
    assert (profile.parameters["bias"][unseen] == 0.0).all()


def test_a_reference_that_gave_only_a_list():
    """Ids that it did not give teach nothing about themselves."""
    world = World(beta=0.8)
    learner = TemperatureBiasLearner(min_requests=1, min_tokens=1)
    records = [make_record(world.truth(seed), 20, reference_k=20) for seed in range(60)]
    state = learner.init("m", V)
    for record in records:
        state = learner.update(state, [record])
    assert world.divergence(learner.propose(state)) < 0.3 * world.divergence()


def test_a_drifting_workload_is_followed():
    """Half-way the bias turns round. What forgets is right soon after; the other takes back what is there no more."""
    before, after = World(bias=0.6), World(bias=0.6)
    after.bias = -before.bias
    left = {}
    for half_life in (20 * T, None):
        learner = TemperatureBiasLearner(min_requests=1, min_tokens=1, half_life_tokens=half_life)
        _, state = before.learn(300, learner=learner)
        assert before.divergence(learner.propose(state)) < 0.4 * before.divergence(), "what it forgets, it has learned"
        state = learner.update(state, [make_record(after.truth(seed), 20) for seed in range(300, 400)])
        assert (state.tokens, state.requests) == (400 * T, 400)
        left[half_life] = after.divergence(learner.propose(state)) / after.divergence()
    assert left[20 * T] < 0.5
    assert left[None] > 1.0


def test_sums_are_discounted_by_age_whatever_the_batches():
    world = World(bias=0.4)
    learner = TemperatureBiasLearner(half_life_tokens=100.0)
    records = [make_record(world.truth(seed), 20) for seed in range(6)]
    state = learner.update(learner.init("m", V), records[:1])
    assert state.weight == T
    aged = learner.update(state, [replace(records[1], reference_at=np.full_like(records[1].reference_at, np.nan))])
    kept = 0.5 ** (T / 100.0)
    np.testing.assert_allclose(aged.reference_mass, kept * state.reference_mass)
    np.testing.assert_allclose(aged.compressed_mass, kept * state.compressed_mass)
    assert aged.weight == pytest.approx(T + kept * T)
    pooled = learner.update(learner.init("m", V), records)
    in_two = learner.update(learner.update(learner.init("m", V), records[:4]), records[4:])
    np.testing.assert_allclose(in_two.reference_mass, pooled.reference_mass)
    assert pooled.weight < 4 * T < pooled.tokens


def test_nothing_is_proposed_too_early():
    learner = TemperatureBiasLearner(min_requests=3, min_tokens=2 * T)
    world = World(beta=0.8)
    state = learner.init("m", V)
    assert learner.propose(state) is None
    state = learner.update(state, [make_record(world.truth(0), 20), make_record(world.truth(1), 20)])
    assert learner.propose(state) is None
    profile = learner.propose(learner.update(state, [make_record(world.truth(2), 20)]))
    assert dict(profile.metadata) == {"requests": "3", "tokens": str(3 * T)}
    assert (profile.model, profile.vocab_size, profile.clamp_nats) == ("m", V, 1.0)


def test_the_same_records_give_the_same_version():
    a, b = (learner.propose(state) for learner, state in (World(beta=0.8).learn(8), World(beta=0.8).learn(8)))
    assert a.version == b.version


def test_states_are_values():
    learner, state = World().learn(2)
    before = state.reference_mass.copy()
    learner.update(state, [make_record(World().truth(9), 20)])
    np.testing.assert_array_equal(state.reference_mass, before)
    with pytest.raises(ValueError, match="read-only"):
        state.reference_mass[0] = 1.0


def test_what_does_not_belong_is_refused():
    learner = TemperatureBiasLearner()
    with pytest.raises(InvalidArgumentError, match="vocab_size"):
        learner.update(learner.init("m", V + 1), [make_record(World().truth(0), 5)])
