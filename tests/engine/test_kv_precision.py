"""How many distinct values a KV cache holds, whatever its layout and dtype."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from hemostat_engine.kv_precision import SAMPLE, STEPS_PER_BIT, code

SHAPE = (64, 3, 32, 128)


def layer(cast: torch.dtype | None = None, dtype: torch.dtype = torch.bfloat16, used: int = 64) -> SimpleNamespace:
    """Of a cache whose first blocks are in use."""
    values = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(cast or dtype).to(dtype)
    values[used:] = 0
    return SimpleNamespace(kv_cache=values)


def bits(*layers: object) -> float:
    return code(layers) / STEPS_PER_BIT


def test_a_cast_leaves_few_values_in_every_dtype() -> None:
    assert bits(layer()) > 10.5
    assert bits(layer(dtype=torch.float32)) > 14.5
    for cast in (torch.float8_e4m3fn, torch.float8_e5m2):
        assert 5.0 < bits(layer(cast)) < 8.0
        assert bits(layer(cast)) == bits(layer(dtype=cast))
    assert bits(layer(torch.float8_e4m3fn, torch.float32)) < 8.0


def test_the_layer_with_the_fewest_counts_and_layouts_do_not() -> None:
    assert bits(layer(), layer(torch.float8_e4m3fn), layer()) == bits(layer(torch.float8_e4m3fn))
    turned = SimpleNamespace(kv_cache=[layer().kv_cache.permute(1, 0, 3, 2)])
    assert bits(turned) == bits(layer())


@pytest.mark.parametrize(
    "unknown",
    [SimpleNamespace(), SimpleNamespace(kv_cache=[]), SimpleNamespace(kv_cache=torch.empty(0)), layer(used=1)],
)
def test_a_cache_that_is_not_there_or_holds_little_is_not_known(unknown: object) -> None:
    assert layer(used=1).kv_cache.count_nonzero() < SAMPLE
    assert code([unknown]) == 0
    assert bits(unknown, layer()) == bits(layer())
