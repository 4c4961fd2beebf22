"""What temperature and bias store is what they knew; damaged or foreign bytes are refused."""

from dataclasses import fields
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.records import make_record
from tests.support.slow import examples
from tests.support.world import V, World

from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.learning.temperature_bias import TemperatureBiasLearner
from hemostat_calibration.learning.temperature_bias_storage import load, save

LEARNER = TemperatureBiasLearner(min_requests=1, min_tokens=1, half_life_tokens=1000.0)


def learned(requests, seed=0):
    return LEARNER.update(LEARNER.init("m", V), [record(seed + n) for n in range(requests)])


@cache
def record(seed):
    return make_record(World(beta=0.8, bias=0.3).truth(seed), 20)


@settings(max_examples=20, deadline=None)
@given(requests=st.lists(st.integers(0, 6), max_size=3))
def test_what_is_read_is_what_was_written(requests):
    states = {f"scope {n}": learned(count, 10 * n) for n, count in enumerate(requests)}
    loaded, notes = load(save(states, LEARNER, "models", "notes"), LEARNER, "models")
    assert (list(loaded), notes) == (list(states), "notes")
    for name, state in states.items():
        for field in fields(state):
            one, two = getattr(loaded[name], field.name), getattr(state, field.name)
            if isinstance(two, np.ndarray):
                np.testing.assert_allclose(one, two, rtol=1e-6)
                assert not one.flags.writeable
            else:
                assert one == two
        mine, theirs = LEARNER.propose(loaded[name]), LEARNER.propose(state)
        assert (mine is None) == (theirs is None)
        if mine is not None:
            for parameter, value in theirs.parameters.items():
                np.testing.assert_allclose(mine.parameters[parameter], value, atol=1e-6)


def test_another_learner_or_other_models_are_refused():
    data = save({"": learned(2)}, LEARNER, "models")
    for learner, about in ((TemperatureBiasLearner(), "models"), (LEARNER, "other models")):
        with pytest.raises(InvalidArgumentError, match="other models or other settings"):
            load(data, learner, about)


@settings(max_examples=examples(200), deadline=None)
@given(data=st.data())
def test_damaged_bytes_are_refused_and_nothing_else_is_raised(data):
    good = bytearray(save({"": learned(2)}, LEARNER, "m"))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.sampled_from([len(good), len(good) - 1, 9, 3, 0]))
    try:
        loaded, _ = load(bytes(good[:cut]), LEARNER, "m")
    except InvalidArgumentError:
        return
    assert all(np.isfinite(state.reference_mass).all() for state in loaded.values())
