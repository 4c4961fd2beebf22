"""The contextual family: what its profiles hold, what they do to logits, and what is known of it from a record."""

import json
import struct
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.oracle import apply, shift
from tests.support.records import Truth, log_softmax, make_record, truths
from tests.support.slow import examples
from tests.support.temperature_bias import temperature_bias

from hemostat_calibration.divergence.gain import gain
from hemostat_calibration.divergence.per_token import calibrated, divergence
from hemostat_calibration.errors import InvalidArgumentError, InvalidProfileError
from hemostat_calibration.profiles.contextual import contextual_profile, probe_profile
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_calibration.profiles.transform import anchors, anchors_digest, code, max_shift, shift_at
from hemostat_calibration.record_checks import validate
from hemostat_calibration.records import Features

V, N, A, R = 11, 6, 4, 3


def parts(seed=0, vocabulary=V, anchored=N, scale=0.3):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(R, R))
    features = min(A, anchored)
    return {
        "model": "w4a16",
        "anchors": rng.permutation(vocabulary)[:anchored],
        "linear": scale * rng.normal(size=(R, features)),
        "offset": 0.1 * rng.normal(size=R),
        "fisher": root @ root.T,
        "up": 0.5 * rng.normal(size=(vocabulary, R)),
        "clamp_nats": 2.0,
        "kl_limit": 0.5,
    }


def make(seed=0, **changes):
    return contextual_profile(**{**parts(seed), **changes})


