"""Short canaries of simulated engines whose kernels switch between modes. The fast version of `canary_short`."""

from __future__ import annotations

import numpy as np
import pytest
from tests.bench.canary_short import SHORT_FAULTS, healthy, seconds_until_stated

from hemostat_calibration import canaries, canary_short


def test_healthy_engines_are_not_accused_and_a_test_without_modes_accuses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert healthy(8, 48)[0] == 0
    monkeypatch.setattr(canaries, "MODE_TOLERANCES", 0.0)
    monkeypatch.setattr(canary_short, "MODE_TOLERANCES", 0.0)
    stated, wholes = healthy(8, 48)
    assert stated >= 2
    assert wholes >= stated


@pytest.mark.parametrize("settled", [0, 26])
def test_a_fault_that_half_of_the_sequences_show_is_stated_within_a_minute(settled: int) -> None:
    seconds = np.array(seconds_until_stated(SHORT_FAULTS["half of the sequences by 0.2 nats"], 20, settled))
    assert (seconds <= 60.0).sum() >= 18
    assert (seconds <= 600.0).all()


def test_no_fault_is_no_statement() -> None:
    fault = SHORT_FAULTS["all tokens by 0.02 nats"]
    assert np.isinf(seconds_until_stated(fault, 6, 0)).all()
