"""The rows are there; how large they are takes a machine that does nothing else."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("vllm")
from tests.bench.faults.passive_cost import logprobs_ms, measure


def test_every_figure_is_measured() -> None:
    cost = measure(rounds=2)
    assert all(math.isfinite(figure) for figure in (cost.row, cost.sent, cost.unsampled))
    assert cost.sent > 0.0
    assert logprobs_ms(rounds=1) > 0.0
