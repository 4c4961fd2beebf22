"""torch against the numpy oracle."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hemostat_calibration import transform as oracle
from hemostat_calibration.families import FAMILIES

from .conftest import make_profile

torch = pytest.importorskip("torch")

from hemostat_calibration.engine import transform  # noqa: E402 - needs torch

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}


def logits(rows: int, vocab_size: int, seed: int, masked: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    z = rng.normal(0.0, 4.0, (rows, vocab_size))
    z[rng.random(z.shape) < masked] = -np.inf
    return z.astype(np.float32)


def test_every_family_of_the_oracle_can_be_applied() -> None:
    assert set(transform.FAMILIES) == set(FAMILIES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "vocab_size"), [(1, 7), (256, 1000), (3, 49_152), (2, 262_144)])
def test_apply_equals_the_oracle(dtype: torch.dtype, rows: int, vocab_size: int) -> None:
    profile = make_profile(1, vocab_size)
    held = transform.HeldProfile(profile)
    z = torch.from_numpy(logits(rows, vocab_size, 2, masked=0.1)).to(dtype)
    expected = oracle.apply(profile, z.double().numpy())
    transform.apply_to_rows(held, z, torch.arange(rows))
    got = z.double().numpy()
    assert (np.isneginf(got) == np.isneginf(expected)).all()
    finite = np.isfinite(expected)
    bound = TOLERANCE[dtype] * np.maximum(1.0, np.abs(expected[finite]))
    assert (np.abs(got[finite] - expected[finite]) <= bound).all()


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 12),
    chosen=st.sets(st.integers(0, 11)),
    masked=st.sampled_from([0.0, 0.5, 0.97]),
    temperature=st.floats(0.3, 3.0),
    clamp=st.floats(0.01, 20.0),
    seed=st.integers(0, 1000),
    chunk=st.sampled_from([1, 100, 1 << 24]),
)
def test_chosen_rows_only_by_index_or_by_mask(
    rows: int, chosen: set[int], masked: float, temperature: float, clamp: float, seed: int, chunk: int
) -> None:
    profile = make_profile(seed, temperature=temperature, clamp=clamp)
    held = transform.HeldProfile(profile)
    z = logits(rows, profile.vocab_size, seed, masked)
    picked = sorted(row for row in chosen if row < rows)
    by_index, by_mask = torch.from_numpy(z.copy()), torch.from_numpy(z.copy())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transform, "CHUNK_ELEMENTS", chunk)
        transform.apply_to_rows(held, by_index, torch.tensor(picked, dtype=torch.int64))
        mask = torch.zeros(rows, dtype=torch.bool)
        mask[picked] = True
        transform.apply_where(held, by_mask, mask)
    expected = z.copy()
    expected[picked] = oracle.apply(profile, z[picked].astype(np.float64))
    np.testing.assert_allclose(by_index.numpy(), expected, rtol=1e-5, atol=2e-5)
    assert by_mask.numpy().tobytes() == by_index.numpy().tobytes()
    others = [row for row in range(rows) if row not in picked]
    assert by_index.numpy()[others].tobytes() == z[others].tobytes()


def test_nan_plus_inf_and_wholly_masked_rows_are_passed_on_as_they_are() -> None:
    profile = make_profile(3)
    z = logits(3, profile.vocab_size, 3)
    z[0, 5], z[1, 6] = np.nan, np.inf
    z[2] = -np.inf
    got = torch.from_numpy(z.copy())
    transform.apply_to_rows(transform.HeldProfile(profile), got, torch.arange(3))
    np.testing.assert_allclose(got.numpy(), oracle.apply(profile, z), rtol=1e-5, atol=2e-5)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 1000), masked=st.sampled_from([0.0, 0.6]), rows=st.integers(1, 6))
def test_log_normalizer_is_log_of_the_mean_of_the_exponential(seed: int, masked: float, rows: int) -> None:
    profiles = (make_profile(seed), make_profile(seed + 1, temperature=1.7))
    z = logits(8, profiles[0].vocab_size, seed, masked)
    z[:, 0] = 1.0
    held = tuple(transform.HeldProfile(p) for p in profiles)
    chosen = list(range(8))[-rows:]
    got = transform.log_normalizers(held, torch.from_numpy(z), torch.tensor(chosen)).numpy()
    exact = z[chosen].astype(np.float64)
    c = np.exp(exact - exact.max(-1, keepdims=True))
    c /= c.sum(-1, keepdims=True)
    for k, profile in enumerate(profiles):
        expected = np.log((c * np.exp(oracle.shift(profile, exact))).sum(-1))
        np.testing.assert_allclose(got[k], expected, atol=5e-6)
