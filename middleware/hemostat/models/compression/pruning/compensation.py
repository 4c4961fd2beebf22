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
_TINY = torch.finfo(torch.float32).tiny

Choose = Callable[[torch.Tensor, torch.Tensor, slice], torch.Tensor]
"""Which weights of a block of columns are kept, bool [out, block], from the updated weights [out, block], the diagonal
[block] of the inverse of the second moments of these columns and those to the right, and which columns they are."""


def damped(moments: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """Second moments [in, in] that can be inverted, float32. An input that is always 0 has the damping alone."""
    result = moments.float().clone()
    diagonal = result.diagonal()
    diagonal += max(damping * float(diagonal.mean()), _TINY)
    return result


def pruned_in_blocks(
    weight: torch.Tensor, moments: torch.Tensor, choose: Choose, block: int = BLOCK
) -> tuple[torch.Tensor, torch.Tensor]:
    """The updated weight, float32 [out, in], and which entries are kept, bool. moments: `damped`.

    U is the upper Cholesky factor of S⁻¹: row j of it says how the columns to the right make up for an error in column
    j, and U_jj² is the entry (j, j) of the inverse of S without the columns to the left.
    """
    current = weight.float().clone()
    kept = torch.ones_like(current, dtype=torch.bool)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments))
    upper = torch.linalg.cholesky(inverse, upper=True)
    for first in range(0, current.shape[1], block):
        columns = slice(first, min(first + block, current.shape[1]))
        own = upper[columns, columns]
        values = current[:, columns]
        mask = choose(values, own.diagonal().square(), columns)
        errors = torch.zeros_like(values)
        for j in range(values.shape[1]):
            before = values[:, j].clone()
            errors[:, j] = torch.where(mask[:, j], 0.0, before / own[j, j])
            values[:, j:] -= errors[:, j, None] * own[j, j:]
        values *= mask
        kept[:, columns] = mask
        current[:, columns.stop :] -= errors @ upper[columns, columns.stop :]
    return current, kept


def least_squares(
    weight: torch.Tensor, moments: torch.Tensor, kept: torch.Tensor, start: torch.Tensor, steps: int = STEPS
) -> torch.Tensor:
    """The W', float32 [out, in], zero outside of `kept`, with the least tr((W' − W) S (W' − W)ᵀ), from `start`.

    moments: S, `damped`. Conjugate gradients for all rows at the same time, each row a problem of its own, with the
    diagonal as preconditioner; the error never rises, whatever the number of steps.
    """
    current = start.float() * kept
    scale = 1.0 / moments.diagonal()
    residual = ((weight.float() - current) @ moments) * kept
    direction = residual * scale
    size = first = (residual * direction).sum(1)
    for _ in range(steps):
        if bool((size <= TOLERANCE**2 * first).all()):
            break
        image = (direction @ moments) * kept
        step = size / (direction * image).sum(1).clamp_min(_TINY)
        current += step[:, None] * direction
        residual -= step[:, None] * image
        preconditioned = residual * scale
        following = (residual * preconditioned).sum(1)
        direction = preconditioned + (following / size.clamp_min(_TINY))[:, None] * direction
        size = following
    return current
