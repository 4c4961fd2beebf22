"""The weights that stay take over what the dropped ones did, as far as the layer's inputs allow it.

Minimised is E‖(W' − W) x‖² = tr((W' − W) S (W' − W)ᵀ) with the second moments S = Σ x xᵀ of the layer's inputs, over
the weights that are kept. `pruned_in_blocks` chooses the mask and updates meanwhile (optimal brain surgeon by blocks of
columns: SparseGPT, Frantar & Alistarh 2023, arXiv 2301.00774): an update only reaches columns to the right.
`least_squares` then finds the optimum for the mask, by conjugate gradients (as Meng et al. 2024, arXiv 2406.07831, do).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

DAMPING = 0.01
"""Part of the mean of S's diagonal that is added to the diagonal: keeps W' near W where inputs say little."""
BLOCK = 128
STEPS = 30
"""Of conjugate gradients."""
TOLERANCE = 1e-4
"""Relative size of a residual at which they end."""

Choose = Callable[[torch.Tensor, torch.Tensor, slice], torch.Tensor]
"""Which weights of a block of columns are kept, bool [out, block], from the updated weights [out, block], the diagonal
[block] of the inverse of the second moments of these columns and those to the right, and which columns they are."""


def damped(moments: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """Second moments [in, in] that can be inverted, float32. An input that is always 0 has the damping alone."""
    result = moments.float().clone()
    diagonal = result.diagonal()
    diagonal += max(damping * float(diagonal.mean()), torch.finfo(torch.float32).tiny)
    return result
