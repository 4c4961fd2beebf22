"""Conversions of arrays give what numpy gives."""

from __future__ import annotations

import numpy as np
import pytest

from hemostat_calibration.arrays import Halves, singles_of


def all_halves() -> Halves:
    """Returns every finite float16, subnormal ones and both zeros too."""
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    return every[np.isfinite(every)]


def test_every_half_becomes_the_single_of_the_same_value() -> None:
    halves = all_halves().reshape(-1, 2)
    np.testing.assert_array_equal(singles_of([halves]).view(np.uint32), halves.astype(np.float32).view(np.uint32))


@pytest.mark.parametrize("sizes", [(1,), (0, 3), (5000, 1, 9)])
def test_parts_follow_each_other(sizes: tuple[int, ...]) -> None:
    values = np.resize(all_halves(), (sum(sizes), 14))
    parts = np.split(values, np.cumsum(sizes)[:-1])
    parts[-1] = np.asfortranarray(parts[-1])
    np.testing.assert_array_equal(singles_of(parts), np.concatenate(parts).astype(np.float32))
