"""After the request's own decoding: against the engine's procedure over the whole vocabulary."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.support.exact import exact
from tests.support.records import Truth, log_softmax, make_record, truths
from tests.support.slow import examples

from hemostat_calibration.divergence.decoding import DECODING_LABELS, decoded_divergence, decoding_label
from hemostat_calibration.records import Sampling

FIGURES = ("js", "tv")


def engine(logprobs, sampling, order):
    """log of what is drawn from, float64 [T, V]: temperature, min_p, top_k, top_p, as vLLM does it. Of ids that
    tie, those that come first in `order`, [V], are taken for the likelier."""
    z = logprobs / sampling.temperature
    z = np.where(np.exp(log_softmax(z)) < sampling.min_p * np.exp(log_softmax(z)).max(-1, keepdims=True), -np.inf, z)
    if 0 < sampling.top_k < z.shape[1]:
        z = np.where(z < np.sort(z, axis=1)[:, [-sampling.top_k]], -np.inf, z)
    if sampling.top_p < 1.0:
        q = np.exp(log_softmax(z))
        for row, values in zip(z, q, strict=True):
            descending = order[np.argsort(-values[order], kind="stable")]
            before = np.cumsum(values[descending]) - values[descending]
            gone = before >= sampling.top_p
            gone[0] = False
            row[descending[gone]] = -np.inf
    return log_softmax(z)


def samplings():
    return st.builds(
        Sampling,
        temperature=st.sampled_from([0.05, 0.4, 0.7, 1.0, 1.5]),
        top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.01]),
        top_k=st.sampled_from([0, 0, 1, 3, 10]),
        min_p=st.sampled_from([0.0, 0.0, 0.01, 0.3]),
    )


@settings(max_examples=examples(600))
@given(
    truths(max_vocabulary=60),
    samplings(),
    st.sampled_from([2, 5, 10, 60]),
    st.sampled_from([None, 3, 20]),
    st.booleans(),
    st.booleans(),
)
# At temperature 0.05 two weights of the compressed model underflow to 0. They do not tie: top_k drops one of them.
@example(
    Truth(np.array([[-2.0, -8.0, -0.2, -18.0]]), np.array([[-70.0, -34.0, -46.0, 0.0]]), np.array([3])),
    Sampling(temperature=0.05, top_k=3),
    5,
    None,
    False,
    True,
)
def test_what_is_said_is_true_of_the_whole_vocabulary(truth, sampling, k, reference_k, chat, ties):
    if ties:
        rounded = (log_softmax(np.round(z, 0)) for z in (truth.reference, truth.compressed))
        truth = Truth(*rounded, truth.emitted)
    record = make_record(truth, k, reference_k=reference_k, chat=chat, sampling=sampling)
    result = decoded_divergence(record)
    vocabulary = truth.compressed.shape[1]
    cuts = sampling.top_p < 1.0 or sampling.top_k > 0 or sampling.min_p > 0.0
    assert result.available.all() or cuts
    distinct = all(len(np.unique(row)) == vocabulary for row in (*truth.reference, *truth.compressed))
    if k >= vocabulary and reference_k is None and distinct and vocabulary <= 8:
        assert result.available.all()
    # Whatever the engine does where ids tie, the figure is the same, or not given.
    for order in (np.arange(vocabulary), np.arange(vocabulary)[::-1]):
        q_r, q_c = (engine(z, sampling, order) for z in (truth.reference, truth.compressed))
        truth_of_drawn = exact(q_r, q_c)
        for name in FIGURES:
            value, interval = truth_of_drawn[name], getattr(result, name)
            given_at = ~np.isnan(interval.lower)
            np.testing.assert_array_equal(given_at, result.available)
            np.testing.assert_array_less(interval.lower[given_at], value[given_at] + 1e-5)
            assert (interval.upper >= value * (1 - 1e-5) - 1e-5)[given_at].all(), name
            if cuts and distinct:
                np.testing.assert_array_equal(interval.lower, interval.upper)
        assert np.isnan(result.tv.lower[~result.available]).all()


def test_half_of_the_smallest_number_is_nothing():
    """What is left of an id's probability may be 5e-324: the mean of it and 0 is 0, which nothing may be divided by."""
    z = np.array([[0.0, -298.0, -310.0]])
    other = np.array([[0.0, -310.0, -298.0]])
    truth = Truth(log_softmax(z), log_softmax(other), np.array([0]))
    for sampling in (Sampling(temperature=0.4), Sampling(temperature=0.4, top_k=3), Sampling(temperature=0.4, top_k=2)):
        q_r, q_c = (engine(log, sampling, np.arange(3)) for log in (truth.reference, truth.compressed))
        assert np.exp(q_r).max(initial=0.0, where=np.exp(q_r) < 0.5) == 5e-324
        result = decoded_divergence(make_record(truth, 3, sampling=sampling))
        assert result.js.lower == pytest.approx(0.0, abs=1e-9)
        assert 0.0 <= result.js.upper[0] < 1e-5
        assert exact(q_r, q_c)["js"] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.3])
