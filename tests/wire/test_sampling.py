from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hemostat.shadow.assignment import ARM, SHADOW, in_control_arm, is_sampled, uniform

RATES = st.floats(0, 1)


@given(st.text(max_size=40), st.integers(-(2**63), 2**64), RATES, RATES)
def test_a_request_sampled_at_one_rate_is_sampled_at_every_higher_one(
    request_id: str, seed: int, one: float, other: float
) -> None:
    low, high = sorted([one, other])
    assert is_sampled(request_id, low, seed) <= is_sampled(request_id, high, seed)


@given(st.text(max_size=40), st.integers(0, 2**64 - 1))
def test_rate_zero_samples_nothing_and_rate_one_everything(request_id: str, seed: int) -> None:
    assert not is_sampled(request_id, 0.0, seed)
    assert is_sampled(request_id, 1.0, seed)


@pytest.mark.parametrize("rate", [0.05, 0.3])
def test_the_sampled_fraction_is_the_rate(rate: float) -> None:
    n = 20_000
    hits = sum(is_sampled(f"req-{i}", rate, 3) for i in range(n))
    # Five standard deviations of a binomial.
    assert abs(hits - n * rate) < 5 * (n * rate * (1 - rate)) ** 0.5


def test_sampling_and_arm_are_independent() -> None:
    n = 20_000
    inside = [i for i in range(n) if is_sampled(f"req-{i}", 0.5, 3)]
    controls = sum(in_control_arm(f"req-{i}".encode(), 0.5, 3) for i in inside)
    assert abs(controls - len(inside) / 2) < 5 * (len(inside) / 4) ** 0.5


def test_the_seed_and_the_purpose_change_the_draw() -> None:
    assert uniform(b"k", 1, SHADOW) != uniform(b"k", 2, SHADOW)
    assert uniform(b"k", 1, SHADOW) != uniform(b"k", 1, ARM)


def test_the_draw_is_pinned() -> None:
    """Two versions of Hemostat that run side by side must sample the same requests."""
    assert uniform(b"request", 1, SHADOW) == 0.6122045045800387
