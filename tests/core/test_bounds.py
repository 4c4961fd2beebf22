"""Every interval against the whole vocabulary: random and adversarial pairs, every way in which lists are cut."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tests.support.admissible import far, nearest, tail
from tests.support.exact import exact, largest_ratio
from tests.support.oracle import apply
from tests.support.records import Truth, log_softmax, make_record, profiles
from tests.support.slow import examples
from tests.support.work import instructions, peak_bytes

from hemostat_calibration.divergence.bounds import MIN_RATIO, bounds, cap
from hemostat_calibration.divergence.per_token import calibrated, divergence

ROUNDING = 1e-5
ENOUGH = 1e-3
"""Mass that rounding does not matter for."""
FIGURES = ("kl_rc", "kl_cr", "js", "tv")


def spread(rng, kind, rows, vocabulary):
    """Logits [rows, vocabulary] of one kind."""
    z = rng.normal(size=(rows, vocabulary))
    if kind == "flat":
        return 0.01 * z
    if kind == "peaked":
        z[:, 0] += 20.0
        return z
    if kind == "zipf":
        return -rng.choice([0.8, 1.2, 3.0]) * np.log(
            rng.permuted(np.tile(np.arange(1, vocabulary + 1), (rows, 1)), axis=1)
        )
    if kind == "ties":
        return np.round(z)
    if kind == "uniform":
        return np.zeros_like(z)
    return 4.0 * z


@st.composite
def pairs(draw, *, zeros=False):
    """Peaked, flat, heavy-tailed, tied, near-disjoint, the same twice; with zeros where asked. The emitted id is drawn
    from the compressed side, now and then the least likely one."""
    vocabulary = draw(st.one_of(st.integers(2, 8), st.integers(9, 300)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kinds = st.sampled_from(["normal", "flat", "peaked", "zipf", "ties", "uniform"])
    z_r, z_c = spread(rng, draw(kinds), 4, vocabulary), spread(rng, draw(kinds), 4, vocabulary)
    relation = draw(st.sampled_from(["unrelated", "near", "same", "reversed", "disjoint"]))
    if relation == "near":
        z_c = z_r + draw(st.sampled_from([1e-6, 0.1, 1.0])) * rng.normal(size=z_r.shape)
    elif relation == "same":
        z_c = z_r.copy()
    elif relation == "reversed":
        order = np.argsort(z_r, axis=1)
        np.put_along_axis(z_c, order, np.sort(z_r, axis=1)[:, ::-1], axis=1)
    elif relation == "disjoint":
        half = rng.random(z_r.shape) < 0.5
        z_r, z_c = z_r + 30.0 * half, z_c + 30.0 * ~half
    if zeros:
        for z in (z_r, z_c):
            gone = rng.random(z.shape) < 0.5
            gone[:, rng.integers(vocabulary)] = False
            z[gone] = -np.inf
    log_r, log_c = log_softmax(z_r), log_softmax(z_c)
    emitted = np.array([rng.choice(vocabulary, p=np.exp(row) / np.exp(row).sum()) for row in log_c])
    if draw(st.booleans()):
        emitted = np.where(np.isfinite(log_c), log_c, np.inf).argmin(1)
    return Truth(log_r, log_c, emitted)


def views():
    """Record options: how many candidates, how the engine adds the emitted one, what the reference gave."""
    return st.fixed_dictionaries(
        {
            "k": st.sampled_from([2, 3, 5, 10, 50, 400]),
            "reference_k": st.sampled_from([None, None, 1, 2, 5, 20, 400]),
            "chat": st.booleans(),
        }
    )


@settings(max_examples=examples(600))
@given(pairs(), views())
def test_the_truth_is_always_inside(truth, view):
    floor = largest_ratio(truth)
    record = make_record(truth, **view)
    result = bounds(record, floor)
    np.testing.assert_array_equal(divergence(record, min_ratio=floor).bounds.kl_rc.upper, result.kl_rc.upper)
    for name, value in exact(truth.reference, truth.compressed).items():
        interval = getattr(result, name)
        slack = ROUNDING * (1.0 + np.abs(value))
        assert (interval.lower <= value + slack).all(), (name, interval.lower, value)
        assert (interval.upper >= value - slack).all(), (name, interval.upper, value)
        assert (interval.lower <= interval.upper).all()
        assert (interval.lower >= 0.0).all()
        assert np.isfinite(interval.upper).all()
    if view["k"] >= truth.compressed.shape[1] and view["reference_k"] is None:
        for name in FIGURES:
            np.testing.assert_array_equal(getattr(result, name).lower, getattr(result, name).upper)


@settings(max_examples=examples(400))
@given(pairs(zeros=True), views())
def test_zeros_need_no_floor(truth, view):
    """JS and TV hold without an assumption, KL's upper ends without a floor are infinite where anything is open."""
    result = bounds(make_record(truth, **view), 0.0)
    for name, value in exact(truth.reference, truth.compressed).items():
        interval = getattr(result, name)
        with np.errstate(invalid="ignore"):
            assert (interval.lower <= value * (1 + ROUNDING) + ROUNDING).all(), name
            assert (interval.upper >= value * (1 - ROUNDING) - ROUNDING).all(), name
        assert not np.isnan(interval.upper).any()


