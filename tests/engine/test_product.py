"""The split and bfloat16 product with `up` compared with the plain one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.slow import examples

torch = pytest.importorskip("torch")

from hemostat_engine import product  # noqa: E402

CPU = torch.device("cpu")


def made(rng: np.random.Generator, vocab_size: int, rank: int, narrow: int, wide: int) -> np.ndarray:
    """`up` whose rows end in zeros behind `narrow` columns, but for `wide` ids."""
    up = rng.normal(0.0, 1.0, (vocab_size, rank)).astype(np.float16)
    rare = rng.permutation(vocab_size)[wide:]
    up[rare, narrow:] = 0.0
    return up


@settings(deadline=None, max_examples=examples(100))
@given(
    vocab_size=st.integers(1, 300),
    rank=st.integers(1, 12),
    widths=st.sampled_from(["whole", "two", "any", "none"]),
    rows=st.integers(0, 5),
    seed=st.integers(0, 1000),
)
def test_equals_the_plain_product_for_any_pattern_of_zeros(
    vocab_size: int, rank: int, widths: str, rows: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    up = made(rng, vocab_size, rank, rank // 4, vocab_size // 8 if widths == "two" else vocab_size)
    if widths == "any":
        up[np.arange(rank) >= rng.integers(0, rank + 1, vocab_size)[:, None]] = 0.0
    if widths == "none":
        up[:] = 0.0
    y = rng.normal(size=(rows, rank)).astype(np.float32)
    got = product.Product(up).on(CPU)(torch.from_numpy(y))
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), y @ up.T.astype(np.float32), atol=1e-4)


def test_columns_of_zeros_are_not_stored() -> None:
    rng = np.random.default_rng(1)
    whole = product.Product(made(rng, 4000, 64, 64, 0))
    cut = product.Product(made(rng, 4000, 64, 16, 500))
    assert (whole.narrow, whole.wide) == (64, 0)
    assert (cut.narrow, cut.wide) == (16, 500)


@pytest.mark.parametrize(("narrow", "wide"), [(64, 0), (16, 900)])
@pytest.mark.parametrize("rows", [1, 8, 33])
def test_bfloat16_error_is_rounding(monkeypatch: pytest.MonkeyPatch, narrow: int, wide: int, rows: int) -> None:
    """A processor that has no such instruction computes the same, slowly, where oneDNN can."""
    if not product.packs_bfloat16():
        pytest.skip("oneDNN does not pack bfloat16 on this processor")
    monkeypatch.setattr(product, "multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(product, "MIN_PACKED_ELEMENTS", 1)
    rng = np.random.default_rng(2)
    up = made(rng, 5000, 64, narrow, wide)
    y = rng.normal(size=(rows, 64)).astype(np.float32)
    expected = y @ up.T.astype(np.float32)
    matrix = product.Product(up).on(CPU)
    assert matrix(torch.empty(0, 64)).shape == (0, 5000)
    got = matrix(torch.from_numpy(y)).numpy()
    off = np.sqrt(np.square(got - expected).mean() / np.square(expected).mean())
    assert 1e-4 < off < 2**-8, "bfloat16, and no worse than that"
    assert np.abs(got - expected).max() < 2**-6 * np.abs(y).sum(axis=1).max()


def test_float32_is_used_if_onednn_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN may be limited to older instructions, and another torch may have another name for the operation."""

    def refused(values: object) -> None:
        raise RuntimeError("bf16 path needs the cpu support avx512bw")

    monkeypatch.setattr(product, "packed", refused)
    monkeypatch.setattr(product, "MIN_PACKED_ELEMENTS", 1)
    product.multiplies_bfloat16.cache_clear()
    try:
        assert not product.multiplies_bfloat16()
        up = made(np.random.default_rng(3), 300, 8, 8, 0)
        y = torch.randn(2, 8)
        got = product.Product(up).on(CPU)(y)
        np.testing.assert_allclose(got.numpy(), y.numpy() @ up.T.astype(np.float32), atol=1e-5)
    finally:
        product.multiplies_bfloat16.cache_clear()
