"""How finely the KV cache holds its values: a cast that nobody asked for leaves few distinct ones."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

SAMPLE = 32_768
"""Values of each layer that are looked at."""
FIRST = 1 << 19
PIECES, PIECE = 64, 4_096
"""They are taken from the cache's first values, which an engine uses first, and from pieces all over it."""
STEPS_PER_BIT = 10


def code(layers: Iterable[Any]) -> int:
    """STEPS_PER_BIT · log2 of the number of distinct values among SAMPLE that are not 0, of the layer with the fewest;
    0 where no layer holds so many. layers: vLLM's attention layers."""
    counts = [count for layer in layers if (count := _distinct(getattr(layer, "kv_cache", None)))]
    return round(STEPS_PER_BIT * math.log2(min(counts))) if counts else 0


def _distinct(cache: Any) -> int:
    if isinstance(cache, list):
        cache = cache[0] if cache else None
    if not isinstance(cache, torch.Tensor) or not cache.numel() or cache.device.type == "meta":
        return 0
    # The memory as it is: layouts differ between attention backends.
    flat = torch.empty(0, dtype=cache.dtype, device=cache.device).set_(cache.untyped_storage())
    bits = flat.view({1: torch.uint8, 2: torch.int16}.get(flat.element_size(), torch.int32))
    pieces = [bits[begin : begin + PIECE] for begin in range(0, len(bits), max(len(bits) // PIECES, PIECE))]
    values = torch.cat([bits[:FIRST], *pieces])
    values = values[values != 0]
    if len(values) < SAMPLE:
        return 0
    return len(values[:: len(values) // SAMPLE][:SAMPLE].unique())