@settings(max_examples=examples(150))
@given(pairs(), views())
def test_the_estimates_mean_is_the_truth(truth, view):
    """The exact expectation over every token that could have been emitted, ties at the lists' ends included."""
    vocabulary = truth.compressed.shape[1]
    assume(vocabulary <= 40)
    means = {"kl_rc": 0.0, "kl_cr": 0.0}
    least, told = np.full(len(truth.emitted), np.inf), set()
    for token in range(vocabulary):
        record = make_record(replace(truth, emitted=np.full(len(truth.emitted), token)), **view)
        result = divergence(record, min_ratio=largest_ratio(truth))
        for name, estimate in (("kl_rc", result.estimate_rc), ("kl_cr", result.estimate_cr)):
            means[name] = means[name] + np.exp(truth.compressed[:, token]) * estimate
        told.add(result.bound)
        if result.bound == "lower":
            least = np.minimum(least, 1.0 - np.maximum(result.covered_reference, result.covered_compressed))
    # In a tiny vocabulary the emitted token may be what makes all of it known: no estimate is made then.
    assume(len(told) == 1)
    # Where next to nothing is outside, the mass in a denominator is rounding, and floored.
    meant = (least > 1e-4) | np.isinf(least)
    value = exact(truth.reference, truth.compressed)
    for name, mean in means.items():
        np.testing.assert_allclose(mean[meant], value[name][meant], rtol=1e-4, atol=1e-5, err_msg=name)


@settings(max_examples=examples(200))
@given(pairs(), views())
def test_sharper_than_one_bucket(truth, view):
    """The capped lower bound is never below the coarse one."""
    record = make_record(truth, **view)
    bounded, coarse = bounds(record), divergence(record)
    for name in FIGURES:
        assert (getattr(bounded, name).lower >= getattr(coarse, name) - 1e-12).all(), name


def test_the_sharper_bound_is_the_least_that_the_caps_allow():
    """Against a direct search: c on the unlisted ids, everything that the lists allow, on random directions."""
    rng = np.random.default_rng(4)
    gained = 0
    for _ in range(200):
        log_r, log_c = log_softmax(2.0 * rng.normal(size=(1, 6))), log_softmax(2.0 * rng.normal(size=(1, 6)))
        record = make_record(Truth(log_r, log_c, log_c.argmax(1)), 2)
        result = bounds(record)
        listed = record.compressed.ids[0, :2]
        free = np.setdiff1d(np.arange(6), listed)
        mass, most = 1.0 - np.exp(log_c[0, listed]).sum(), np.exp(cap(record.compressed, record.output_ids))[0]
        shares = rng.dirichlet(rng.choice([0.2, 1.0, 5.0], size=4), size=4000) * mass
        shares = np.concatenate([shares, np.exp(log_r[:, free]) / np.exp(log_r[:, free]).sum() * mass])
        allowed = shares[(shares <= most).all(1)]
        if not len(allowed):
            continue
        other = np.tile(log_c, (len(allowed), 1))
        with np.errstate(divide="ignore"):
            other[:, free] = np.log(allowed)
        for name, values in exact(np.tile(log_r, (len(allowed), 1)), other).items():
            least = values.min()
            assert getattr(result, name).lower[0] <= least + 1e-6
            gained += least - getattr(result, name).lower[0] < 0.02
    assert gained > 500


@settings(max_examples=examples(300))
@given(pairs(), st.sampled_from([2, 5, 10, 50]), st.booleans(), st.sampled_from([1e-12, 1e-6, 1e-3]))
def test_with_the_whole_reference_the_ends_are_the_best_possible(truth, k, chat, floor):
    """What all of r could add to them: nothing below unless an id behind its list is at the cap, and above no more than
    the mass that r gives to the ids which c prefers. Where both have mass left, so that it is no matter of rounding."""
    record = make_record(truth, k, chat=chat)
    bounded, free = bounds(record, floor), bounds(record, 0.0)
    for row in range(record.tokens):
        log_r = truth.reference[row]
        known = tail(record, log_r, row)
        if known.mass < ENOUGH or known.r[known.open].sum() < ENOUGH:
            continue
        log_c, capped = nearest(known)
        c = np.exp(log_c)
        assert c.sum() == pytest.approx(1.0, abs=1e-9)
        assert c[known.open].max() <= known.cap * (1.0 + 1e-9)
        rest = np.setdiff1d(np.flatnonzero(known.open), capped)
        whole = np.isin(capped, record.reference.ids[row]).all() and (known.r[rest].sum() > ENOUGH or not len(rest))
        for name, best in exact(log_r[None], log_c[None]).items():
            end = getattr(bounded, name).lower[row]
            assert end <= best[0] + ROUNDING * (1.0 + best[0]), name
            assert not whole or end >= best[0] - 10 * ROUNDING * (1.0 + best[0]), name

        log_c, at = far(known, floor)
        # Where r is so likely that the floor's c would be above the cap, the lists contradict the floor.
        contradicted = (floor * known.r[known.open] > known.cap).any()
        if not contradicted and abs(np.exp(log_c).sum() - 1.0) < 1e-9:
            worst, most = exact(log_r[None], log_c[None])["kl_rc"][0], -np.log(floor)
            slack = ROUNDING * (1.0 + most)
            assert worst - slack <= bounded.kl_rc.upper[row] <= worst + 2.0 * most * at + slack
        log_c, at = far(known, 0.0)
        if abs(np.exp(log_c).sum() - 1.0) < 1e-9:
            worst = exact(log_r[None], log_c[None])
            less = {"tv": at, "js": 0.5 * at * (1.0 + np.log1p(known.mass / at))}
            for name, most in less.items():
                end, value = getattr(free, name).upper[row], worst[name][0]
                assert value - ROUNDING <= end <= value + most + ROUNDING, name