def rewrite(data: bytes, change) -> bytes:
    (length,) = struct.unpack_from("<Q", data)
    entries = json.loads(data[8 : 8 + length])
    change(entries)
    header = json.dumps(entries, sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def test_by_hand():
    """Anchors 2 and 0: x = ±(z2 − z0)/2, of which the map reads the first."""
    profile = contextual_profile(
        model="m",
        anchors=np.array([2, 0]),
        linear=np.array([[2.0]]),
        offset=np.array([0.5]),
        up=np.array([[1.0], [0.0], [-0.25]]),
        clamp_nats=2.0,
    )
    z = np.array([1.0, 7.0, 3.0])
    y = 0.5 + 2.0 * 1.0
    np.testing.assert_allclose(code(profile, z[[2, 0]]), [y], rtol=1e-12)
    np.testing.assert_allclose(shift(profile, z), [2.0, 0.0, -0.25 * y], rtol=1e-12)
    assert max_shift(profile) == 2.0
    limited = contextual_profile(
        model="m",
        anchors=np.array([2, 0]),
        linear=np.array([[2.0]]),
        offset=np.array([0.0]),
        fisher=np.array([[9.0]]),
        kl_limit=0.5,
        up=np.array([[1.0], [0.0], [0.0]]),
        clamp_nats=3.0,
    )
    # y = 2, yᵀ fisher y = 36 > 2 kl_limit: shrunk by √(1/36).
    np.testing.assert_allclose(code(limited, z[[2, 0]]), [2.0 / 6.0], rtol=1e-12)


@given(st.integers(0, 1000), st.floats(-100, 100), st.floats(0.01, 20.0), st.floats(0.01, 5.0))
def test_bounded_and_blind_to_a_constant(seed, constant, clamp, kl_limit):
    given_parts = {**parts(seed), "clamp_nats": clamp, "kl_limit": kl_limit}
    profile = contextual_profile(**given_parts)
    z = 4.0 * np.random.default_rng(seed).normal(size=(5, V))
    delta = shift(profile, z)
    assert (np.abs(delta) <= clamp).all()
    np.testing.assert_allclose(shift(profile, z + constant), delta, atol=1e-9)
    y = code(profile, z[:, anchors(profile)])
    fisher = profile.parameters["fisher"].astype(np.float64)
    assert (np.einsum("ti,ij,tj->t", y, fisher, y) <= 2.0 * kl_limit * (1.0 + 1e-5)).all()
    free = code(contextual_profile(**{**given_parts, "kl_limit": 1e30}), z[:, anchors(profile)])
    within = np.einsum("ti,ij,tj->t", free, fisher, free) <= 2.0 * kl_limit
    np.testing.assert_allclose(y[within], free[within], rtol=1e-6)


@given(st.integers(0, 1000))
def test_the_top_k_view_agrees_with_the_whole_row(seed):
    profile = make(seed)
    logprobs = log_softmax(4.0 * np.random.default_rng(seed).normal(size=(3, V)))
    ids = np.argsort(-logprobs, axis=-1)[:, :4]
    ids[0, 3] = -1
    values = np.where(ids >= 0, np.take_along_axis(logprobs, ids, -1), -np.inf)
    result = shift_at(profile, ids, values, code(profile, logprobs[:, anchors(profile)]))
    expected = np.take_along_axis(shift(profile, logprobs), ids, -1)
    np.testing.assert_allclose(result, np.where(ids >= 0, expected, 0.0), atol=1e-9)


@pytest.mark.parametrize("value", [-np.inf, np.inf, np.nan])
def test_a_row_with_a_masked_anchor_is_left_alone(value):
    profile = make()
    z = np.random.default_rng(0).normal(size=(2, V)).astype(np.float32)
    z[0, anchors(profile)[N - 1]] = value  # one that the map itself does not read
    out = apply(profile, z)
    np.testing.assert_array_equal(out[0], z[0])
    assert (out[1] != z[1]).all()


def test_a_mask_elsewhere_changes_nothing_else():
    profile = make()
    z = np.random.default_rng(0).normal(size=(1, V))
    free = np.setdiff1d(np.arange(V), anchors(profile))[0]
    before = shift(profile, z)
    z[0, free] = -np.inf
    np.testing.assert_array_equal(np.delete(shift(profile, z), free, 1), np.delete(before, free, 1))
    assert shift(profile, z)[0, free] == 0.0


def test_the_probe_changes_nothing():
    profile = probe_profile("m", V, np.array([3, 1, 4]), 2.0)
    assert CalibrationProfile.from_bytes(profile.to_bytes()) == profile
    np.testing.assert_array_equal(anchors(profile), [3, 1, 4])
    assert not shift(profile, np.random.default_rng(0).normal(size=(2, V))).any()


def test_round_trip_and_version():
    profile = make(metadata={"tokens": "15000"})
    data = profile.to_bytes()
    again = CalibrationProfile.from_bytes(data, profile.version)
    assert again == profile
    assert again.to_bytes() == data
    assert {name: str(array.dtype) for name, array in again.parameters.items() if array.dtype != np.float32} == {
        "anchors": "int32",
        "up": "float16",
    }
    assert profile.version != make(1, metadata={"tokens": "15000"}).version


@given(cut=st.integers(0, len(make().to_bytes()) - 1), position=st.integers(0, len(make().to_bytes()) - 1))
def test_truncated_or_tampered(cut, position):
    profile = make()
    data = bytearray(profile.to_bytes())
    with pytest.raises(InvalidProfileError) as error:
        CalibrationProfile.from_bytes(bytes(data[:cut]))
    assert "\n" not in str(error.value)
    data[position] ^= 0x41
    with pytest.raises(InvalidProfileError, match="fetch it again"):
        CalibrationProfile.from_bytes(bytes(data), profile.version)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e["__metadata__"].update(vocab_size="12"), "up has shape"),
        (lambda e: e["__metadata__"].update(format="1"), "canonical"),
        (lambda e: e["__metadata__"].update(family="temperature_bias"), "parameters are"),
        (lambda e: e["up"].update(dtype="BF16"), "up has a type other than"),
        (lambda e: e["anchors"].update(dtype="F32"), "anchors is float32: it must be int32"),
    ],
)
def test_bad_headers(change, message):
    with pytest.raises(InvalidProfileError, match=message) as error:
        CalibrationProfile.from_bytes(rewrite(make().to_bytes(), change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"anchors": np.array([0, 1, 2, 3, 4, V])}, "distinct ids of the vocabulary of 11"),
        ({"anchors": np.array([0, 1, 2, 3, 4, -1])}, "distinct ids"),
        ({"anchors": np.array([0, 1, 2, 3, 4, 4])}, "distinct ids"),
        ({"anchors": np.zeros(0, np.int32)}, "distinct ids"),
        ({"anchors": np.array([0, 1, 2])}, "4 features: 1 to the 3 anchors"),
        ({"offset": np.zeros(R + 1)}, "offset has shape|linear has shape"),
        ({"offset": np.full(R, np.nan)}, "offset holds NaN"),
        ({"kl_limit": 0.0}, "kl_limit is 0"),
        ({"kl_limit": np.inf}, "kl_limit holds NaN or an infinity"),
        ({"up": np.full((V, R), 1e6)}, "up holds NaN or an infinity"),
        ({"clamp_nats": 0.0}, "clamp_nats"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(InvalidProfileError, match=message):
        make(**changes)


def test_wrong_calls_are_named():
    profile = make()
    with pytest.raises(InvalidArgumentError, match="anchored has shape"):
        code(profile, np.zeros((2, N + 1)))
    with pytest.raises(InvalidArgumentError, match="code is missing"):
        shift_at(profile, np.zeros((1, 2), np.int32), np.zeros((1, 2)))
    other = temperature_bias("m", V, 1.0, np.zeros(V), 1.0)
    assert anchors(other) is None
    with pytest.raises(InvalidArgumentError, match="reads no anchors"):
        code(other, np.zeros(3))


# --- what a record says of it ----------------------------------------------------------------------------------------


def exact(log_r, log_c):
    r, c = np.exp(log_r), np.exp(log_c)
    return {"kl_rc": (r * (log_r - log_c)).sum(-1), "tv": 0.5 * np.abs(r - c).sum(-1)}


def with_features(record, truth, profile):
    ids = anchors(profile)
    values = truth.compressed[:, ids]
    values = (values - values.mean(1, keepdims=True)).astype(np.float32)
    return validate(replace(record, features=Features(anchors_digest(ids), values)))


@settings(max_examples=examples(200))
@given(truths(), st.integers(2, 30), st.sampled_from([None, 2]), st.booleans(), st.integers(0, 99))
def test_a_record_with_features_knows_the_gain(truth, k, reference_k, log_normalizer, seed):
    vocabulary = truth.compressed.shape[1]
    profile = contextual_profile(**parts(seed, vocabulary, min(N, vocabulary), scale=0.05))
    record = make_record(truth, k, reference_k=reference_k, profile=profile, log_normalizer=log_normalizer)
    record = with_features(record, truth, profile)
    log_c = log_softmax(apply(profile, truth.compressed))
    before, after = exact(truth.reference, truth.compressed), exact(truth.reference, log_c)
    won = before["kl_rc"] - after["kl_rc"]
    rounding = 2e-5 * (1.0 + np.abs(before["kl_rc"]))  # the features are float32
    result = gain(record, profile)
    assert (result.lower <= won + rounding).all()
    assert (result.upper >= won - rounding).all()
    if log_normalizer and reference_k is None:
        assert result.exact.all()
    figures = calibrated(record, profile)
    assert figures.known.all()
    # Where next to nothing is behind the candidates, its logarithm is that of their rounding.
    told = (figures.bound == "exact") | (figures.covered_compressed < 0.99)
    for name, value in after.items():
        assert (getattr(figures, name) <= value + 100 * rounding)[told].all(), name
    assert np.isfinite(figures.kl_rc).all()


def unlike(record, truth, profile, how):
    if how == "none":
        return replace(record, features=None)
    record = with_features(record, truth, profile)
    if how == "other anchors":
        return replace(record, features=replace(record.features, anchors="0" * 32))
    values = record.features.values.copy()
    values[0] = np.nan
    return validate(replace(record, features=replace(record.features, values=values)))


@pytest.mark.parametrize("how", ["none", "other anchors", "masked"])
@pytest.mark.parametrize("log_normalizer", [True, False])
@given(truth=truths(), k=st.integers(2, 30), seed=st.integers(0, 99))
@settings(max_examples=examples(60))
def test_without_features_nothing_is_guessed(how, log_normalizer, truth, k, seed):
    vocabulary = truth.compressed.shape[1]
    profile = contextual_profile(**parts(seed, vocabulary, min(N, vocabulary), scale=0.05))
    record = make_record(truth, k, reference_k=3, profile=profile, log_normalizer=log_normalizer)
    record = unlike(record, truth, profile, how)
    unknown = np.ones(record.tokens, bool) if how != "masked" else np.arange(record.tokens) == 0
    bounded, figures = gain(record, profile), calibrated(record, profile)
    log_c = log_softmax(apply(profile, truth.compressed))
    before = exact(truth.reference, truth.compressed)["kl_rc"]
    won = before - exact(truth.reference, log_c)["kl_rc"]
    rounding = 2e-5 * (1.0 + np.abs(before))
    assert (bounded.lower <= won + rounding).all()
    assert (bounded.upper >= won - rounding).all()
    assert not bounded.exact[unknown].any()
    width = (bounded.upper - bounded.lower)[unknown]
    clamp = profile.clamp_nats
    np.testing.assert_allclose(width, 2.0 * clamp if log_normalizer else 4.0 * clamp, atol=1e-9)
    np.testing.assert_array_equal(figures.known, ~unknown)
    for name in ("kl_rc", "kl_cr", "js", "tv", "entropy_compressed", "estimate_rc", "delta_log_likelihood"):
        assert np.isnan(getattr(figures, name)[unknown]).all(), name
    assert not figures.top1_agreement[unknown].any()


def test_what_was_sampled_from_an_unknown_shift_has_no_weight():
    rng = np.random.default_rng(0)
    truth = Truth(log_softmax(rng.normal(size=(3, V))), log_softmax(rng.normal(size=(3, V))), np.array([0, 1, 2]))
    profile = make()
    record = make_record(truth, 2, profile=profile, applied=profile.version)
    assert np.isnan(divergence(record, profile).estimate_rc).all()
    assert np.isfinite(divergence(with_features(record, truth, profile), profile).estimate_rc).all()
