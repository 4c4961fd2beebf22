"""The distribution recovered from logits at anchors: when it is right, and that it is known when it is not."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.exact import exact
from tests.support.records import Truth, log_softmax, make_record, top, truths
from tests.support.slow import examples
from tests.support.state_recovery import compare, variances
from tests.support.temperature_bias import temperature_bias

from hemostat_calibration.divergence.per_token import calibrated, divergence
from hemostat_calibration.errors import InvalidRecordError
from hemostat_calibration.record_checks import validate
from hemostat_calibration.records import MAX_RECOVERY_ERROR, Candidates, RecoveredDivergence, Sampling
from hemostat_calibration.state_recovery import checked_ids, observed_error, recover_states

VOCAB, D, TOKENS, K = 600, 24, 40, 10


class World:
    """Both models share W, [VOCAB, D]; the engine rounds logits and reports them at the first N ids of `order`."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.weight = rng.normal(size=(VOCAB, D)).astype(np.float32)
        self.order = rng.permutation(VOCAB)
        hidden = 0.7 * rng.normal(size=(TOKENS, D))
        self.reference = log_softmax(hidden @ self.weight.T)
        self.logits = (hidden + 0.1 * rng.normal(size=hidden.shape)) @ self.weight.T
        self.compressed = log_softmax(self.logits)
        self.emitted = np.array([rng.choice(VOCAB, p=p / p.sum()) for p in np.exp(self.compressed)])
        self.truth = Truth(self.reference, self.compressed, self.emitted)

    def recovered(self, anchors: int, weight: np.ndarray | None = None, logits: np.ndarray | None = None):
        """What a reference with this W makes of the engine's logits at so many anchors."""
        weight = self.weight if weight is None else weight
        ids = self.order[:anchors]
        z = (self.logits if logits is None else logits)[:, ids]
        features = (z - z.mean(1, keepdims=True)).astype(np.float16).astype(np.float32)
        recovery = recover_states(weight[ids])
        log_c = log_softmax(recovery.states(features).astype(np.float64) @ weight.T)
        listed = top(self.compressed if logits is None else log_softmax(logits), K, self.emitted)
        of_rows = variances(recovery, weight, weight.mean(0))
        return log_c, compare(self.reference, log_c, of_rows, listed.ids, listed.logprobs)

    def record(self, recovered, **options):
        return validate(replace(make_record(self.truth, K, **options), recovered=recovered))


@pytest.fixture(scope="module")
def world():
    return World()


def test_with_more_anchors_than_numbers_the_distribution_is_whole(world):
    log_c, recovered = world.recovered(D + 8)
    error = exact(world.compressed, log_c)["kl_rc"]
    assert error.max() < 1e-3
    assert recovered.usable.all()
    truth = exact(world.reference, world.compressed)
    for name, value in truth.items():
        np.testing.assert_allclose(getattr(recovered, name), value, atol=0.01, err_msg=name)
        assert abs(getattr(recovered, name).mean() - value.mean()) < 0.02 * value.mean(), name
    entropy = -(np.exp(world.compressed) * world.compressed).sum(1)
    np.testing.assert_allclose(recovered.entropy, entropy, atol=0.02)


