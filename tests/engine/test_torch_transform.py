"""torch against the numpy oracle."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support import oracle
from tests.support.engine_profiles import make_contextual, make_profile
from tests.support.slow import examples

from hemostat_calibration.adapters.factors import LowRank
from hemostat_calibration.profiles.adapter import adapter_profile
from hemostat_calibration.profiles.contextual import contextual_profile, probe_profile
from hemostat_calibration.profiles.families import FAMILIES
from hemostat_calibration.profiles.profile import CalibrationProfile

torch = pytest.importorskip("torch")

from hemostat_engine import product, transform  # noqa: E402

Make = Callable[..., CalibrationProfile]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}


def logits(rows: int, vocab_size: int, seed: int, masked: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    z = rng.normal(0.0, 4.0, (rows, vocab_size))
    z[rng.random(z.shape) < masked] = -np.inf
    return z.astype(np.float32)


def apply_to_rows(held: transform.HeldProfile, z: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """Returns how many rows were masked and limited."""
    counts = torch.zeros(2, dtype=torch.int64)
    chosen = None if rows is None else rows.tolist()
    transform.apply_to_rows(held, z, chosen, counts, on_device=lambda part: torch.tensor(part, dtype=torch.int64))
    return counts


def apply_where(held: transform.HeldProfile, z: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    counts = torch.zeros(2, dtype=torch.int64)
    transform.apply_where(held, z, lambda: chosen, counts)
    return counts


def test_every_family_of_the_oracle_can_be_applied() -> None:
    assert set(transform.FAMILIES) == set(FAMILIES)


@pytest.mark.parametrize("make", [make_profile, make_contextual])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "vocab_size"), [(1, 17), (256, 1000), (3, 49_152), (2, 262_144)])
def test_apply_equals_the_oracle(make: Make, dtype: torch.dtype, rows: int, vocab_size: int) -> None:
    profile = make(1, vocab_size)
    held = transform.HeldProfile(profile)
    z = torch.from_numpy(logits(rows, vocab_size, 2, masked=0.01)).to(dtype)
    expected = oracle.apply(profile, z.double().numpy())
    apply_to_rows(held, z, None)
    got = z.double().numpy()
    assert (np.isneginf(got) == np.isneginf(expected)).all()
    finite = np.isfinite(expected)
    bound = TOLERANCE[dtype] * np.maximum(1.0, np.abs(expected[finite]))
    assert (np.abs(got[finite] - expected[finite]) <= bound).all()


@pytest.mark.parametrize("bfloat16", [False, True])
def test_profile_of_realistic_size(bfloat16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if bfloat16 and not product.packs_bfloat16():
        pytest.skip("oneDNN does not pack bfloat16 on this processor")
    monkeypatch.setattr(product, "multiplies_bfloat16", lambda: bfloat16)
    profile = make_contextual(4, 49_152, anchors=768, features=512, rank=64, kl_limit=0.5, scale=8.0)
    z = logits(8, 49_152, 5)
    got = torch.from_numpy(z.copy())
    masked, limited = apply_to_rows(transform.HeldProfile(profile), got, None).tolist()
    expected = oracle.apply(profile, z.astype(np.float64))
    np.testing.assert_allclose(got.numpy(), expected, atol=0.05 if bfloat16 else 1e-4)
    shift = np.square(expected - z).mean() ** 0.5
    assert np.square(got.numpy() - expected).mean() ** 0.5 < (2**-8 * shift if bfloat16 else 1e-5)
    assert np.abs(expected - z).max() > 1.0
    assert (masked, limited) == (0, 8)


def test_large_batch_is_processed_in_parts() -> None:
    profile = make_contextual(6, 262_144)
    z = torch.from_numpy(logits(32, 262_144, 7)).repeat(8, 1)
    step = transform.CHUNK_ELEMENTS // z.shape[1]
    assert step < 256, "more than one part"
    before = z[:32].double().numpy()
    z += torch.arange(256)[:, None].float() / 256  # no two rows alike, and the profile is blind to a constant
    apply_to_rows(transform.HeldProfile(profile), z, None)
    for row in (0, step - 1, step, 2 * step + 1, 255):
        expected = oracle.apply(profile, before[row % 32]) + row / 256
        np.testing.assert_allclose(z[row].double().numpy(), expected, atol=1e-4)


@settings(deadline=None, max_examples=examples(80))
@given(
    rows=st.integers(1, 12),
    chosen=st.sets(st.integers(0, 11)),
    masked=st.sampled_from([0.0, 0.03, 0.5, 0.97]),
    clamp=st.floats(0.01, 20.0),
    seed=st.integers(0, 1000),
    chunk=st.sampled_from([1, 100, 1 << 24]),
    kl_limit=st.sampled_from([1e-3, 0.3, 1e30]),
    make=st.sampled_from([make_profile, make_contextual]),
)
def test_chosen_rows_only_by_index_or_by_mask(
    rows: int,
    chosen: set[int],
    masked: float,
    clamp: float,
    seed: int,
    chunk: int,
    kl_limit: float,
    make: Make,
) -> None:
    more = {"kl_limit": kl_limit} if make is make_contextual else {"temperature": 0.5 + seed / 500}
    profile = make(seed, clamp=clamp, **more)
    held = transform.HeldProfile(profile)
    z = logits(rows, profile.vocab_size, seed, masked)
    z[:, 7] = -0.0
    picked = sorted(row for row in chosen if row < rows)
    by_index, by_mask = torch.from_numpy(z.copy()), torch.from_numpy(z.copy())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transform, "CHUNK_ELEMENTS", chunk)
        counts = apply_to_rows(held, by_index, torch.tensor(picked, dtype=torch.int64))
        mask = torch.zeros(rows, dtype=torch.bool)
        mask[picked] = True
        assert apply_where(held, by_mask, mask).tolist() == counts.tolist()
    expected = z.copy()
    expected[picked] = oracle.apply(profile, z[picked].astype(np.float64))
    others = [row for row in range(rows) if row not in picked]
    for got in (by_index.numpy(), by_mask.numpy()):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-5)
        assert got[others].tobytes() == z[others].tobytes()
    ids = oracle.anchors(profile)
    if ids is not None:
        finite = np.isfinite(z[picked][:, ids]).all(-1)
        free = oracle.code(make(seed, clamp=clamp, **more | {"kl_limit": 1e30}), z[picked][:, ids])
        fisher = profile.parameters["fisher"].astype(np.float64)
        kl = 0.5 * ((free @ fisher) * free).sum(-1)
        assert counts.tolist() == [(~finite).sum(), (finite & (kl > kl_limit)).sum()]


@pytest.mark.parametrize("make", [make_profile, make_contextual])
def test_nan_inf_and_fully_masked_rows_are_unchanged(make: Make) -> None:
    profile = make(3)
    ids = profile.parameters.get("anchors", np.arange(20))
    elsewhere = np.setdiff1d(np.arange(profile.vocab_size), ids)
    z = logits(6, profile.vocab_size, 3)
    z[0, ids[5]], z[1, ids[6]], z[2, ids[11]] = np.nan, np.inf, -np.inf
    z[3] = -np.inf
    z[4, elsewhere[:3]] = np.nan, np.inf, -np.inf
    got = torch.from_numpy(z.copy())
    counts = apply_to_rows(transform.HeldProfile(profile), got, None)
    np.testing.assert_allclose(got.numpy(), oracle.apply(profile, z), rtol=1e-5, atol=2e-5)
    if make is make_contextual:
        assert got.numpy()[:4].tobytes() == z[:4].tobytes()
        assert counts.tolist() == [4, 0]


def test_overflow_in_float32_is_identity_and_counted() -> None:
    """Values within float64 may overflow in float32: no infinity reaches the logits."""
    profile = contextual_profile(
        model="",
        anchors=np.arange(4),
        linear=np.full((2, 4), 3e38) * np.array([1.0, -1.0, 1.0, -1.0]),
        offset=np.zeros(2),
        up=np.full((40, 2), 6e4),
        clamp_nats=1.0,
    )
    z = logits(2, 40, 1)
    z[1, :4] = 1.0
    got = torch.from_numpy(z.copy())
    assert apply_to_rows(transform.HeldProfile(profile), got, None).tolist() == [1, 0]
    assert (got.numpy() == z).all()


def test_features_are_the_centred_logits_at_the_anchors() -> None:
    ids = np.array([9, 2, 30])
    z = logits(3, 40, 1)
    z[1, 2] = -np.inf
    got = transform.centred(torch.from_numpy(z), torch.tensor([2, 1]), torch.from_numpy(ids)).numpy()
    np.testing.assert_allclose(got[0], z[2, ids] - z[2, ids].mean(), rtol=1e-6)
    assert not np.isfinite(got[1]).any()


def test_is_probe() -> None:
    ids = np.array([3, 1, 2])
    held = transform.HeldProfile(probe_profile("m", 40, ids, 1.0))
    assert (held.is_probe, held.anchors, held.anchor_count) == (True, oracle.anchors_digest(ids), 3)
    assert not transform.HeldProfile(make_contextual()).is_probe
    assert not transform.HeldProfile(make_profile()).is_probe


@settings(deadline=None, max_examples=examples(40))
@given(
    seed=st.integers(0, 1000),
    masked=st.sampled_from([0.0, 0.05, 0.6]),
    rows=st.integers(1, 6),
    clamp=st.sampled_from([0.5, 4.0]),
    chunk=st.sampled_from([1, 1 << 24]),
)
def test_log_normalizer_is_log_of_the_mean_of_the_exponential(
    seed: int, masked: float, rows: int, clamp: float, chunk: int
) -> None:
    profiles = (
        make_profile(seed, clamp=clamp),
        make_profile(seed + 1, temperature=1.7),
        make_contextual(seed, clamp=clamp),
    )
    z = logits(8, profiles[0].vocab_size, seed, masked)
    z[:, 0] = 1.0
    held = tuple(transform.HeldProfile(p) for p in profiles)
    chosen = list(range(8))[-rows:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transform, "CHUNK_ELEMENTS", chunk)
        got, clamped = (t.numpy() for t in transform.evaluate(held, torch.from_numpy(z), torch.tensor(chosen)))
    exact = z[chosen].astype(np.float64)
    c = np.exp(exact - exact.max(-1, keepdims=True))
    c /= c.sum(-1, keepdims=True)
    for k, profile in enumerate(profiles):
        delta = oracle.shift(profile, exact)
        np.testing.assert_allclose(got[k], np.log((c * np.exp(delta)).sum(-1)), atol=5e-6)
        if not masked:
            assert clamped[k].tolist() == (np.abs(delta).max(-1) >= profile.clamp_nats).tolist()


def test_an_adapter_changes_no_row() -> None:
    layers = {"model.layers.0.mlp.up_proj": LowRank(np.ones((1, 3), np.float32), np.ones((2, 1), np.float32))}
    profile = adapter_profile(model="m", vocab_size=make_contextual().vocab_size, layers=layers)
    held = transform.HeldProfile(profile)
    assert (held.is_probe, held.anchors, held.version) == (True, None, profile.version)
    z = torch.from_numpy(logits(3, profile.vocab_size, 1))
    got = z.clone()
    assert apply_to_rows(held, got, torch.tensor([2, 0])).tolist() == [0, 0]
    apply_where(held, got, torch.tensor([True, False, True]))
    assert torch.equal(got, z)
    values, clamped = transform.evaluate((held,), z, torch.tensor([1]))
    assert (values.tolist(), clamped.tolist()) == ([[0.0]], [[False]])
