"""A candidate that is bad in a small kind, with fewer lives than the benchmark."""

from __future__ import annotations

from tests.bench.gate.small_kind import live, log_optimal, offline

from hemostat.gate.unit import KIND_WEIGHTS


def test_a_candidate_that_is_bad_in_a_small_kind_fails() -> None:
    assert log_optimal(6).within(3000) == 1.0
    assert offline(6, KIND_WEIGHTS).within(4000) == 1.0
    assert live(2).within(6000) == 1.0
