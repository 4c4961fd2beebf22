"""Which ids a grammar allows, as the engine's plugin says it."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from hemostat.engines.messages import TapRun


def packed(mask: np.ndarray) -> np.ndarray:
    """The rows of `mask`, bool [T, V], as vLLM's bitmask: int32 [T, ceil(V / 32)]."""
    padded = np.zeros((len(mask), -(-mask.shape[1] // 32) * 32), np.uint8)
    padded[:, : mask.shape[1]] = mask
    return np.packbits(padded, axis=1, bitorder="little").view(np.int32)


def restricted_run(nonce: str, mask: np.ndarray, start: int = 0, **more: Any) -> TapRun:
    """The tap of len(mask) positions, each with a set of its own: those of `mask`."""
    given: dict[str, Any] = {
        "set_rows": np.arange(len(mask), dtype="<i4").tobytes(),
        "sets": zlib.compress(packed(mask).astype("<i4").tobytes()),
    }
    return TapRun(nonce, start, len(mask), {}, None, **given | more)
