"""Measures how finely the KV cache holds its values: a cast that nobody asked for leaves few distinct ones."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from hemostat_engine.retries import first_line

log = logging.getLogger("hemostat.engine")

MIN_SECONDS = 5.0
"""The least time between two looks at the KV cache."""
RUN = 1_024
"""The number of values that lie behind each other in memory: keys or values, whatever the layout, which differs between
backends."""
REGION = 512
"""The number of runs of each place that is looked at: the cache's beginning and its middle, where an engine begins to
use it, and runs all over it."""
USED = 0.75
"""The share of the values of a run that are not 0, which small values are after a cast."""
RUNS = 128
"""The number of runs of values that are read in each layer. A layer with fewer than half of them in use is left out."""
LOWEST = 0.1
"""The share of the runs that are below the one that counts: where keys alone were cast, half of them are."""
STEPS_PER_BIT = 10


class KvPrecision:
    """Owns the last `code` of the layers. It is computed seldom, so that frequent requests for it do not slow others
    down. layers: returns vLLM's attention layers."""

    def __init__(self, layers: Callable[[], Iterable[Any]]) -> None:
        self._layers = layers
        self._code, self._looked_at = 0, -math.inf

    def get(self, now: float) -> int:
        """Returns `code` of the layers. now: monotonic seconds."""
        if now - self._looked_at >= MIN_SECONDS:
            try:
                self._code = code(self._layers())
            except Exception as error:  # noqa: BLE001 - whatever a cache looks like, vLLM goes on
                log.error("the KV cache cannot be read: %s: %s", type(error).__name__, first_line(str(error)))
            self._looked_at = time.monotonic()
        return self._code


def code(layers: Iterable[Any]) -> int:
    """Returns STEPS_PER_BIT · log2 of the number of distinct values in a run, of the layer with the fewest; 0 where no
    layer holds enough. layers: vLLM's attention layers."""
    counts = [count for layer in layers if (count := _distinct(getattr(layer, "kv_cache", None)))]
    return round(STEPS_PER_BIT * math.log2(min(counts))) if counts else 0


def _distinct(cache: Any) -> int:
    if isinstance(cache, list):
        cache = cache[0] if cache else None
    if not isinstance(cache, torch.Tensor) or cache.numel() < RUN or cache.device.type == "meta":
        return 0
    flat = torch.empty(0, dtype=cache.dtype, device=cache.device).set_(cache.untyped_storage())
    bits = flat.view({1: torch.uint8, 2: torch.int16}.get(flat.element_size(), torch.int32))
    every = bits[: len(bits) // RUN * RUN].view(-1, RUN)
    middle = len(every) // 2
    chosen = torch.cat([every[:REGION], every[middle : middle + REGION], _drawn(every, REGION)])
    runs = chosen[(chosen != 0).float().mean(1) >= USED]
    if len(runs) < RUNS // 2:
        return 0
    ordered = _drawn(runs, RUNS).sort(1).values
    distinct = (ordered[:, 1:] != ordered[:, :-1]).sum(1) + 1
    return int(distinct.sort().values[int(LOWEST * len(distinct))])


def _drawn(runs: torch.Tensor, count: int) -> torch.Tensor:
    """Returns runs that are drawn at random, the same ones for the same number of runs. At regular steps they could be
    of keys alone, which lie between values at regular steps."""
    places = torch.randint(len(runs), (count,), generator=torch.Generator().manual_seed(0), device="cpu")
    return runs[places.to(runs.device)]