@pytest.mark.parametrize("anchors", [8, D // 2, D - 1])
def test_with_fewer_anchors_it_is_known_to_be_wrong(world, anchors):
    log_c, recovered = world.recovered(anchors)
    error = exact(world.compressed, log_c)["kl_rc"]
    assert error.mean() > 0.02
    assert error[recovered.usable].max(initial=0.0) < 10 * MAX_RECOVERY_ERROR
    assert recovered.usable.mean() < 0.2


def test_the_predicted_error_is_of_the_error_s_size(world):
    """And no less than it on average, at the noise that it assumes."""
    rng = np.random.default_rng(1)
    for anchors in (D + 8, 2 * D, 200):
        noisy = world.logits + 0.03 * rng.normal(size=world.logits.shape)
        log_c, recovered = world.recovered(anchors, logits=noisy)
        error = exact(world.compressed, log_c)["kl_rc"].mean()
        assert 0.5 * recovered.predicted.mean() < error < 1.5 * recovered.predicted.mean(), anchors


@pytest.mark.parametrize("other", ["weight", "capped", "scaled"])
def test_what_is_no_linear_map_of_the_reference_s_embedding_is_observed(world, other):
    """The prediction cannot know; the listed ids show it."""
    rng = np.random.default_rng(2)
    weight, logits = world.weight, world.logits
    if other == "weight":
        weight = world.weight + 0.3 * rng.normal(size=world.weight.shape).astype(np.float32)
    elif other == "capped":
        logits = 5.0 * np.tanh(world.logits / 5.0)
    else:
        # One row in two is scaled: of all of them it would only scale the hidden states.
        logits = world.logits * np.where(np.arange(VOCAB) % 2, 1.0, 1.2)
    log_c, recovered = world.recovered(D + 8, weight, logits)
    error = exact(log_softmax(logits), log_c)["kl_rc"]
    assert recovered.predicted.max() < MAX_RECOVERY_ERROR < error.mean()
    assert recovered.usable.mean() < 0.1


@settings(max_examples=examples(200))
@given(truths(max_vocabulary=40), st.sampled_from([2, 5, 20]), st.booleans())
def test_figures_and_the_observed_error_by_definition(truth, k, chat):
    """`compressed` plays ĉ; the candidates are of the reference's side, as a model of another distribution c."""
    listed = top(truth.reference, k, truth.emitted, chat=chat)
    vocabulary = truth.reference.shape[1]
    result = compare(truth.reference, truth.compressed, np.ones(vocabulary), listed.ids, listed.logprobs)
    for name, value in exact(truth.reference, truth.compressed).items():
        np.testing.assert_allclose(getattr(result, name), value, rtol=1e-9, atol=1e-9, err_msg=name)
    np.testing.assert_allclose(result.predicted, 0.5)
    whole = exact(truth.reference, truth.compressed)["kl_rc"]
    assert (result.observed <= whole + 1e-6 * (1.0 + whole)).all(), "a lower bound"


@settings(max_examples=examples(100))
@given(truths(rows=1, max_vocabulary=30), st.sampled_from([2, 5, 20]), st.booleans())
def test_whether_it_is_used_does_not_depend_on_what_was_emitted(truth, k, chat):
    vocabulary = truth.compressed.shape[1]
    result = []
    for token in range(vocabulary):
        listed = top(truth.compressed, k, np.array([token]), chat=chat)
        at = np.take_along_axis(truth.reference, np.maximum(listed.ids, 0), -1)
        checked = checked_ids(listed.ids, listed.logprobs)
        result.append((frozenset(listed.ids[checked].tolist()), *observed_error(listed.ids, listed.logprobs, at)))
    assert len(set(result)) == 1


def test_estimates_take_it_where_it_is_usable_and_stay_unbiased(world):
    _, recovered = world.recovered(D + 8)
    unusable = np.arange(TOKENS) % 2 == 0
    mixed = replace(recovered, observed=np.where(unusable, 1.0, recovered.observed))
    figures, plain = divergence(world.record(mixed)), divergence(world.record(None))
    np.testing.assert_array_equal(figures.recovered, ~unusable)
    truth = exact(world.reference, world.compressed)
    for name, estimate in (("js", figures.estimate_js), ("tv", figures.estimate_tv)):
        np.testing.assert_array_equal(np.isnan(estimate), unusable)
        np.testing.assert_allclose(estimate[~unusable], truth[name][~unusable], atol=0.01)
    assert np.isnan(plain.estimate_tv).all()
    for name in ("estimate_rc", "estimate_cr"):
        estimate, sampled = getattr(figures, name), getattr(plain, name)
        np.testing.assert_array_equal(estimate[unusable], sampled[unusable])
        truth = exact(world.reference, world.compressed)["kl" + name.removeprefix("estimate")]
        np.testing.assert_allclose(estimate[~unusable], truth[~unusable], atol=0.01)
        assert np.abs(sampled - truth).mean() > 5 * np.abs(estimate - truth)[~unusable].mean()
    assert not plain.recovered.any()
    for name in ("kl_rc", "kl_cr", "js", "tv"):
        np.testing.assert_array_equal(getattr(figures, name), getattr(plain, name), err_msg="bounds stay bounds")
        np.testing.assert_array_equal(getattr(figures.bounds, name).upper, getattr(plain.bounds, name).upper)


def test_a_greedy_request_has_an_estimate_too(world):
    _, recovered = world.recovered(D + 8)
    record = world.record(recovered, sampling=Sampling(temperature=0.0))
    assert np.isnan(divergence(replace(record, recovered=None)).estimate_rc).all()
    truth = exact(world.reference, world.compressed)["kl_rc"]
    np.testing.assert_allclose(divergence(record).estimate_rc, truth, atol=0.01)


@pytest.mark.parametrize("log_normalizer", [True, False])
def test_after_a_profile_the_gain_is_subtracted_where_it_is_exact(world, log_normalizer):
    _, recovered = world.recovered(D + 8)
    profile = temperature_bias("m", VOCAB, 1.0, np.linspace(-0.5, 0.5, VOCAB), clamp_nats=1.0)
    record = world.record(recovered, profile=profile, log_normalizer=log_normalizer, applied="other")
    after = calibrated(record, profile)
    assert after.recovered.all() == log_normalizer
    if not log_normalizer:
        assert not after.recovered.any()
        assert np.isnan(after.estimate_rc).all()
        return
    shifted = log_softmax(world.compressed + np.linspace(-0.5, 0.5, VOCAB))
    np.testing.assert_allclose(after.estimate_rc, exact(world.reference, shifted)["kl_rc"], atol=0.01)


def test_it_is_nothing_where_everything_is_known_or_conditional(world):
    _, recovered = world.recovered(D + 8)
    everything = validate(replace(make_record(world.truth, VOCAB), recovered=recovered))
    assert not divergence(everything).recovered.any()
    some = np.arange(TOKENS, dtype=np.int32) + 100
    constrained = validate(replace(world.record(recovered), support=some, constraint="grammar"))
    assert not divergence(constrained).recovered.any()


def test_rows_without_features_are_unknown_as_a_whole(world):
    recovery = recover_states(world.weight[world.order[: D + 8]])
    features = np.zeros((2, D + 8), np.float32)
    features[1] = np.nan
    assert np.isnan(recovery.states(features)).any(axis=1).tolist() == [False, True]
    _, recovered = world.recovered(D + 8)
    names = RecoveredDivergence.__slots__
    gone = {name: np.where(np.arange(TOKENS) == 3, np.nan, getattr(recovered, name)) for name in names}
    record = world.record(RecoveredDivergence(**gone))
    assert np.flatnonzero(~divergence(record).recovered).tolist() == [3]
    with pytest.raises(InvalidRecordError, match=r"recovered\.tv is NaN"):
        world.record(replace(recovered, tv=gone["tv"]))
    with pytest.raises(InvalidRecordError, match=r"recovered\.kl_rc has shape"):
        world.record(replace(recovered, kl_rc=recovered.kl_rc[1:]))
    with pytest.raises(InvalidRecordError, match=r"recovered\.kl_cr is infinite"):
        world.record(replace(recovered, kl_cr=np.full(TOKENS, np.inf)))


def test_candidates_that_are_all_of_the_list_are_checked_but_for_the_last_places():
    ids = np.array([[3, 1, 2, 9, -1]])
    listed = Candidates(ids, np.log([[0.4, 0.3, 0.2, 0.05, 1.0]]))
    assert checked_ids(listed.ids, listed.logprobs).tolist() == [[True, True, False, False, False]]
