"""The contextual learner on a world whose answer is known: the compressed model's hidden state is an affine (or a bent)
function of the reference's, and noise."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from tests.support.hidden_state_world import A, D, HiddenStateWorld, N, T, V
from tests.support.oracle import apply, shift
from tests.support.records import log_softmax

from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.learning.contextual import export, hidden_states
from hemostat_calibration.learning.contextual.anchors import choose_anchors
from hemostat_calibration.learning.contextual.basis import hidden_sample, make_basis
from hemostat_calibration.learning.contextual.choose import ProfileLimits
from hemostat_calibration.learning.contextual.fold_sums import FLUSH_TOKENS, flushed
from hemostat_calibration.learning.contextual.learner import ContextualLearner
from hemostat_calibration.learning.contextual.rows import FOLDS, TokenSource, fold_of
from hemostat_calibration.profiles.transform import anchors, code


@cache
def world():
    return HiddenStateWorld()


# --- what is won


@pytest.mark.parametrize(("prompts", "least"), [(8, 0.85), (60, 0.9)])
def test_it_wins_back_most_of_what_there_is(prompts, least):
    proposal = world().learner().fit(world().learn(range(prompts)))
    assert proposal.report.variant == "linear"
    assert (proposal.report.tokens, proposal.report.requests) == (prompts * T, prompts)
    assert world().recovered(proposal.profile) > least
    # The predicted gain is of second order; it must be of the right size.
    won = world().divergence() - world().divergence(proposal.profile)
    assert 0.6 * won < proposal.report.gain < 1.8 * won


def test_without_the_engines_features_it_learns_from_the_candidates():
    """Less the fewer they are, and less than with features."""
    few, many = (
        world().recovered(world().learner().propose(world().learn(range(60), features=False, k=k))) for k in (4, 20)
    )
    assert 0.1 < few < many < world().recovered(world().learner().propose(world().learn(range(60))))
    assert many > 0.5


def test_from_a_reference_that_gives_only_a_list():
    learner = world().learner()
    state = world().learn(range(80), hidden=False)
    proposal = learner.fit(state)
    assert proposal.report.variant == "list"
    assert state.tokens_by_source[TokenSource.LIST] == 80 * T
    assert world().recovered(proposal.profile) > 0.95


# --- what is held back


@pytest.mark.parametrize("prompts", [2, 5, 12, 30])
@pytest.mark.parametrize("hidden", [True, False])
def test_noise_alone_is_left_alone_or_hardly_touched(prompts, hidden):
    """A difference that has nothing to do with the context: whatever is proposed must do next to no harm."""
    noisy = HiddenStateWorld(strength=0.0, noise=0.6)
    proposal = noisy.learner().fit(noisy.learn(range(prompts), hidden=hidden))
    if proposal is not None:
        assert noisy.divergence(proposal.profile) < 1.03 * noisy.divergence()


def test_a_weak_penalty_is_never_chosen_on_little_data():
    """Forty tokens of two prompts, fourteen features: without a penalty the map would be noise."""
    noisy = HiddenStateWorld(strength=0.05, noise=0.8)
    for first in range(0, 40, 4):
        proposal = noisy.learner().fit(noisy.learn(range(first, first + 4), tokens=10))
        assert proposal is None or proposal.report.penalty >= 0.1


def test_nothing_is_proposed_too_early():
    learner = world().learner(min_tokens=3 * T, min_requests=12)
    state = learner.init("m", V)
    assert learner.propose(state) is None
    for seed in range(11):
        state = learner.update(state, [world().record(seed)])
        assert learner.propose(state) is None
    profile = learner.propose(learner.update(state, [world().record(11)]))
    assert world().learner(min_tokens=13 * T).propose(state) is None
    assert dict(profile.metadata) == {
        "variant": "linear",
        "rank": profile.metadata["rank"],
        "tokens": "480",
        "requests": "12",
    }
    assert (profile.model, profile.vocab_size) == ("m", V)


def test_the_trust_region_is_kept():
    state = world().learn(range(20))
    free = world().learner(kl_limit=1e30, clamp_nats=20.0).propose(state)
    held = world().learner(kl_limit=0.02, clamp_nats=20.0).propose(state)
    truth = world().truth(5)
    moved = [
        (np.exp(truth.compressed) * (truth.compressed - log_softmax(apply(p, truth.compressed)))).sum(-1)
        for p in (free, held)
    ]
    assert moved[0].mean() > 0.1
    assert moved[1].mean() < 0.04
    assert np.abs(shift(world().learner(clamp_nats=0.1).propose(state), truth.compressed)).max() <= 0.1


@pytest.mark.parametrize("kinds", [{}, {"hidden": False}, {"sums": True}])
def test_the_tail_is_narrow_and_little_is_lost(kinds, monkeypatch):
    """Most ids get a change of less than half the rank; what it wins and how far it may go, stay nearly the same."""
    sums = kinds.pop("sums", False)
    learner = world().learner(kl_limit=0.5, recent_tokens=5 * T if sums else 10**6)
    state = world().learn(range(40), learner, **kinds)
    if sums:
        # What the recent rows lack, the sums still know.
        state = learner.update(state, [world().record(seed, features=False) for seed in range(40, 50)])
        assert not any(r.features is not None for r in state.recent)
    whole = learner.propose(state)
    wide = V // 3
    monkeypatch.setattr(export, "WIDE_IDS", wide)
    monkeypatch.setattr(export, "NARROW_RANK", 4)
    cut = learner.propose(state)
    narrow = ~cut.parameters["up"][:, 4:].any(axis=1)
    assert narrow.sum() == V - wide
    mean = np.mean([np.exp(world().truth(seed).reference).mean(0) for seed in range(40)], axis=0)
    assert mean[narrow].mean() < mean[~narrow].mean()
    assert whole.parameters["up"].any(axis=1).all()
    monkeypatch.setattr(export, "MAX_LOST_PART", 0.0)
    assert learner.propose(state) == whole, "what would lose more than is allowed is served whole"
    none, exact, trimmed = (world().divergence(p) for p in (None, whole, cut))
    assert none - trimmed > 0.9 * (none - exact)
    seen = world().truth(5).compressed[:, world().anchors]
    lengths = [np.einsum("tr,rs,ts->t", y, p.parameters["fisher"], y) for p in (whole, cut) for y in [code(p, seen)]]
    np.testing.assert_allclose(*lengths, rtol=1e-3)


def test_up_is_centred_where_the_reference_is():
    """The mean logit under the reference stays where it is, so that the clamp is not spent on a constant."""
    profile = world().learner().propose(world().learn(range(40)))
    mean = np.mean([np.exp(world().truth(seed).reference).mean(0) for seed in range(40)], axis=0)
    up = profile.parameters["up"].astype(np.float64)
    assert np.abs(mean @ up).max() < 0.1 * np.abs(up).max()


def test_a_drifting_workload_is_followed():
    """Half-way the topics change and with them the map. What forgets is right soon after, what does not is not."""
    drifting = HiddenStateWorld(turns=150)
    after = range(2000, 2020)
    before = drifting.divergence(None, after)
    result = {}
    for name, half_life in (("forgets", 20 * T), ("keeps", None)):
        learner = drifting.learner(half_life_tokens=half_life)
        state = drifting.learn(range(150), learner)
        assert drifting.recovered(learner.propose(state)) > -10  # it can propose before the turn
        state = learner.update(state, [drifting.record(seed) for seed in range(150, 210)])
        profile = learner.propose(state)
        result[name] = before if profile is None else drifting.divergence(profile, after)
    assert result["forgets"] < 0.35 * before
    assert result["keeps"] > 2.0 * result["forgets"]


# --- sums


def test_sums_equal_those_of_all_rows_at_once():
    """Over several times what waits before it is added, discounted by age."""
    learner = world().learner(half_life_tokens=3000.0)
    seeds = range(160)
    state = world().learn(seeds, learner)
    assert all(sum(r.tokens for r in fold.waiting) < FLUSH_TOKENS for fold in state.folds)
    assert any(fold.cross.any() for fold in state.folds)
    for k in range(FOLDS):
        cross, target = np.zeros((A + 1, N)), np.zeros((A + 1, D))
        for at, seed in enumerate(seeds):
            record = world().record(seed)
            if fold_of(record.prompt_key) == k:
                age = (len(seeds) - at - 1) * T
                x = np.column_stack([record.features.values[:, :A], np.ones(T)]) * 0.5 ** (age / 3000.0)
                cross += x.T @ record.features.values
                target += x.T @ record.reference_hidden
        fold = flushed(state.folds[k], state.tokens, learner.forgetting)
        # Rows are kept as float16.
        np.testing.assert_allclose(fold.cross, cross, atol=2e-3 * np.abs(cross).max())
        np.testing.assert_allclose(fold.target, target, atol=2e-3 * np.abs(target).max())


def test_memory_is_bounded():
    learner = world().learner(recent_tokens=5 * T)
    state = learner.init("m", V)
    for seed in range(200):
        state = learner.update(state, [world().record(seed)])
        assert sum(r.tokens for r in state.recent) <= 5 * T
        assert sum(r.tokens for fold in state.folds for r in fold.waiting) < FOLDS * FLUSH_TOKENS
    assert state.tokens == 200 * T
    assert world().recovered(learner.propose(state)) > 0.9


def test_folds_never_mix_prompts():
    """A prompt that comes again, whatever was written after it, is in the same fold; all folds are used."""
    learner = world().learner()
    state = learner.init("m", V)
    for tokens in (5, 30):
        state = learner.update(state, [replace(world().record(seed, tokens), prompt_key=b"again") for seed in range(9)])
    assert {r.fold for r in state.recent} == {fold_of(b"again")}
    assert sum(fold.weight > 0 or bool(fold.waiting) for fold in state.folds) == 1
    assert learner.fit(state) is None  # there is nothing to judge by
    share = np.bincount([fold_of(str(i).encode()) for i in range(4000)], minlength=FOLDS) / 4000
    np.testing.assert_allclose(share, 1 / FOLDS, atol=0.03)


def test_states_are_values():
    learner = world().learner()
    state = world().learn(range(40), learner)
    before = [(fold.cross.copy(), len(fold.waiting)) for fold in state.folds]
    learner.update(state, [world().record(seed) for seed in range(40, 140)])
    learner.fit(state)
    for fold, (cross, waiting) in zip(state.folds, before, strict=True):
        np.testing.assert_array_equal(fold.cross, cross)
        assert len(fold.waiting) == waiting
    with pytest.raises(ValueError, match="read-only"):
        state.folds[0].cross[0, 0] = 1.0


def test_the_same_records_give_the_same_version():
    a, b = (world().learner().propose(world().learn(range(20))) for _ in range(2))
    assert a.version == b.version


# --- what does not fit


def masked(record):
    values = record.features.values.copy()
    values[3:] = np.nan
    return replace(record, features=replace(record.features, values=values))


def test_tokens_are_counted_by_what_they_brought():
    learner = world().learner()
    record = world().record(0)
    other = replace(record, features=replace(record.features, anchors="0" * 32))
    state = learner.update(
        learner.init("m", V),
        [
            record,
            world().record(1, features=False),
            world().record(2, hidden=False),
            world().record(3, features=False, hidden=False),
            other,
            masked(record),
            replace(other, reference_hidden=None),
        ],
    )
    assert state.tokens_by_source == {
        TokenSource.HIDDEN: T + 3,
        TokenSource.HIDDEN_FROM_LIST: 2 * T,
        TokenSource.LIST: T,
        TokenSource.UNUSABLE: 2 * T + T - 3,
    }
    assert state.tokens == 4 * T + 3
    assert learner.update(learner.init("m", V), [masked(record)]).tokens == 3


def test_what_does_not_belong_is_refused():
    learner = world().learner()
    with pytest.raises(InvalidArgumentError, match="vocab_size"):
        learner.init("m", V + 1)
    record = world().record(0)
    with pytest.raises(InvalidArgumentError, match="vocab_size"):
        learner.update(learner.init("m", V), [replace(record, vocab_size=V + 1)])
    with pytest.raises(InvalidArgumentError, match="hidden states of 3"):
        learner.update(learner.init("m", V), [replace(record, reference_hidden=np.zeros((T, 3), np.float32))])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"anchors": np.array([0, V])}, "anchors must be distinct ids"),
        ({"anchors": np.array([1, 1])}, "anchors must be distinct ids"),
        ({"anchors": np.zeros((2, 2), int)}, "anchors"),
        ({"weight": np.zeros(V)}, "weight has shape"),
        ({"half_life_tokens": 0.0}, "half_life_tokens"),
        ({"limits": ProfileLimits(rank=0)}, "rank is 0"),
        ({"features": 0}, "features 0"),
    ],
)
def test_bad_arguments(changes, message):
    options = {"weight": world().weight, "anchors": world().anchors, **changes}
    with pytest.raises(InvalidArgumentError, match=message):
        ContextualLearner(options.pop("weight"), options.pop("anchors"), **options)


def test_the_probe_reads_what_is_learned_from():
    np.testing.assert_array_equal(anchors(world().learner().probe("m")), world().anchors)


# --- anchors


def test_anchors_span_the_hidden_state():
    rng = np.random.default_rng(1)
    weight = rng.normal(size=(400, 12)) * np.geomspace(1, 0.05, 12)
    chosen = choose_anchors(weight, 30)
    assert len(np.unique(chosen)) == 30

    def worst(ids):
        rows = weight[ids] - weight[ids].mean(0)
        return np.linalg.svd(rows, compute_uv=False)[-1]

    for count in (13, 30):
        random = np.median([worst(rng.permutation(400)[:count]) for _ in range(50)])
        assert worst(chosen[:count]) > 1.3 * random
    np.testing.assert_array_equal(choose_anchors(weight, 30), chosen)


def test_anchors_are_chosen_among_those_allowed():
    weight = np.random.default_rng(1).normal(size=(50, 4))
    allowed = np.arange(10, 40)
    assert set(choose_anchors(weight, 20, among=allowed)) <= set(allowed)
    with pytest.raises(InvalidArgumentError, match="count is 31"):
        choose_anchors(weight, 31, among=allowed)


def test_fewer_logits_than_the_state_has_numbers_say_less_and_cost_less():
    result = {}
    for features in (4, 7, A):
        learner = world().learner(features=features)
        state = world().learn(range(60), learner)
        sample = hidden_sample(state.recent, D)
        prior = hidden_states.estimate_prior(sample, 0.03)
        basis = make_basis(learner.weight, learner.anchors, features, sample, prior)
        assert basis.reads.shape == (min(features, D) + 1, features + 1)
        profile = learner.propose(state)
        assert profile.parameters["linear"].shape[1] == features
        result[features] = world().recovered(profile)
    assert 0.0 < result[4] < result[7] < result[A]


@pytest.mark.parametrize("features", [5, A])
def test_a_turn_changes_no_length(features):
    """Inputs are hidden states in the metric's basis, as far as the logits show them: turned where they are fewer."""
    learner = world().learner(features=features)
    state = world().learn(range(20), learner)
    sample = hidden_sample(state.recent, D)
    prior = hidden_states.estimate_prior(sample, 0.03)
    basis = make_basis(learner.weight, learner.anchors, features, sample, prior)
    _, gain = hidden_states.linear_recovery(world().weight[learner.anchors[:features]], prior)
    x = np.random.default_rng(0).normal(size=(30, features))
    x -= x.mean(1, keepdims=True)
    expected = np.square(x @ gain.T @ basis.root).sum(1)
    np.testing.assert_allclose(np.square(x @ basis.reads[:-1, :-1].T).sum(1), expected, rtol=1e-9)
