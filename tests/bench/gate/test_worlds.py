"""The simulated worlds of the gate, with fewer lives than the benchmark."""

from __future__ import annotations

import numpy as np
import pytest
from tests.bench.bench_gate import ALPHA, WORLDS, World, log_evidence, row

from hemostat_calibration.gate.verdict import MeanTest


@pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.name)
def test_neither_error_is_frequent_where_the_mean_is_the_margin(world: World) -> None:
    """250 lives of 600 units: 26 errors of either kind have a probability below 0.001 at alpha."""
    result = row(world, 0.05, 0.05, 250, 600)
    assert float(str(result["passes"])) <= 25 / 250 > ALPHA
    assert float(str(result["fails"])) <= 25 / 250


def test_the_benchmark_simulates_the_tests_that_are_landed() -> None:
    values = np.random.default_rng(6).uniform(-0.3, 0.4, (3, 50))
    evidence = log_evidence(0.05 - values, 0.95), log_evidence(values - 0.05, 1.05)
    for excess, passing, failing in zip(values, *evidence, strict=True):
        test = MeanTest(0.05)
        for value in excess.tolist():
            test.update(value)
        assert (test.log_pass, test.log_fail) == pytest.approx((max(passing.max(), 0.0), failing[-1]))
