"""What every streaming estimator must do: equal its batch computation, merge in any order, leave its inputs alone, not
grow; and what the learner must do.

A new estimator is registered in `CASES`, or a test here fails.
"""

import importlib
import inspect
import itertools
import math
import pickle
import pkgutil
from collections.abc import Callable
from dataclasses import FrozenInstanceError, dataclass, fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.hidden_state_world import HiddenStateWorld
from tests.support.slow import examples

import hemostat_calibration
from hemostat_calibration.divergence.trajectory import POSITIONS, Survival
from hemostat_calibration.statistics import confidence
from hemostat_calibration.statistics.confidence import ClippedMean, MeanSequence, Proportion
from hemostat_calibration.statistics.streaming import Histogram, RatioEstimate, student_975
from hemostat_calibration.statistics.two_arms import TwoArms

EDGES = (0.0, 0.1, 0.5, 2.0)


@dataclass(frozen=True)
class Case:
    """One estimator: how to start, add an observation, merge and read it, and what numpy says of all observations."""

    empty: Callable[[], Any]
    observe: Callable[[np.random.Generator], Any]
    update: Callable[[Any, Any], Any]
    merge: Callable[[Any, Any], Any]
    read: Callable[[Any], Any]
    batch: Callable[[list[Any]], Any]


def ratio_batch(observations):
    x, n = np.array(observations).T
    mean = x.sum() / n.sum()
    m = len(x)
    spread = np.sqrt(m * ((x - mean * n) ** 2).sum() / (m - 1)) / n.sum() if m > 1 else np.inf
    half = student_975(m - 1) * spread if m > 1 else np.inf
    return [mean, mean - half, mean + half, m, n.sum()]


def ratio_read(state):
    value = state.get()
    return [value.mean, value.low, value.high, value.requests, value.tokens]


def histogram_batch(observations):
    values = np.concatenate(observations)
    limits = [-np.inf, *EDGES, np.inf]
    counts = [((values > a) & (values <= b)).sum() for a, b in itertools.pairwise(limits[:-1])]
    return [*counts, (values > EDGES[-1]).sum(), values[np.isfinite(values)].sum()]


def clipped_batch(observations):
    """The ends from the inequality that defines them, solved by numpy."""
    values = [np.minimum(v[~np.isnan(v)], 1.0) for v in observations]
    n = np.array([len(v) for v in values if len(v)], float)
    x = np.array([v.sum() for v in values if len(v)])
    clipped = sum((v > 1.0).sum() for v in observations)
    if not len(x):
        return [np.nan, 0.0, 1.0, np.nan]
    residual = x - x.sum() / n.sum() * n
    skew = (residual**3).sum() / ((residual**2).sum() or 1.0) ** 1.5
    ends = []
    for sign in (-1, 1):
        kappa = float(confidence._kappa(len(x), 0.05, max(sign * skew, 0.0)))
        roots = np.roots([n.sum() ** 2 - kappa * n @ n, 2 * kappa * n @ residual, -kappa * residual @ residual])
        open_ended = n.sum() ** 2 <= kappa * n @ n
        ends.append(sign * np.inf if open_ended else (roots.max() if sign > 0 else roots.min()))
    mean = x.sum() / n.sum()
    return [mean, max(mean + ends[0], 0.0), min(mean + ends[1], 1.0), clipped / n.sum()]


def interval_read(state, *more):
    result = state.get()
    return [result.mean, result.low, result.high, *more]


def proportion_batch(observations):
    """The ends by search on finer and finer grids."""
    hits, misses = sum(observations), len(observations) - sum(observations)
    log_beta = math.lgamma(hits + 0.5) + math.lgamma(misses + 0.5) - math.lgamma(hits + misses + 1) - math.log(math.pi)

    def end(low, high, pick):
        for _ in range(4):
            p = np.linspace(low, high, 2001)
            with np.errstate(divide="ignore", invalid="ignore"):
                evidence = log_beta - np.where(hits, hits * np.log(p), 0) - np.where(misses, misses * np.log1p(-p), 0)
            at = pick(np.flatnonzero(evidence < math.log(20)))
            low, high = p[max(at - 1, 0)], p[min(at + 1, 2000)]
        return p[at]

    return [hits / len(observations), end(0.0, 1.0, min), end(0.0, 1.0, max)]


