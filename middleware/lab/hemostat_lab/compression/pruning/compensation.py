"""The weights that stay take over what the dropped ones did, as far as the layer's inputs allow it.

`pruned_in_blocks` chooses the mask and updates meanwhile (optimal brain surgeon by blocks of columns: SparseGPT,
Frantar & Alistarh 2023, arXiv 2301.00774): an update only reaches columns to the right, and its error is
E‖(W' − W) x‖² = tr((W' − W) S (W' − W)ᵀ) with the second moments S = Σ x xᵀ of the layer's inputs.

`compensated` then reduces the error for the mask, by conjugate gradients (as Meng et al. 2024, arXiv 2406.07831, do).
With the second moments G = Σ g gᵀ of the gradients at the layer's outputs that error is tr(G (W' − W) S (W' − W)ᵀ),
which is to second order twice the divergence from the dense model, where x and g are independent (K-FAC, Martens &
Grosse 2015, arXiv 1503.05671): outputs to which the model is not sensitive may then change.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from hemostat_lab.compression.error_compensation import BLOCK

STEPS = 10
"""The number of steps of conjugate gradients."""
TOLERANCE = 3e-3
"""Relative size of a residual at which they end."""
_TINY = torch.finfo(torch.float32).tiny

Choose = Callable[[torch.Tensor, torch.Tensor, slice], torch.Tensor]
"""A function that chooses the weights of a group of columns that are kept, bool [out, group]. Its arguments are the
updated weights [out, group], the entries (j, j), [group], of the inverses of the second moments without the columns to
the left of j, and the slice of these columns."""


def shrunk(moments: torch.Tensor, tokens: int) -> torch.Tensor:
    """Second moments [in, in], of `tokens` vectors, whose diagonal is multiplied by 1 + in / tokens.

    Correlations between inputs that are estimated from few tokens are too large, and weights that are fitted to them do
    harm elsewhere: so they are shrunk towards 0 (as Ledoit & Wolf 2004 do for covariances). With few tokens a layer is
    hardly updated, with very many the optimum for the texts is taken.
    """
    result = moments.clone()
    diagonal = result.diagonal()
    diagonal *= 1.0 + len(result) / max(tokens, 1)
    return result


def towards_dense(moments: torch.Tensor, gap: torch.Tensor) -> torch.Tensor:
    """The M, float32 [in, in], with which (W + W M) x̂ is next to W x, of any W: (Σ (x − x̂) x̂ᵀ) S⁻¹.

    moments: S = Σ x̂ x̂ᵀ, `damped` and `shrunk`, so that few tokens change little. gap: Σ (x − x̂) x̂ᵀ.
    """
    return torch.cholesky_solve(gap.T, torch.linalg.cholesky(moments)).T.float()


def pruned_in_blocks(
    weight: torch.Tensor, moments: torch.Tensor, choose: Choose, columns_at_once: int = BLOCK
) -> tuple[torch.Tensor, torch.Tensor]:
    """The updated weight, float32 [out, in], and which entries are kept, bool. moments: `damped`. columns_at_once: for
    which `choose` is called, once for each such group, from left to right; a divisor of `BLOCK`.

    U is the upper Cholesky factor of S⁻¹: row j of it says how the columns to the right make up for an error in column
    j, and U_jj² is the entry (j, j) of the inverse of S without the columns to the left.
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    # Columns as rows: each is read and written in one piece.
    left = weight.float().T.clone(memory_format=torch.contiguous_format)
    kept = torch.ones_like(left, dtype=torch.bool)
    for first in range(0, len(left), BLOCK):
        end = min(first + BLOCK, len(left))
        errors = torch.empty_like(left[first:end])
        for j in range(first, end):
            if (j - first) % columns_at_once == 0:
                group = slice(j, min(j + columns_at_once, end))
                kept[group] = choose(left[group].T, upper.diagonal()[group].square(), group).T
            errors[j - first] = torch.where(kept[j], 0.0, left[j] / upper[j, j])
            left[j:end] -= upper[j, j:end, None] * errors[j - first]
        left[first:end] *= kept[first:end]
        left[end:] -= upper[first:end, end:].T @ errors
    return left.T, kept.T


def compensated(
    weight: torch.Tensor,
    moments: torch.Tensor,
    kept: torch.Tensor,
    start: torch.Tensor,
    gradients: torch.Tensor | None = None,
    steps: int = STEPS,
) -> torch.Tensor:
    """The W', float32 [out, in], zero outside of `kept`, with a small tr(G (W' − W) S (W' − W)ᵀ), from `start`.

    moments: S, `damped`. gradients: G, `damped`; None: the identity, so that each row is a problem of its own.

    Conjugate gradients with S⁻¹ and the diagonal of G as preconditioner; the error never rises, whatever the number of
    steps.
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments.double())).float()
    moments = moments.float()
    outputs = None if gradients is None else gradients.float()
    scale = torch.ones(1, 1) if outputs is None else outputs.diagonal()[:, None]

    def image(change: torch.Tensor) -> torch.Tensor:
        product = change @ moments
        return (product if outputs is None else outputs @ product) * kept

    def product(vector: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Returns the scalar product for each problem: [out, 1], or one number with gradients."""
        products = torch.linalg.vecdot(vector, other)
        return products[:, None] if outputs is None else products.sum()

    current = start.float() * kept
    residual = image(weight.float() - current)
    preconditioned = (residual / scale) @ inverse * kept
    direction = preconditioned
    size = first = product(residual, preconditioned)
    for _ in range(steps):
        if bool((size <= TOLERANCE**2 * first).all()):
            break
        imaged = image(direction)
        step = size / product(direction, imaged).clamp_min(_TINY)
        current += step * direction
        residual -= step * imaged
        preconditioned = (residual / scale) @ inverse * kept
        following = product(residual, preconditioned)
        direction = preconditioned + (following / size.clamp_min(_TINY)) * direction
        size = following
    return current
