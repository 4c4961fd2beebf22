"""What the contextual learner stores is what it knew; damaged or foreign bytes are refused."""

import json
from functools import cache

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.hidden_state_world import HiddenStateWorld, V
from tests.support.slow import examples

from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.learning.contextual.fold_sums import flushed
from hemostat_calibration.learning.contextual.storage import dependencies, load, save

ALL_BYTES = 1 << 30


@cache
def world():
    return HiddenStateWorld()


KINDS = ({}, {"features": False, "k": 6}, {"hidden": False})


@cache
def record(seed, kind):
    return world().record(seed, **KINDS[kind])


def learned(kinds, learner):
    return learner.update(learner.init("m", V), [record(seed, kind) for seed, kind in enumerate(kinds)])


def same(a, b, learner):
    assert (a.model, a.vocab_size, a.tokens, a.requests) == (b.model, b.vocab_size, b.tokens, b.requests)
    assert a.tokens_by_source == b.tokens_by_source
    for mine, theirs in zip(a.folds, b.folds, strict=True):
        one, two = flushed(mine, a.tokens, learner.forgetting), flushed(theirs, b.tokens, learner.forgetting)
        assert one.weight == pytest.approx(two.weight, rel=1e-9)
        for x, y in ((one.cross, two.cross), (one.target, two.target)):
            np.testing.assert_allclose(x, y, atol=1e-6 * max(1.0, np.abs(y).max()))


def same_rows(a, b):
    for x, y in zip(a, b, strict=True):
        assert (x.fold, x.clock, x.tokens) == (y.fold, y.clock, y.tokens)
        for name in ("features", "hidden"):
            np.testing.assert_array_equal(getattr(x, name), getattr(y, name))
        assert (x.listed is None) == (y.listed is None)
        if x.listed is not None:
            known = y.listed.ids >= 0
            np.testing.assert_array_equal(x.listed.ids, y.listed.ids)
            np.testing.assert_allclose(x.listed.reference[known], y.listed.reference[known], rtol=1e-6)
            assert (x.listed.compressed is None) == (y.listed.compressed is None)
            np.testing.assert_array_equal(x.listed.likeliest[0], y.listed.likeliest[0])


@settings(max_examples=20, deadline=None)
@given(
    kinds=st.lists(st.lists(st.integers(0, 2), max_size=12), min_size=1, max_size=3),
    half_life=st.sampled_from([None, 100.0]),
)
def test_what_is_read_is_what_was_written(kinds, half_life):
    learner = world().learner(half_life_tokens=half_life)
    states = {f"scope {n}": learned(each, learner) for n, each in enumerate(kinds)}
    data = save(states, learner, "models", ALL_BYTES)
    assert data == save(states, learner, "models", ALL_BYTES)
    result = load(data, learner, "models")
    assert list(result) == list(states)
    for name, state in states.items():
        same(result[name], state, learner)
        same_rows(result[name].recent, state.recent)


@pytest.mark.parametrize("kind", range(3))
def test_a_proposal_after_a_restart_is_the_one_without(kind):
    """Also where learning goes on after it."""
    learner = world().learner(half_life_tokens=5000.0)
    state = learned((kind,) * 60, learner)
    more = [record(seed, kind) for seed in range(100, 130)]
    restored = load(save({"": state}, learner, "m", ALL_BYTES), learner, "m")[""]
    for one, two in ((state, restored), (learner.update(state, more), learner.update(restored, more))):
        without, after = learner.fit(one), learner.fit(two)
        assert (after.report.variant, after.report.tokens) == (without.report.variant, without.report.tokens)
        assert after.report.gain == pytest.approx(without.report.gain, rel=1e-3, abs=1e-5)
        mine, theirs = world().divergence(after.profile), world().divergence(without.profile)
        assert mine == pytest.approx(theirs, rel=1e-3)