def mean_batch(observations):
    x, n = np.array(observations).T
    mean = x.sum() / n.sum()
    moments = [((x - x.mean()) ** 2).sum(), ((x - x.mean()) * (n - n.mean())).sum(), ((n - n.mean()) ** 2).sum()]
    return [mean, *moments, (x**3).sum(), (x * x * n).sum(), (x * n * n).sum(), (n**3).sum()]


def mean_read(state):
    m = state.moments
    return [state.get().mean, m.xx, m.xn, m.nn, *state.cubes]


def survival_batch(observations):
    """The product limit and its variance from their definitions, request by request."""
    reached = [t for t in POSITIONS if t <= max(map(len, observations))]
    w = np.array([[x[:t].prod() if len(x) >= t else np.nan for t in reached] for x in observations])
    before = np.column_stack([np.ones(len(w)), w[:, :-1]])
    before = np.where(np.isnan(w), np.nan, before)
    after_sum, before_sum = np.nansum(w, 0), np.nansum(before, 0)
    survival = np.cumprod(after_sum / before_sum)
    parts = np.cumsum(np.nan_to_num(w / after_sum - before / before_sum), axis=1)
    at_risk, m = (~np.isnan(w)).sum(0), len(observations)
    deviation = np.sqrt((parts**2).sum(0) * at_risk / np.maximum(at_risk - 1, 1))
    low = [
        s ** math.exp(min(student_975(n - 1) * d / -math.log(s), 50.0)) if n > 1 else 0.0
        for s, d, n in zip(survival.tolist(), deviation.tolist(), at_risk.tolist(), strict=True)
    ]
    dense = np.interp(np.arange(1, reached[-1] + 1), [0, *reached], [1.0, *survival])
    return [*survival, *low, *at_risk, dense.sum(), m]


def survival_read(state):
    curve = state.get()
    return [*curve.survival, *curve.low, *curve.at_risk, curve.prefix, curve.requests]


def two_arms_batch(observations):
    """`tests/core/test_two_arms.py` compares e-values and intervals with their definition."""
    treated, bad = np.array(observations).T
    counts = [(treated & bad).sum(), treated.sum(), (~treated & bad).sum(), (~treated).sum()]
    return [*counts, counts[0] / max(counts[1], 1) - counts[2] / max(counts[3], 1)]


def two_arms_read(state):
    counts = [state.treated_bad, state.treated, state.control_bad, state.control]
    known = state.treated and state.control
    return [*counts, state.get().mean if known else counts[0] / max(counts[1], 1) - counts[2] / max(counts[3], 1)]


CASES = {
    "mean sequence": Case(
        MeanSequence,
        lambda rng: (float(rng.normal(3.0, 2.0)), float(rng.integers(1, 50))),
        lambda state, x: state.update(*x),
        lambda a, b: a.merge(b),
        mean_read,
        mean_batch,
    ),
    "survival": Case(
        Survival,
        lambda rng: rng.uniform(0.8, 0.99, size=rng.integers(1, 40)),
        lambda state, x: state.update(x),
        lambda a, b: a.merge(b),
        survival_read,
        survival_batch,
    ),
    "clipped mean": Case(
        lambda: ClippedMean(0.0, 1.0),
        lambda rng: np.where(rng.random(5) < 0.1, np.nan, rng.exponential(0.3, size=5)),
        lambda state, x: state.update(x),
        lambda a, b: a.merge(b),
        lambda state: interval_read(state, state.clipped / state.tokens if state.tokens else math.nan),
        clipped_batch,
    ),
    "proportion": Case(
        Proportion,
        lambda rng: bool(rng.random() < 0.3),
        lambda state, x: state.update(x),
        lambda a, b: a.merge(b),
        interval_read,
        proportion_batch,
    ),
    "two arms": Case(
        TwoArms,
        lambda rng: (bool(rng.random() < 0.6), bool(rng.random() < 0.3)),
        lambda state, x: state.update(treated=x[0], bad=x[1]),
        lambda a, b: a.merge(b),
        two_arms_read,
        two_arms_batch,
    ),
    "ratio": Case(
        RatioEstimate,
        lambda rng: (float(rng.normal(1e3, 2.0)), float(rng.integers(1, 50))),
        lambda state, x: state.update(*x),
        lambda a, b: a.merge(b),
        ratio_read,
        ratio_batch,
    ),
    "histogram": Case(
        lambda: Histogram(EDGES),
        lambda rng: np.where(rng.random(5) < 0.2, rng.choice([*EDGES, np.inf, np.nan]), rng.exponential(size=5)),
        lambda state, x: state.update(x),
        lambda a, b: a.merge(b),
        lambda state: [*state.get(), state.total],
        histogram_batch,
    ),
}


