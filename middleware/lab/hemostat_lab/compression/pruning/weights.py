"""One linear layer's weight, pruned."""

from __future__ import annotations

import torch

from hemostat_lab.compression.error_compensation import BLOCK, damped
from hemostat_lab.compression.pruning.compensation import compensated, pruned_in_blocks
from hemostat_lab.compression.pruning.masks import Pattern, kept_rows, kept_two_of_four, kept_weights
from hemostat_lab.models.checkpoint_folders import CompressError

ROW_FLOOR = 0.3
"""Each row keeps, in each block, at least this part of what its layer keeps. Without it a row whose gradients vanish
would lose everything, and removing it changes the model: a head whose attention is saturated has no gradient."""


def check_sparsity(sparsity: float, pattern: Pattern) -> None:
    """CompressError in one line where the part of the weights cannot be dropped."""
    if not 0.0 < sparsity < 1.0:
        raise CompressError(f"--sparsity {sparsity:g}: it is the part of the weights that is dropped: above 0, below 1")
    if pattern is Pattern.TWO_OF_FOUR and sparsity != 0.5:
        raise CompressError(f"--sparsity {sparsity:g}: the pattern 2:4 drops one half: give 0.5, or another pattern")


def prune_weight(
    weight: torch.Tensor,
    sparsity: float,
    pattern: Pattern,
    moments: torch.Tensor | None = None,
    gradients: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pruned weight, float32 [out, in], and which entries are kept, bool.

    moments: second moments S of the layer's inputs [in, in], `shrunk`: the score of a weight is w² / [S⁻¹]_jj, as in
    SparseGPT, and the weights that stay make up for those that are dropped. None: the score is w², and they do not.
    gradients: G, of the gradients at the layer's outputs [out, out]: the weights that stay are fitted to what the model
    is sensitive to, and without a pattern the score is multiplied by G_ii. With the pattern `rows`, whole rows are
    dropped: nothing can make up for them in this layer.

    CompressError where the pattern does not fit the shape.

    >>> kept = prune_weight(torch.tensor([[3.0, -1.0], [0.5, 2.0]]), 0.5, Pattern.UNSTRUCTURED)[1]
    >>> kept.tolist()
    [[True, False], [False, True]]
    """
    if pattern is Pattern.TWO_OF_FOUR and weight.shape[1] % 4:
        raise CompressError(
            f"--pattern 2:4: a layer has {weight.shape[1]} inputs, not a multiple of 4: use another one"
        )
    if moments is None or pattern is Pattern.ROWS:
        scores = weight.float().square()
        if pattern is Pattern.ROWS:
            weighted = scores if moments is None else scores * moments.diagonal().float()
            kept = kept_rows(weighted, round(sparsity * len(weight)))
        elif pattern is Pattern.TWO_OF_FOUR:
            kept = kept_two_of_four(scores)
        else:
            kept = kept_weights(scores, round(sparsity * weight.numel()))
        return weight.float() * kept, kept
    second = damped(moments)
    outputs = None if gradients is None else damped(gradients)
    start, kept = pruned_by_blocks(weight, sparsity, pattern, second, outputs)
    return compensated(weight, second, kept, start, outputs), kept


def pruned_by_blocks(
    weight: torch.Tensor, sparsity: float, pattern: Pattern, moments: torch.Tensor, gradients: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`prune_weight` without the last step: updates from left to right only. moments, gradients: `damped`."""
    count = round(sparsity * weight.numel())
    factor, floor = torch.ones(1, 1), 0.0
    if gradients is not None:
        factor, floor = gradients.diagonal().float()[:, None], ROW_FLOOR * (1.0 - sparsity)

    def choose(values: torch.Tensor, own: torch.Tensor, columns: slice) -> torch.Tensor:
        if pattern is Pattern.TWO_OF_FOUR:
            return kept_two_of_four(values.square() / own)
        # The blocks' numbers add up to `count`.
        first, last = (count * column // weight.shape[1] for column in (columns.start, columns.stop))
        return kept_weights(values.square() * factor / own, last - first, int(floor * len(own)))

    return pruned_in_blocks(weight, moments, choose, 4 if pattern is Pattern.TWO_OF_FOUR else BLOCK)