def test_a_limit_keeps_the_sums_and_the_newest_rows():
    learner = world().learner()
    state = learned((0,) * 40, learner)
    whole = len(save({"": state}, learner, "m", ALL_BYTES))
    kept = []
    for limit in range(0, whole, whole // 20):
        data = save({"": state}, learner, "m", limit)
        assert len(data) <= limit + 2048
        if data:
            result = load(data, learner, "m")[""]
            same(result, state, learner)
            same_rows(result.recent, state.recent[len(state.recent) - len(result.recent) :])
            kept.append(len(result.recent))
    assert kept[0] < kept[-1] < 40
    assert kept == sorted(kept)
    assert save({"": state}, learner, "m", 100) == b""


def test_of_many_scopes_the_first_is_kept():
    learner = world().learner()
    states = {name: learned((0,) * 10, learner) for name in ("", "a", "b")}
    size = len(save({"": states[""]}, learner, "m", ALL_BYTES))
    result = load(save(states, learner, "m", size + 1000), learner, "m")
    assert "" in result
    assert result[""].tokens == states[""].tokens


def test_another_learner_or_other_models_are_refused():
    learner = world().learner()
    data = save({"": learned((0, 1, 2), learner)}, learner, "models", ALL_BYTES)
    others = [
        (HiddenStateWorld(seed=1).learner(), "models"),
        (world().learner(half_life_tokens=7.0), "models"),
        (world().learner(features=3), "models"),
        (learner, "other models"),
    ]
    for other, about in others:
        assert dependencies(other, about) != dependencies(learner, "models")
        with pytest.raises(InvalidArgumentError, match="of other models"):
            load(data, other, about)


@settings(max_examples=examples(60), deadline=None)
@given(data=st.data())
def test_damaged_bytes_are_refused_and_nothing_else_is_raised(data):
    learner = world().learner()
    good = bytearray(save({"": learned((0, 1, 2), learner)}, learner, "m", ALL_BYTES))
    header = int.from_bytes(good[:8], "little") + 8
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, header + 200) | st.integers(0, len(good) - 1))
        good[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.sampled_from([len(good), len(good) - 1, header, 9, 3, 0]))
    try:
        result = load(bytes(good[:cut]), learner, "m")
    except InvalidArgumentError:
        return
    assert list(result)  # a changed mantissa cannot be noticed


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("0.weights", lambda a: -a - 1.0),
        ("0.weights", lambda a: a + 1e6),
        ("0.weights", lambda a: a[:2]),
        ("0.cross", lambda a: a * np.nan),
        ("0.cross", lambda a: a[:, :2]),
        ("0.target", lambda a: a.astype(np.float64)),
        ("0.features", lambda a: a * np.inf),
        ("0.features", lambda a: a[:-1]),
        ("0.hidden", lambda a: a.astype(np.float32)),
        ("0.rows", lambda a: a[:, :4]),
        ("0.rows", lambda a: a[::-1].copy()),
        ("0.rows", lambda a: np.where(np.arange(5) == 2, 1 << 60, a)),
        ("0.rows", lambda a: np.where(np.arange(5) == 2, -3, a)),
        ("0.rows", lambda a: np.where(np.arange(5) == 3, 0, a)),
        ("0.rows", lambda a: np.where(np.arange(5) == 4, 4000, a)),
        ("0.ids", lambda a: a + V),
        ("0.likeliest", lambda a: -a - 1),
        ("0.reference", lambda a: np.abs(a) + 1.0),
        ("0.likeliest_at", lambda a: a * np.nan),
    ],
)
def test_each_array_is_checked(name, change):
    learner = world().learner()
    # The sums of a fold are empty until rows are added to them: `save` adds them.
    data = save({"": learned((0, 1, 2), learner)}, learner, "m", ALL_BYTES)
    arrays = safetensors.numpy.load(data)
    arrays[name] = np.ascontiguousarray(change(arrays[name]))
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + length])["__metadata__"]
    with pytest.raises(InvalidArgumentError):
        load(safetensors.numpy.save(arrays, metadata), learner, "m")