def test_the_interval_at_a_temperature_is_narrow_where_the_lists_hold_most(temperature):
    rng = np.random.default_rng(0)
    z = 3.0 * rng.normal(size=(50, 500))
    log_r, log_c = log_softmax(z), log_softmax(z + 0.5 * rng.normal(size=z.shape))
    emitted = log_c.argmax(1)
    narrow = decoded_divergence(
        make_record(Truth(log_r, log_c, emitted), 64, sampling=Sampling(temperature=temperature))
    )
    wide = decoded_divergence(make_record(Truth(log_r, log_c, emitted), 8, sampling=Sampling(temperature=temperature)))
    width = (narrow.tv.upper - narrow.tv.lower).mean()
    assert width < 0.5 * (wide.tv.upper - wide.tv.lower).mean()
    assert width < {0.3: 0.01, 0.7: 0.1, 1.3: 0.5}[temperature]


def test_greedy_is_one_id():
    log_r = np.log([[0.6, 0.3, 0.1], [0.3, 0.6, 0.1]])
    log_c = np.log([[0.5, 0.4, 0.1], [0.5, 0.4, 0.1]])
    result = decoded_divergence(
        make_record(Truth(log_r, log_c, np.array([0, 0])), 2, sampling=Sampling(temperature=0.0))
    )
    np.testing.assert_array_equal(result.tv.upper, [0.0, 1.0])
    np.testing.assert_allclose(result.js.lower, [0.0, np.log(2.0)])
    assert result.available.all()


def test_a_nucleus_by_hand():
    """top_p 0.7 keeps {0, 1} of c (0.5 + 0.3) and {0, 2} of r: they share id 0."""
    log_c, log_r = np.log([[0.5, 0.3, 0.15, 0.05]]), np.log([[0.45, 0.1, 0.35, 0.1]])
    record = make_record(Truth(log_r, log_c, np.array([0])), 3, sampling=Sampling(top_p=0.7))
    result = decoded_divergence(record)
    assert result.tv.lower[0] == pytest.approx(1.0 - min(0.5 / 0.8, 0.45 / 0.8))
    assert result.js.lower[0] == result.js.upper[0]
    # A cut behind the list is not known.
    assert not decoded_divergence(
        make_record(Truth(log_r, log_c, np.array([0])), 3, sampling=Sampling(top_p=0.97))
    ).available[0]


def test_a_treated_request_was_drawn_from_something_else():
    log_c = np.log([[0.5, 0.3, 0.15, 0.05]])
    record = make_record(Truth(log_c, log_c, np.array([0])), 3, applied="v")
    assert not decoded_divergence(record).available.any()
    assert np.isnan(decoded_divergence(record).tv.upper).all()


def test_labels_are_bounded():
    result = {
        decoding_label(Sampling(temperature, top_p, top_k, min_p))
        for temperature in (0.0, 1e-6, 0.3, 0.5, 0.99, 1.0, 1.2, 2.0)
        for top_p in (1.0, 0.9)
        for top_k in (0, 40)
        for min_p in (0.0, 0.05)
    }
    assert result == set(DECODING_LABELS)
    assert decoding_label(Sampling(0.0, top_p=0.5)) == "greedy"
    assert decoding_label(Sampling(0.5)) == "t0.5-1"
    assert decoding_label(Sampling(1.0, min_p=0.1)) == "t1 cut"


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_engine_cuts_as_we_say():
    """The oracle of these tests against vLLM's own function."""
    torch = pytest.importorskip("torch")
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

    rng = np.random.default_rng(1)
    logits = 3.0 * rng.normal(size=(40, 50))
    for top_k, top_p in ((0, 0.9), (0, 0.3), (5, 1.0), (20, 0.8), (3, 0.99)):
        sampling = Sampling(top_k=top_k, top_p=top_p)
        rows = len(logits)
        cut = apply_top_k_top_p_pytorch(
            torch.tensor(logits),
            torch.full((rows,), top_k) if top_k else None,
            torch.full((rows,), top_p, dtype=torch.float64) if top_p < 1.0 else None,
        )
        expected = np.exp(engine(log_softmax(logits), sampling, np.arange(50)))
        np.testing.assert_allclose(torch.softmax(cut, -1).numpy(), expected, atol=1e-9)