@pytest.mark.parametrize("reference_k", [None, 6])
def test_the_upper_ends_are_attained(reference_k):
    """The worst pair within the constraints reaches them: c puts what it did not list where r has next to nothing."""
    vocabulary, k, floor = 400, 3, 1e-4
    r = np.full(vocabulary, 1e-12)
    r[:3], r[3:6], r[6:106] = [0.3, 0.2, 0.1], [0.09, 0.06, 0.05], 0.002
    c = np.full(vocabulary, 1e-12)
    c[:3], c[3:106] = [0.25, 0.2, 0.15], floor * r[3:106]
    c[200:300] = (1.0 - c[:106].sum()) / 100
    r, c = r / r.sum(), c / c.sum()
    truth = Truth(np.log(r)[None], np.log(c)[None], np.array([0]))
    record = make_record(truth, k, reference_k=reference_k)
    bounded, value = bounds(record, floor), exact(truth.reference, truth.compressed)
    for name in ("kl_rc", "js", "tv"):
        assert value[name] <= getattr(bounded, name).upper <= value[name] * 1.01, name


@settings(max_examples=examples(300))
@given(st.data(), pairs(), views(), st.booleans())
def test_the_truth_is_inside_after_a_profile(data, truth, view, log_normalizer):
    """Where the normalizer is known; elsewhere there is nothing, rather than something wrong."""
    profile = data.draw(profiles(truth.compressed.shape[1]))
    record = make_record(truth, **view, profile=profile, log_normalizer=log_normalizer)
    after = Truth(truth.reference, log_softmax(apply(profile, truth.compressed)), truth.emitted)
    result = calibrated(record, profile, min_ratio=largest_ratio(after)).bounds
    for name, value in exact(after.reference, after.compressed).items():
        interval = getattr(result, name)
        available = ~np.isnan(interval.upper)
        np.testing.assert_array_equal(available, ~np.isnan(interval.lower))
        assert available.all() or not log_normalizer
        slack = ROUNDING * (1.0 + np.abs(value))
        assert (interval.lower <= value + slack)[available].all(), name
        assert (interval.upper >= value - slack)[available].all(), name


def test_the_floor_is_named():
    truth = Truth(np.log([[0.4, 0.3, 0.2, 0.1]]), np.log([[0.9, 0.05, 0.03, 0.02]]), np.array([0]))
    assert bounds(make_record(truth, 2)).min_ratio == MIN_RATIO
    assert np.isinf(bounds(make_record(truth, 2), 0.0).kl_rc.upper).all()


def test_the_emitted_token_in_the_last_place_caps_nothing():
    """An unlikely emitted token stands last: ids that nobody named may be likelier than it."""
    truth = Truth(np.log([[0.5, 0.3, 0.15, 0.05]]), np.log([[0.5, 0.3, 0.15, 0.05]]), np.array([3]))
    for chat in (False, True):
        record = make_record(truth, 2, chat=chat)
        np.testing.assert_allclose(
            np.exp(cap(record.compressed, record.output_ids)), 0.5 if chat else 0.3, err_msg=str(chat)
        )


def simulate(tokens, k, seed=9):
    rng = np.random.default_rng(seed)
    z = 3.0 * rng.normal(size=(tokens, 2000))
    log_c = log_softmax(z + 0.8 * rng.normal(size=z.shape))
    emitted = np.array([rng.choice(2000, p=row / row.sum()) for row in np.exp(log_c)])
    return make_record(Truth(log_softmax(z), log_c, emitted), k)


def test_bounds_cost_little():
    """No loop over positions, and some copies of the candidates' arrays; `make bench-bounds` has the time."""
    small, large = simulate(32, 20), simulate(512, 20)
    assert instructions(lambda: bounds(large)) <= 1.1 * instructions(lambda: bounds(small)) < 10_000
    assert peak_bytes(lambda: bounds(large)) < 40 * large.compressed.logprobs.nbytes
