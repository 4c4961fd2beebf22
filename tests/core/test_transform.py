import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tests.support.oracle import apply, shift
from tests.support.temperature_bias import temperature_bias

from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.profiles.transform import max_shift, shift_at

V = 9
rows = hnp.arrays(np.float64, (3, V), elements=st.floats(-50, 50))
biases = hnp.arrays(np.float32, V, elements=st.floats(-3, 3, width=32))
temperatures = st.floats(0.3, 3.0)


def test_by_hand():
    profile = temperature_bias("m", 3, 2.0, np.array([0.1, 0.0, -0.2]), 1.0)
    logits = np.array([5.0, 4.0, 1.0])
    # (1/2 − 1)(z − 5) + b = 0.1, 0.5, 2 − 0.2 -> clamped to 1
    np.testing.assert_allclose(shift(profile, logits), [0.1, 0.5, 1.0], atol=1e-7)
    np.testing.assert_allclose(apply(profile, logits), [5.1, 4.5, 2.0], atol=1e-7)


@given(rows, biases, temperatures, st.floats(0.01, 5.0), st.floats(-100, 100))
def test_bounded_and_blind_to_a_constant(logits, bias, temperature, clamp, constant):
    profile = temperature_bias("m", V, temperature, bias, clamp)
    delta = shift(profile, logits)
    assert (np.abs(delta) <= max_shift(profile)).all()
    np.testing.assert_allclose(shift(profile, logits + constant), delta, atol=1e-9)


@given(rows, biases, temperatures)
def test_the_top_k_view_agrees_with_the_whole_row(logits, bias, temperature):
    profile = temperature_bias("m", V, temperature, bias, 1.0)
    logprobs = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    ids = np.argsort(-logprobs, axis=-1)[:, :4]
    expected = np.take_along_axis(shift(profile, logits), ids, -1)
    np.testing.assert_allclose(shift_at(profile, ids, np.take_along_axis(logprobs, ids, -1)), expected, atol=1e-9)


def test_identity_changes_nothing():
    profile = temperature_bias("m", V, 1.0, np.zeros(V), 1.0)
    logits = np.random.default_rng(0).normal(size=(4, V)).astype(np.float32)
    np.testing.assert_array_equal(apply(profile, logits), logits)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_what_is_not_finite_stays_as_it_is(temperature):
    profile = temperature_bias("m", V, temperature, np.full(V, 0.3), 1.0)
    logits = np.zeros((3, V), np.float32)
    logits[0, [1, 2]] = -np.inf, np.nan
    logits[1, 0] = np.inf
    logits[2] = -np.inf
    out = apply(profile, logits)
    assert out.dtype == np.float32
    np.testing.assert_array_equal(out[~np.isfinite(logits)], logits[~np.isfinite(logits)])
    np.testing.assert_allclose(out[np.isfinite(logits)], 0.3, rtol=1e-6)


def test_a_mask_does_not_move_the_rest():
    """z − max z is taken over what may still be chosen."""
    profile = temperature_bias("m", 3, 2.0, np.zeros(3), 5.0)
    np.testing.assert_allclose(shift(profile, np.array([-np.inf, 2.0, 1.0])), [0.0, 0.0, 0.5])


def test_padding_gets_nothing():
    profile = temperature_bias("m", V, 2.0, np.full(V, 0.3), 1.0)
    ids = np.array([[4, 2, -1]], np.int32)
    np.testing.assert_allclose(shift_at(profile, ids, np.array([[-0.5, -1.5, -np.inf]])), [[0.3, 0.8, 0.0]], rtol=1e-6)


def test_shapes_are_checked():
    profile = temperature_bias("m", V, 2.0, np.zeros(V), 1.0)
    with pytest.raises(InvalidArgumentError, match="logits"):
        shift(profile, np.zeros((2, V + 1)))
    with pytest.raises(InvalidArgumentError, match="ids"):
        shift_at(profile, np.zeros((2, 3), np.int32), np.zeros((2, 4)))
    with pytest.raises(InvalidArgumentError, match="vocabulary"):
        shift_at(profile, np.full((2, 3), V, np.int32), np.zeros((2, 3)))
