"""How many distinct values a KV cache holds, whatever its layout and dtype."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from hemostat_engine.kv_precision import MIN_SECONDS, STEPS_PER_BIT, KvPrecision, code

SHAPE = (64, 3, 2, 16, 64)
"""Blocks, heads, keys and values, tokens of a block, head size."""
FP8 = torch.float8_e4m3fn


def layer(
    cast: torch.dtype | None = None, dtype: torch.dtype = torch.bfloat16, used: int = 64, parts: slice = slice(0, 2)
) -> SimpleNamespace:
    """Of a cache whose first blocks are in use. parts: what is cast: keys, values or both."""
    values = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)
    values[:, :, parts] = values[:, :, parts].to(cast or dtype).to(dtype)
    values[used:] = 0
    return SimpleNamespace(kv_cache=values)


@pytest.mark.parametrize("tokens", [16, 32])
@pytest.mark.parametrize("heads", [1, 8])
def test_a_cast_of_values_alone_is_seen_however_much_of_the_cache_is_in_use(heads: int, tokens: int) -> None:
    values = torch.randn(96, heads, 2, tokens, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    values[:, :, 1] = values[:, :, 1].to(FP8).to(torch.bfloat16)
    for used in (96, 72, 48):
        values[used:] = 0
        assert bits(SimpleNamespace(kv_cache=values)) < 7.1


def bits(*layers: object) -> float:
    return code(layers) / STEPS_PER_BIT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_cast_leaves_few_values_also_where_it_is_of_keys_or_values_alone(dtype: torch.dtype) -> None:
    assert bits(layer(dtype=dtype)) > 9.2
    for cast in (FP8, torch.float8_e5m2):
        for parts in (slice(0, 2), slice(0, 1), slice(1, 2)):
            assert 5.0 < bits(layer(cast, dtype, parts=parts)) < 7.1
    assert bits(layer(dtype=FP8)) == pytest.approx(bits(layer(FP8)), abs=0.2)


def test_the_layer_with_the_fewest_counts_and_layouts_do_not() -> None:
    assert bits(layer(), layer(FP8), layer()) == bits(layer(FP8))
    moved = layer(FP8, parts=slice(0, 1)).kv_cache.movedim(2, 0)
    for cache in (moved, moved.contiguous()):  # a view, and keys of all blocks before all values
        assert bits(SimpleNamespace(kv_cache=[cache])) < 7.1


def test_of_an_engine_that_has_begun_keys_and_values_are_seen_in_every_layout() -> None:
    values = layer(FP8, used=8, parts=slice(1, 2)).kv_cache
    padded = torch.zeros(1024, *SHAPE[1:], dtype=values.dtype)
    padded[:64] = values
    for cache in (padded, padded.movedim(2, 0).contiguous()):
        assert bits(SimpleNamespace(kv_cache=cache)) < 7.1


@pytest.mark.parametrize(
    "unknown",
    [SimpleNamespace(), SimpleNamespace(kv_cache=[]), SimpleNamespace(kv_cache=torch.empty(0)), layer(used=1)],
)
def test_a_cache_that_is_not_there_or_holds_little_is_not_known(unknown: object) -> None:
    assert code([unknown]) == 0
    assert bits(unknown, layer()) == bits(layer())


def test_requests_for_it_look_at_the_cache_seldom_and_a_cache_that_cannot_be_read_ends_nothing() -> None:
    looks: list[int] = []

    def layers() -> list[object]:
        looks.append(1)
        if len(looks) == 2:
            raise RuntimeError("no such cache")
        return []

    precision, now = KvPrecision(layers), time.monotonic()
    assert [precision.get(now) for _ in range(3)] == [0, 0, 0]
    assert len(looks) == 1
    assert precision.get(now + 2 * MIN_SECONDS) == 0
    assert len(looks) == 2
