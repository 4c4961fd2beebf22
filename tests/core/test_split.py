import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.statistics.split import held_out, prompt_key

KEYS = [prompt_key(np.array([i, 7, 9])) for i in range(4000)]


def test_the_key_is_the_ids_and_nothing_else():
    assert prompt_key(np.array([1, 2], np.int64)) == prompt_key(np.array([1, 2], np.int32))
    assert len(set(KEYS)) == len(KEYS)
    assert prompt_key(np.array([1, 2])) != prompt_key(np.array([2, 1]))
    assert len(KEYS[0]) == 16
    with pytest.raises(InvalidArgumentError, match="ids"):
        prompt_key(np.zeros((2, 2), np.int32))


def test_the_fraction_is_met():
    for fraction in (0.1, 0.3, 0.5):
        share = np.mean([held_out(key, fraction) for key in KEYS])
        assert abs(share - fraction) < 4 * np.sqrt(fraction * (1 - fraction) / len(KEYS))
    assert not any(held_out(key, 0.0) for key in KEYS)
    assert all(held_out(key, 1.0) for key in KEYS)


@given(st.binary(max_size=40), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_fraction_only_adds(key, a, b):
    low, high = sorted((a, b))
    assert held_out(key, low) <= held_out(key, high)


def test_fraction_is_checked():
    with pytest.raises(InvalidArgumentError, match="fraction"):
        held_out(b"x", 1.5)
