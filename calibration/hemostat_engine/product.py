"""up y, the product that a contextual row costs: of its V × r numbers every one is read from memory once a step.

So it is kept as small as the processor can make use of: rows of `up` that end in zeros are cut short (the learner makes
them so: `narrow`), and where the processor multiplies bfloat16, it is bfloat16, in the order in which oneDNN
reads it. What that rounds off is a 500th of Δz, of the size of the rounding of the logits themselves, which vLLM
computes in the same way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

Matrix = Callable[[torch.Tensor], torch.Tensor]
"""y, float32 [R, n] -> y times it, float32 [R, m]."""

PACKED_FROM = 1 << 20
"""Numbers. Less than that stays in the processor's cache."""
_WORTH = 0.8
"""Two products instead of one, and adding them up, cost something too."""


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for it (AVX-512 BF16) and oneDNN uses them: tried, since vLLM's decoding
    must not end for want of it. An AVX-512 processor without them takes five times as long as with float32."""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return supported is not None and bool(supported()) and packs_bfloat16()


def packs_bfloat16() -> bool:
    """Whether oneDNN can, however slowly."""
    try:
        found = _times(torch.ones(2, 8), _packed(torch.ones(8, 8)))
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return bool((found == 8.0).all())


class Product:
    """up: float [V, r]. Bound to a device by `on`.

    narrow: how many columns every id has; wide: how many ids have the others too.
    """

    def __init__(self, up: npt.NDArray[np.floating]) -> None:
        filled = up != 0
        widths = np.where(filled.any(axis=1), up.shape[1] - np.argmax(filled[:, ::-1], axis=1), 0)
        self.narrow, wider = _cut(widths, up.shape[1])
        self.wide = int(wider.sum())
        self._ids = torch.from_numpy(np.flatnonzero(wider))
        self._every = torch.from_numpy(np.array(up[:, : self.narrow]))
        self._others = torch.from_numpy(np.array(up[wider, self.narrow :]))

    def on(self, device: torch.device) -> Matrix:
        """y, float32 [R, r] -> y upᵀ, float32 [R, V], both on the device. To make it takes some 50 ms on a CPU, with a
        vocabulary of 128k: once a profile."""
        every, width = _matrix(self._every, device), self.narrow
        if not self.wide:
            return lambda y: every(y[:, :width])
        others, ids = _matrix(self._others, device), self._ids.to(device)

        def both(y: torch.Tensor) -> torch.Tensor:
            return every(y[:, :width]).index_add_(1, ids, others(y[:, width:]))

        return both


def _cut(widths: npt.NDArray[np.integer], rank: int) -> tuple[int, npt.NDArray[np.bool_]]:
    """Where to cut: how many columns all ids have, and which ids have the others too."""
    of_width = np.bincount(widths, minlength=rank + 1)
    wider = len(widths) - np.cumsum(of_width)
    columns = np.arange(rank + 1)
    cost = columns * len(widths) + (rank - columns) * wider
    width = max(1, int(np.argmin(cost)))
    if cost[width] > _WORTH * rank * len(widths):
        width = rank
    return width, widths > width


def _matrix(values: torch.Tensor, device: torch.device) -> Matrix:
    """values: float [m, n] on the host."""
    if packs(values.numel(), device):
        packed = _packed(values)
        return lambda y: _times(y, packed)
    transposed = values.to(device).float().T.contiguous()
    return lambda y: y @ transposed


def packs(numbers: int, device: torch.device) -> bool:
    """Whether a matrix of so many is multiplied in bfloat16."""
    return device.type == "cpu" and numbers >= PACKED_FROM and multiplies_bfloat16()


def _packed(values: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(values.bfloat16())
    return found


def _times(y: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(y.bfloat16(), packed, None, "none", [], "")
    return found.float()
