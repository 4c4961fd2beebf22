import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from hemostat_calibration.adapters.correction import low_rank
from hemostat_calibration.adapters.factors import dequantize_rows, quantize_rows
from hemostat_calibration.adapters.gram import FullGram
from hemostat_calibration.errors import InvalidArgumentError


@given(arrays.arrays(np.float32, (3, 4), elements=st.floats(-(2.0**100), 2.0**100, width=32)))
def test_the_error_is_at_most_half_a_step(x: np.ndarray) -> None:
    codes, scales = quantize_rows(x)
    assert (np.abs(codes) <= 127).all()
    assert (scales >= 0.0).all()
    steps = scales[:, None].astype(np.float64)
    tolerance = 0.5 * steps * (1.0 + 1e-5) + 2e-43  # the scale itself is rounded, below 1e-38 coarsely
    assert (np.abs(dequantize_rows(codes, scales).astype(np.float64) - x) <= tolerance + 127.0 * 1e-7 * steps).all()


def test_the_smallest_numbers() -> None:
    codes, scales = quantize_rows(np.array([[1e-44, 0.0], [0.0, 0.0]]))
    assert not dequantize_rows(codes, scales).any()


def test_quantizing_twice_changes_nothing() -> None:
    codes, scales = quantize_rows(np.random.default_rng(0).normal(size=(5, 9)))
    again, others = quantize_rows(dequantize_rows(codes, scales))
    np.testing.assert_array_equal(again, codes)
    np.testing.assert_allclose(others, scales, rtol=1e-6)


def test_a_correction_loses_little() -> None:
    """Singular values over four decades, as with outlier inputs: the small components survive the rounding."""
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(400, 48)) * np.logspace(0, 2, 48)
    delta, inputs = rng.normal(size=(64, 48)), FullGram.init(48).update(rows)
    factors, errors = low_rank(delta, 16, inputs)
    rounded = dequantize_rows(*quantize_rows(factors.b)) @ dequantize_rows(*quantize_rows(factors.a))
    left = delta - rounded
    won, kept = errors[0] - errors[16], errors[0] - float(np.trace(left @ inputs.mean() @ left.T))
    assert kept > 0.999 * won


@pytest.mark.parametrize("x", [np.ones(3), np.array([[np.nan]]), np.array([[np.inf]])])
def test_bad_arguments(x: np.ndarray) -> None:
    with pytest.raises(InvalidArgumentError, match="matrix without NaN"):
        quantize_rows(x)
