"""Every bound against the whole vocabulary, every estimate against its exact value."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.oracle import apply
from tests.support.records import Truth, log_softmax, make_record, profiles, truths
from tests.support.slow import examples
from tests.support.temperature_bias import temperature_bias
from tests.support.work import instructions, peak_bytes

from hemostat_calibration.adapters.factors import LowRank
from hemostat_calibration.divergence.gain import gain
from hemostat_calibration.divergence.per_token import calibrated, divergence
from hemostat_calibration.profiles.adapter import adapter_profile
from hemostat_calibration.profiles.transform import max_shift
from hemostat_calibration.records import Sampling, Shift

ROUNDING = 1e-5


def exact(log_r, log_c):
    r, c = np.exp(log_r), np.exp(log_c)
    log_m = np.log(0.5 * (r + c))
    return {
        "kl_rc": (r * (log_r - log_c)).sum(-1),
        "kl_cr": (c * (log_c - log_r)).sum(-1),
        "js": 0.5 * np.where(r > 0, r * (log_r - log_m), 0).sum(-1)
        + 0.5 * np.where(c > 0, c * (log_c - log_m), 0).sum(-1),
        "tv": 0.5 * np.abs(r - c).sum(-1),
        "entropy_compressed": -(c * log_c).sum(-1),
    }


def after(truth, profile):
    return log_softmax(apply(profile, truth.compressed))


def check_bounds(figures, truth_figures):
    for name, value in truth_figures.items():
        result = getattr(figures, name)
        assert np.isfinite(result).all(), name
        assert (result <= value + ROUNDING * (1.0 + np.abs(value))).all(), (name, result, value)
        assert (result >= 0.0).all(), name
        if figures.bound == "exact":
            np.testing.assert_allclose(result, value, atol=ROUNDING, rtol=ROUNDING, err_msg=name)


@settings(max_examples=examples(400))
@given(truths(), st.integers(2, 30), st.sampled_from([None, 1, 2, 5]))
def test_never_above_the_truth(truth, k, reference_k):
    record = make_record(truth, k, reference_k=reference_k)
    figures = divergence(record)
    check_bounds(figures, exact(truth.reference, truth.compressed))
    whole = k >= truth.compressed.shape[1] and reference_k is None
    if whole:
        assert figures.bound == "exact"
        np.testing.assert_array_equal(figures.estimate_rc, figures.kl_rc)
    np.testing.assert_array_equal(figures.top1_agreement, truth.compressed.argmax(-1) == truth.reference.argmax(-1))
    at = np.arange(len(truth.emitted)), truth.emitted
    np.testing.assert_allclose(figures.delta_log_likelihood, truth.compressed[at] - truth.reference[at])
    np.testing.assert_allclose(figures.delta_p, np.exp(truth.compressed[at]) - np.exp(truth.reference[at]))
    entropy = -(np.exp(truth.reference) * truth.reference).sum(-1)
    assert (figures.entropy_reference <= entropy + ROUNDING).all()
    if reference_k is None:
        np.testing.assert_allclose(figures.entropy_reference, entropy, atol=ROUNDING)
    for covered in (figures.covered_reference, figures.covered_compressed):
        assert ((covered >= 0) & (covered <= 1)).all()


@settings(max_examples=examples(400))
@given(st.data(), truths(), st.integers(2, 30), st.sampled_from([None, 1, 2, 5]), st.booleans())
def test_never_above_the_truth_after_a_profile(data, truth, k, reference_k, log_normalizer):
    profile = data.draw(profiles(truth.compressed.shape[1]))
    record = make_record(truth, k, reference_k=reference_k, profile=profile, log_normalizer=log_normalizer)
    log_c = after(truth, profile)
    figures = calibrated(record, profile)
    check_bounds(figures, exact(truth.reference, log_c))
    if log_normalizer:
        at = np.arange(len(truth.emitted)), truth.emitted
        np.testing.assert_allclose(figures.delta_log_likelihood, log_c[at] - truth.reference[at], atol=1e-6)
        assert not np.isnan(figures.estimate_rc).any()


@settings(max_examples=examples(400))
@given(st.data(), truths(), st.integers(2, 30), st.sampled_from([None, 1, 2, 5]), st.booleans())
def test_the_gain_lies_in_its_interval(data, truth, k, reference_k, log_normalizer):
    profile = data.draw(profiles(truth.compressed.shape[1]))
    record = make_record(truth, k, reference_k=reference_k, profile=profile, log_normalizer=log_normalizer)
    before = exact(truth.reference, truth.compressed)["kl_rc"]
    won = before - exact(truth.reference, after(truth, profile))["kl_rc"]
    result = gain(record, profile)
    rounding = 1e-7 + 1e-9 * np.abs(before)
    assert (result.lower <= won + rounding).all()
    assert (result.upper >= won - rounding).all()
    width = 2.0 * max_shift(profile)
    assert (result.lower >= -width).all()
    assert (result.upper <= width).all()
    np.testing.assert_allclose(result.lower[result.exact], won[result.exact], atol=1e-7 + 1e-9 * np.abs(before).max())
    if log_normalizer and reference_k is None:
        assert result.exact.all()
    if k >= truth.compressed.shape[1] and reference_k is None:
        assert result.exact.all()


@settings(max_examples=examples(200))
@given(st.data(), truths(), st.integers(2, 30), st.sampled_from([None, 1, 2, 5]))
def test_the_likeliest_id_after_a_profile_is_known_or_said_to_be_unknown(data, truth, k, reference_k):
    profile = data.draw(profiles(truth.compressed.shape[1]))
    figures = calibrated(make_record(truth, k, reference_k=reference_k), profile)
    shifted = after(truth, profile)
    best = np.sort(shifted, axis=-1)
    clear = best[:, -1] - best[:, -2] > ROUNDING  # else either of two is the likeliest
    same = shifted.argmax(-1) == truth.reference.argmax(-1)
    checked = figures.top1_known & clear
    np.testing.assert_array_equal(figures.top1_agreement[checked], same[checked])
    if k >= truth.compressed.shape[1]:
        assert figures.top1_known.all()


def no_shift(vocabulary):
    """An adapter, which adds nothing to the logits."""
    layers = {"mlp": LowRank(np.ones((1, 2), np.float32), np.ones((2, 1), np.float32))}
    return adapter_profile(model="m", vocab_size=vocabulary, layers=layers)


@pytest.mark.parametrize("k", [2, 5])
def test_a_profile_that_changes_nothing_leaves_the_agreement(k):
    rng = np.random.default_rng(0)
    log_p = log_softmax(rng.normal(size=(40, 30)))
    record = make_record(Truth(log_p, log_p, log_p.argmax(-1)), k)
    figures = calibrated(record, no_shift(30))
    assert figures.top1_known.all()
    assert figures.top1_agreement.all()


def test_identity_wins_nothing():
    rng = np.random.default_rng(0)
    truth = Truth(log_softmax(rng.normal(size=(3, 9))), log_softmax(rng.normal(size=(3, 9))), np.array([0, 1, 2]))
    profile = no_shift(9)
    record = make_record(truth, 4)
    np.testing.assert_allclose(gain(record, profile).lower, 0.0, atol=1e-12)
    np.testing.assert_allclose(gain(record, profile).upper, 0.0, atol=1e-12)
    np.testing.assert_allclose(calibrated(record, profile).kl_rc, divergence(record).kl_rc, atol=1e-9)


def simulate(rng, rows=60, vocabulary=12):
    z = 1.5 * rng.normal(size=(rows, vocabulary))
    return log_softmax(z), log_softmax(z + 0.8 * rng.normal(size=z.shape))


def test_an_unknown_normalizer_gives_the_least_over_its_interval():
    """The clipped minimisers of both KLs against a search over every normalizer that the record allows."""
    rng = np.random.default_rng(3)
    log_r, log_c = simulate(rng, 200)
    log_r[:100] = log_c[:100]
    profile = temperature_bias("m", 12, 1.3, 0.3 * rng.normal(size=12), 2.0)
    record = make_record(Truth(log_r, log_c, log_c.argmax(-1)), 4, profile=profile, log_normalizer=False)
    figures = calibrated(record, profile)
    won = gain(record, profile)
    expected = record.shifts[profile.version].expected
    low, high = expected - won.upper, expected - won.lower
    least = {name: np.full(200, np.inf) for name in ("kl_rc", "kl_cr", "js", "tv")}
    for step in np.linspace(0.0, 1.0, 801):
        said = low + step * (high - low)
        known = calibrated(replace(record, shifts={profile.version: Shift(expected, said)}), profile)
        for name, value in least.items():
            least[name] = np.minimum(value, getattr(known, name))
    assert ((high - low) > 0.05).mean() > 0.5
    for name in ("kl_rc", "kl_cr"):
        np.testing.assert_allclose(getattr(figures, name), least[name], atol=2e-5)
    for name in ("js", "tv"):
        assert (getattr(figures, name) <= least[name] + 1e-9).all()
        assert (least[name] - getattr(figures, name)).mean() < 0.01 * least[name].mean()


@pytest.mark.parametrize("reference_k", [None, 4])
@pytest.mark.parametrize("treated", [False, True])
@pytest.mark.parametrize("chat", [False, True])
def test_estimates_meet_the_exact_value(reference_k, treated, chat):
    """Over every token that could have been sampled, weighted by how likely it was: the expectation, not a sample."""
    rng = np.random.default_rng(5)
    log_r, log_c = simulate(rng)
    profile = temperature_bias("m", 12, 1.2, 0.4 * rng.normal(size=12), 1.0)
    log_after = after(Truth(log_r, log_c, None), profile)
    log_q = log_after if treated else log_c
    means = dict.fromkeys(("raw_rc", "raw_cr", "rc", "cr"), 0.0)
    for token in range(12):
        emitted = np.full(len(log_c), token)
        record = make_record(
            Truth(log_r, log_c, emitted),
            5,
            reference_k=reference_k,
            chat=chat,
            profile=profile,
            applied=profile.version if treated else None,
        )
        raw, mended = divergence(record, profile), calibrated(record, profile, profile)
        for name, values in zip(
            means, (raw.estimate_rc, raw.estimate_cr, mended.estimate_rc, mended.estimate_cr), strict=True
        ):
            means[name] = means[name] + np.exp(log_q[:, token]) * values
        assert (raw.estimate_rc >= -1e-9).all()
    raw, mended = exact(log_r, log_c), exact(log_r, log_after)
    np.testing.assert_allclose(means["raw_rc"], raw["kl_rc"], atol=1e-6)
    np.testing.assert_allclose(means["raw_cr"], raw["kl_cr"], atol=1e-6)
    np.testing.assert_allclose(means["rc"], mended["kl_rc"], atol=1e-6)
    np.testing.assert_allclose(means["cr"], mended["kl_cr"], atol=1e-6)


@pytest.mark.parametrize(
    "sampling",
    [Sampling(temperature=0.0), Sampling(temperature=0.7), Sampling(top_p=0.9), Sampling(top_k=5), Sampling(min_p=0.1)],
)
def test_estimates_are_withheld_where_the_proposal_is_unknown(sampling):
    rng = np.random.default_rng(5)
    log_r, log_c = simulate(rng)
    figures = divergence(make_record(Truth(log_r, log_c, log_c.argmax(-1)), 5, sampling=sampling))
    assert np.isnan(figures.estimate_rc).all()
    assert np.isnan(figures.estimate_cr).all()
    assert np.isfinite(figures.kl_rc).all()


def test_a_treated_request_needs_its_profile_for_an_estimate():
    rng = np.random.default_rng(5)
    log_r, log_c = simulate(rng)
    profile = temperature_bias("m", 12, 1.2, np.zeros(12), 1.0)
    truth = Truth(log_r, log_c, log_c.argmax(-1))
    record = make_record(truth, 5, profile=profile, applied=profile.version)
    assert np.isnan(divergence(record).estimate_rc).all()
    assert np.isfinite(divergence(record, profile).estimate_rc).all()
    unsaid = make_record(truth, 5, profile=profile, applied=profile.version, log_normalizer=False)
    assert np.isnan(divergence(unsaid, profile).estimate_rc).all()
    other = temperature_bias("m", 12, 1.3, np.zeros(12), 1.0)
    assert np.isnan(divergence(record, other).estimate_rc).all()


@pytest.mark.parametrize("off", [-5e-4, 5e-4])
def test_where_both_are_certain_rounding_makes_no_divergence_negative(off):
    """Found in a run of the demo: a normalizer that bfloat16 had rounded, at a token that both models all but knew."""
    logits = np.zeros((4, 12))
    logits[:, 3] = 20.0
    log_c = log_softmax(logits)
    profile = temperature_bias("m", 12, 1.0, np.linspace(-0.2, 0.2, 12), 1.0)
    truth = Truth(log_c, log_c, np.full(4, 3))
    record = make_record(truth, 5, profile=profile)
    said = record.shifts[profile.version]
    record = replace(record, shifts={profile.version: replace(said, log_normalizer=said.log_normalizer + off)})
    figures = calibrated(record, profile)
    for name in ("kl_rc", "kl_cr", "js", "tv", "entropy_compressed", "estimate_rc", "estimate_cr"):
        assert (getattr(figures, name) >= 0.0).all(), name
    for upper in (figures.bounds.kl_rc.upper, figures.bounds.kl_cr.upper, figures.bounds.js.upper):
        assert not (upper < 0.0).any()


def test_a_normalizer_of_another_distribution_is_refused():
    rng = np.random.default_rng(5)
    log_r, log_c = simulate(rng)
    profile = temperature_bias("m", 12, 1.2, np.zeros(12), 1.0)
    truth = Truth(log_r, log_c, log_c.argmax(-1))
    unsaid = make_record(truth, 5, profile=profile, log_normalizer=False)
    absurd = replace(unsaid, shifts={profile.version: Shift(unsaid.shifts[profile.version].expected, np.full(60, 5.0))})
    np.testing.assert_array_equal(gain(absurd, profile).lower, gain(unsaid, profile).lower)
    assert not gain(absurd, profile).exact.any()


def test_infinite_only_where_it_is_true():
    never = -np.inf
    log_r = np.array([[np.log(0.5), np.log(0.5), never], [0.0, never, never]])
    log_c = np.array([[0.0, never, never], [np.log(0.5), np.log(0.5), never]])
    profile = temperature_bias("m", 3, 1.2, np.zeros(3), 1.0)
    record = make_record(Truth(log_r, log_c, np.array([0, 1])), 3)
    partial = make_record(Truth(log_r, log_c, np.array([0, 1])), 2, reference_k=2)
    figures = divergence(record)
    np.testing.assert_array_equal(figures.kl_rc, [np.inf, np.log(2.0)])
    np.testing.assert_allclose(figures.kl_cr, [np.log(2.0), np.inf])
    np.testing.assert_allclose(figures.tv, 0.5)
    np.testing.assert_array_equal(figures.delta_log_likelihood, [np.log(2.0), np.inf])
    for each in (record, partial):
        for bounded in (divergence(each), calibrated(each, profile)):
            for name in ("js", "tv", "covered_reference", "entropy_compressed"):
                assert np.isfinite(getattr(bounded, name)).all()
        assert np.isfinite(gain(each, profile).lower).all()


def test_more_candidates_never_loosen_the_bound():
    rng = np.random.default_rng(8)
    log_r, log_c = simulate(rng, 40, 30)
    last = np.zeros(40)
    for k in (2, 5, 10, 20, 30):
        result = divergence(make_record(Truth(log_r, log_c, log_c.argmax(-1)), k)).kl_rc
        assert (result >= last - 1e-9).all()
        last = result


def test_one_request_is_cheap():
    """K = 64, T = 256, as the demo asks: no loop over positions, and some copies of the candidates' arrays."""

    def record(tokens):
        rng = np.random.default_rng(9)
        z = 3.0 * rng.normal(size=(tokens, 2000))
        log_c = log_softmax(z + 0.5 * rng.normal(size=z.shape))
        return make_record(Truth(log_softmax(z), log_c, z.argmax(-1)), 64)

    small, large = record(16), record(256)
    assert instructions(lambda: divergence(large)) <= 1.1 * instructions(lambda: divergence(small)) < 10_000
    assert peak_bytes(lambda: divergence(large)) < 40 * large.compressed.logprobs.nbytes