@pytest.mark.parametrize("name", CASES)
@given(seed=st.integers(0, 2**32 - 1), size=st.integers(1, 25))
@settings(max_examples=examples(50))
def test_a_stream_equals_its_batch(name, seed, size):
    case = CASES[name]
    rng = np.random.default_rng(seed)
    observations = [case.observe(rng) for _ in range(size)]
    state = case.empty()
    for x in observations:
        state = case.update(state, x)
    np.testing.assert_allclose(case.read(state), case.batch(observations), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
@given(seed=st.integers(0, 2**32 - 1), size=st.integers(1, 25), parts=st.integers(1, 5))
@settings(max_examples=examples(50))
def test_parts_merge_in_any_order(name, seed, size, parts):
    case = CASES[name]
    rng = np.random.default_rng(seed)
    observations = [case.observe(rng) for _ in range(size)]
    whole = case.empty()
    streams = [case.empty() for _ in range(parts)]
    for x in observations:
        whole = case.update(whole, x)
        at = rng.integers(parts)
        streams[at] = case.update(streams[at], x)
    merged = case.empty()
    for at in rng.permutation(parts):
        merged = case.merge(merged, streams[at])
    np.testing.assert_allclose(case.read(merged), case.read(whole), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_an_update_leaves_what_others_hold(name):
    case = CASES[name]
    rng = np.random.default_rng(0)
    state = case.update(case.empty(), case.observe(rng))
    before = case.read(state)
    case.update(state, case.observe(rng))
    case.merge(state, state)
    np.testing.assert_array_equal(case.read(state), before)


UPDATES = {"ratio": 10**5, "proportion": 10**5, "two arms": 10**5}
"""Where that takes a second (a million were run for all, once); else a fifth of it."""


@pytest.mark.parametrize("name", CASES)
def test_updates_take_no_more_memory(name):
    """A state is a value: what it holds is what it is when written out. Integers may take a few bytes more."""
    case = CASES[name]
    rng = np.random.default_rng(0)
    observations = [case.observe(rng) for _ in range(100)]
    state = case.empty()
    for x in observations:
        state = case.update(state, x)
    early = len(pickle.dumps(state))
    for x in itertools.islice(itertools.cycle(observations), UPDATES.get(name, 2 * 10**4)):
        state = case.update(state, x)
    assert len(pickle.dumps(state)) <= early + 64
    # Many times the same observations: the same mean, however long the stream.
    assert np.all(np.isfinite(np.asarray(case.read(state), dtype=np.float64)))


def test_every_estimator_is_registered():
    """Every class that has `update`, `merge` and `get`, in whatever subpackage, is one of `CASES`."""
    result = {
        member
        for module in pkgutil.walk_packages(hemostat_calibration.__path__, "hemostat_calibration.")
        for _, member in inspect.getmembers(importlib.import_module(module.name), inspect.isclass)
        if all(callable(getattr(member, name, None)) for name in ("update", "merge", "get"))
    }
    assert result == {type(case.empty()) for case in CASES.values()}


@pytest.mark.parametrize("name", CASES)
def test_an_estimator_is_a_frozen_value(name):
    state = CASES[name].empty()
    with pytest.raises(FrozenInstanceError):
        setattr(state, fields(state)[0].name, None)


def test_the_learner_keeps_its_contract():
    """`init`, `update` and `propose` are pure: the same arguments give the same profile, and no argument is
    changed; before the first record nothing is proposed."""
    world = HiddenStateWorld()
    learner = world.learner()
    records = [world.record(n) for n in range(12)]
    vocabulary = records[0].vocab_size
    empty = learner.init("m", vocabulary)
    assert learner.propose(empty) is None
    state = learner.update(empty, records)
    assert learner.update(state, []).tokens == state.tokens == 12 * records[0].tokens
    first = learner.propose(state)
    more = learner.update(state, records[:4])
    assert (more.tokens, more.requests) == (state.tokens + 4 * records[0].tokens, 16)
    assert learner.propose(empty) is None
    assert (first.model, first.vocab_size) == ("m", vocabulary)
    assert learner.propose(state) == first == learner.propose(learner.update(empty, records))
