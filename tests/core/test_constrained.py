"""Figures of records whose ids a grammar restricts: conditional on the allowed ids, exact where these are all known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.oracle import shift
from tests.support.records import Truth, condition, make_record, profiles, truths

from hemostat_calibration.allowed_sets import AllowedSets, words
from hemostat_calibration.divergence.decoding import decoded_divergence
from hemostat_calibration.divergence.gain import gain
from hemostat_calibration.divergence.per_token import calibrated, divergence
from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.records import Sampling


def kl(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    """KL(p‖q) by rows, over the ids that p allows; by the definition."""
    p = np.exp(log_p)
    with np.errstate(invalid="ignore"):
        return np.where(p > 0.0, p * (log_p - log_q), 0.0).sum(-1)


@st.composite
def masked(draw: st.DrawFn) -> tuple[Truth, np.ndarray]:
    """A pair of models and sets that allow from one id to all of them, the emitted one drawn from c given the set."""
    truth = draw(truths())
    rows, vocabulary = truth.compressed.shape
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    mask = rng.random((rows, vocabulary)) < draw(st.sampled_from([0.0, 0.2, 0.6, 1.0]))
    mask[np.arange(rows), rng.integers(0, vocabulary, rows)] = True
    given_set = np.exp(condition(truth.compressed, mask))
    # A softmax in float64 underflows where the models differ by hundreds of nats: such an id is never drawn.
    emitted = np.array([rng.choice(vocabulary, p=row / row.sum()) for row in given_set])
    return replace(truth, emitted=emitted), mask


@given(masked(), st.sampled_from([None, 4]))
def test_with_every_allowed_id_known_the_figures_are_the_conditional_ones(
    world: tuple[Truth, np.ndarray], reference_k: int | None
) -> None:
    truth, mask = world
    k = mask.shape[1]
    record = make_record(truth, k, reference_k=None if reference_k is None else k, mask=mask)
    reference, compressed = condition(truth.reference, mask), condition(truth.compressed, mask)
    result = divergence(record)
    assert result.bound == "exact"
    np.testing.assert_allclose(result.kl_rc, kl(reference, compressed), atol=1e-9)
    np.testing.assert_allclose(result.kl_cr, kl(compressed, reference), atol=1e-9)
    tv = 0.5 * np.abs(np.exp(reference) - np.exp(compressed)).sum(-1)
    np.testing.assert_allclose(result.tv, tv, atol=1e-9)
    np.testing.assert_array_equal(result.bounds.kl_rc.lower, result.bounds.kl_rc.upper)


def test_without_the_mask_on_both_sides_the_figure_is_another() -> None:
    """What a scorer that ignores the grammar would find: c is renormalized on the set, r is not."""
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(200, 40)) * 2.0
    reference = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    noisy = logits + 0.3 * rng.normal(size=logits.shape)
    compressed = noisy - np.log(np.exp(noisy).sum(-1, keepdims=True))
    mask = rng.random(logits.shape) < 0.2
    mask[:, 0] = True
    given_set = np.exp(condition(compressed, mask))
    emitted = np.array([rng.choice(40, p=row) for row in given_set])
    right = make_record(Truth(reference, compressed, emitted), 40, mask=mask)
    truth = kl(condition(reference, mask), condition(compressed, mask))
    np.testing.assert_allclose(divergence(right).kl_rc, truth, atol=1e-9)
    at = np.where(
        right.compressed.ids >= 0, np.take_along_axis(reference, np.maximum(right.compressed.ids, 0), -1), np.nan
    )
    wrong = replace(
        right,
        support=None,
        constraint="",
        reference_at=at,
        reference_emitted=reference[np.arange(200), emitted],
    )
    # It is not even close: most of r's mass lies outside of the set, where c has none.
    assert divergence(wrong).kl_rc.mean() > 3.0 * truth.mean() + 0.5


@given(masked(), st.integers(2, 6), st.sampled_from([None, 3]))
def test_lists_that_do_not_cover_the_set_give_bounds_of_the_conditional_figures(
    world: tuple[Truth, np.ndarray], k: int, reference_k: int | None
) -> None:
    truth, mask = world
    record = make_record(truth, k, reference_k=reference_k, mask=mask)
    reference, compressed = condition(truth.reference, mask), condition(truth.compressed, mask)
    result = divergence(record, min_ratio=0.0).bounds
    tv = 0.5 * np.abs(np.exp(reference) - np.exp(compressed)).sum(-1)
    for interval, value in ((result.kl_rc, kl(reference, compressed)), (result.tv, tv)):
        assert (interval.lower <= value + 1e-5).all()
        assert (value <= interval.upper + 1e-5).all()
    # A row whose whole set is listed is exact, whatever the others are.
    whole = (record.compressed.ids >= 0).sum(1) == mask.sum(1)
    if reference_k is None:
        np.testing.assert_allclose(result.kl_rc.upper[whole], kl(reference, compressed)[whole], atol=1e-5)


@given(masked(), st.data())
def test_a_profile_gains_what_it_gains_on_the_allowed_ids(world: tuple[Truth, np.ndarray], data: st.DataObject) -> None:
    """The engine adds Δz to the masked logits, so the normalizer is over the allowed ids."""
    truth, mask = world
    vocabulary = mask.shape[1]
    profile = data.draw(profiles(vocabulary))
    reference, compressed = condition(truth.reference, mask), condition(truth.compressed, mask)
    after = condition(compressed + shift(profile, compressed), mask)
    record = make_record(truth, vocabulary, mask=mask)
    result = gain(record, profile)
    assert result.exact.all()
    np.testing.assert_allclose(result.lower, kl(reference, compressed) - kl(reference, after), atol=1e-8)
    np.testing.assert_allclose(calibrated(record, profile).kl_rc, np.maximum(kl(reference, after), 0.0), atol=1e-8)


@given(masked(), st.sampled_from([0.5, 1.0]), st.sampled_from([0, 1, 3]))
def test_after_decoding_the_distance_is_of_what_was_drawn_from(
    world: tuple[Truth, np.ndarray], temperature: float, top_k: int
) -> None:
    truth, mask = world
    sampling = Sampling(temperature=temperature, top_k=top_k)
    record = make_record(truth, mask.shape[1], mask=mask, sampling=sampling)
    result = decoded_divergence(record)
    reference, compressed = condition(truth.reference, mask), condition(truth.compressed, mask)
    for t in range(record.tokens):
        drawn = []
        for logprobs in (reference[t], compressed[t]):
            scaled = logprobs / temperature
            if 0 < top_k < mask[t].sum():
                scaled = np.where(scaled >= np.sort(scaled)[-top_k], scaled, -np.inf)
            weights = np.exp(scaled - scaled.max())
            drawn.append(weights / weights.sum())
        tv = 0.5 * np.abs(drawn[0] - drawn[1]).sum()
        if result.available[t]:
            assert result.tv.lower[t] - 1e-5 <= tv <= result.tv.upper[t] + 1e-5


@pytest.mark.parametrize(
    ("table", "rows"),
    [
        (np.ones((1, 2), np.int32), np.zeros(1, np.int32)),
        (np.ones((1, 1), np.uint32), np.zeros(1, np.int32)),
        (np.ones((1, 2), np.uint32), np.zeros(1, np.int64)),
        (np.ones((1, 2), np.uint32), np.ones(1, np.int32)),
        (np.ones((1, 2), np.uint32), np.full(1, -1, np.int32)),
        (np.full((1, 2), 256, np.uint32), np.zeros(1, np.int32)),
        (np.zeros((1, 2), np.uint32), np.zeros(1, np.int32)),
    ],
)
def test_sets_that_are_none_are_refused(table: np.ndarray, rows: np.ndarray) -> None:
    with pytest.raises(InvalidArgumentError):
        AllowedSets(40, table, rows)


@given(st.integers(1, 100), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_sets_are_what_their_bits_are(vocabulary: int, sets: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    masks = rng.random((sets, vocabulary)) < 0.5
    masks[:, 0] = True
    padded = np.zeros((sets, words(vocabulary) * 32), np.uint8)
    padded[:, :vocabulary] = masks
    rows = rng.integers(0, sets, 7).astype(np.int32)
    allowed_sets = AllowedSets(vocabulary, np.packbits(padded, axis=1, bitorder="little").view(np.uint32), rows)
    np.testing.assert_array_equal(allowed_sets.mask(slice(0, 7)), masks[rows])
    np.testing.assert_array_equal(allowed_sets.support, masks[rows].sum(1))
    ids = rng.integers(-1, vocabulary, (7, 9)).astype(np.int32)
    np.testing.assert_array_equal(allowed_sets.contains(ids), (ids >= 0) & masks[rows[:, None], np.maximum(ids, 0)])
