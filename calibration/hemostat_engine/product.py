"""The matrix product up y, which dominates the cost of a contextual row: all V × r numbers are read once a step.

The matrix is therefore kept small: columns that are zero in most rows of `up` are stored for the other rows only (the
learner makes such matrices: `narrow`), and on a CPU with bfloat16 instructions it is bfloat16, in oneDNN's packed
order. The rounding error is about 1/500 of Δz, similar to the error of the logits, which vLLM computes in the same way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

Matrix = Callable[[torch.Tensor], torch.Tensor]
"""A matrix as a function: it takes y, float32 [R, n], and returns y times the matrix, float32 [R, m]."""

MIN_PACKED_ELEMENTS = 1 << 20
"""The least number of elements of a matrix that is packed: smaller ones stay in the processor's cache."""
_MAX_COST_RATIO = 0.8
"""The matrix is split only below this share of the full cost: two products and their sum have an overhead."""


@functools.cache
def multiplies_bfloat16() -> bool:
    """Returns True if this processor has bfloat16 instructions (AVX-512 BF16) and oneDNN can use them.

    oneDNN is tried, because a failure later would end vLLM's decoding. An AVX-512 processor without the instructions
    takes five times as long as with float32.
    """
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return supported is not None and bool(supported()) and packs_bfloat16()


def packs_bfloat16() -> bool:
    """Returns True if oneDNN can multiply packed bfloat16 matrices here, at any speed."""
    try:
        result = times_packed(torch.ones(2, 8).bfloat16(), packed(torch.ones(8, 8)))
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return bool((result == 8.0).all())


class Product:
    """The product with `up`, float [V, r], which `on` binds to a device.

    narrow: number of columns that are stored for all ids. wide: number of ids that also have the other columns.
    """

    def __init__(self, up: npt.NDArray[np.floating]) -> None:
        filled = up != 0
        widths = np.where(filled.any(axis=1), up.shape[1] - np.argmax(filled[:, ::-1], axis=1), 0)
        self.narrow, wider = _split(widths, up.shape[1])
        self.wide = int(wider.sum())
        self._ids = np.flatnonzero(wider)
        self._every, self._others = up[:, : self.narrow], up[wider, self.narrow :]

    def on(self, device: torch.device) -> Matrix:
        """Returns the product on the device: y, float32 [R, r] -> y upᵀ, float32 [R, V]. It allocates there only what
        is kept, and takes about 50 ms on a CPU with a vocabulary of 128k.
        """
        every, width = _matrix(self._every, device), self.narrow
        if not self.wide:
            return lambda y: every(y[:, :width])
        others, ids = _matrix(self._others, device), upload(self._ids, device)

        def both(y: torch.Tensor) -> torch.Tensor:
            return every(y[:, :width]).index_add_(1, ids, others(y[:, width:]))

        return both


def _split(widths: npt.NDArray[np.integer], rank: int) -> tuple[int, npt.NDArray[np.bool_]]:
    """Returns the cheapest split: the number of columns for all ids, and which ids also have the others (bool [V])."""
    of_width = np.bincount(widths, minlength=rank + 1)
    wider = len(widths) - np.cumsum(of_width)
    columns = np.arange(rank + 1)
    cost = columns * len(widths) + (rank - columns) * wider
    width = max(1, int(np.argmin(cost)))
    if cost[width] > _MAX_COST_RATIO * rank * len(widths):
        width = rank
    return width, widths > width


def _matrix(values: npt.NDArray[np.floating], device: torch.device) -> Matrix:
    """Returns the matrix as a function. values: float [m, n]."""
    if packs(values.size, device):
        weights = packed(torch.from_numpy(np.array(values)))
        return lambda y: times_packed(y.bfloat16(), weights).float()
    transposed = upload(np.array(values.T, dtype=np.float32, order="C"), device)
    return lambda y: y @ transposed


def upload(values: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    """Returns a copy on the device, complete when this returns. For a thread that is not the engine's."""
    host = torch.from_numpy(values)
    if device.type != "cuda":
        return host.to(device)
    result = torch.empty_like(host, device=device)
    # The memory may have been another profile's, which a kernel that is on its way still reads.
    torch.cuda.synchronize(device)
    result.copy_(host)
    torch.cuda.current_stream(device).synchronize()
    return result


def packs(elements: int, device: torch.device) -> bool:
    """Returns True if a matrix with this many elements is multiplied in bfloat16."""
    return device.type == "cpu" and elements >= MIN_PACKED_ELEMENTS and multiplies_bfloat16()


def packed(values: torch.Tensor) -> torch.Tensor:
    """Returns a matrix [m, n] in bfloat16, in oneDNN's order."""
    result: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(values.bfloat16())
    return result


def times_packed(y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Returns y times the transposed matrix, bfloat16 [R, m]. y: bfloat16 [R, n]; weights: `packed`, of [m, n]."""
    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(y, weights, None, "none", [], "")
    return result
