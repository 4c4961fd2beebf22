"""A new kind soon has a place, because counts decay."""

from __future__ import annotations

import numpy as np
import pytest

from hemostat_calibration.statistics import kind_table

from . import places


@pytest.mark.parametrize(("share", "days"), [(0.05, 2.0), (0.2, 0.5)])
def test_after_three_months_a_new_kind_soon_has_a_place(
    share: float, days: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert places.days_until_followed(share, np.random.default_rng(0)) <= days
    monkeypatch.setattr(kind_table, "HALF_LIFE_SECONDS", 1e12)
    assert places.days_until_followed(share, np.random.default_rng(0)) > 2.5 * days, "without decay"
