"""One linear layer's weight, pruned."""

from __future__ import annotations

import torch

from hemostat.compression.error_compensation import BLOCK, damped
from hemostat.compression.pruning.compensation import least_squares, pruned_in_blocks
from hemostat.compression.pruning.masks import Pattern, kept_rows, kept_two_of_four, kept_weights
from hemostat.models.checkpoint_folders import CompressError


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
    factor: torch.Tensor | None = None,
    moments: torch.Tensor | None = None,
    *,
    zeros: int | None = None,
    by_row: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pruned weight, float32 [out, in], and which entries are kept, bool. The score of a weight is w² · factor.

    factor: [out, in] or what broadcasts to it; None: 1, which is magnitude. moments: second moments of the layer's
    inputs [in, in], `shrunk`: the weights that stay make up for those that are dropped. zeros: their number, in place
    of `sparsity`. by_row: without moments, the same number in each row. With the pattern `rows`, whole rows are
    dropped: nothing can make up for them in this layer.

    With moments, a score is multiplied by the part of its input that the other inputs cannot make up for,
    1 / (S_jj [S⁻¹]_jj): Wanda's score then is that of SparseGPT, w² / [S⁻¹]_jj.

    CompressError where the pattern does not fit the shape.

    >>> kept = prune_weight(torch.tensor([[3.0, -1.0], [0.5, 2.0]]), 0.5, Pattern.UNSTRUCTURED)[1]
    >>> kept.tolist()
    [[True, False], [False, True]]
    """
    count = round(sparsity * weight.numel()) if zeros is None else zeros
    factor = torch.ones(1, 1) if factor is None else factor
    scores = weight.float().square() * factor
    if pattern is Pattern.ROWS:
        kept = kept_rows(scores, round(sparsity * len(weight)))
        return weight.float() * kept, kept
    if pattern is Pattern.TWO_OF_FOUR and weight.shape[1] % 4:
        raise CompressError(
            f"--pattern 2:4: a layer has {weight.shape[1]} inputs, not a multiple of 4: use another one"
        )
    if moments is None:
        kept = kept_two_of_four(scores) if pattern is Pattern.TWO_OF_FOUR else kept_weights(scores, count, by_row)
        return weight.float() * kept, kept
    second = damped(moments)
    factors = factor.expand_as(weight) / second.diagonal().float()

    def choose(values: torch.Tensor, own: torch.Tensor, columns: slice) -> torch.Tensor:
        found = values.square() * factors[:, columns] / own
        if pattern is Pattern.TWO_OF_FOUR:
            return kept_two_of_four(found)
        # The blocks' numbers add up to `count`.
        ends = [count * column // weight.shape[1] for column in (columns.start, columns.stop)]
        return kept_weights(found, ends[1] - ends[0])

    start, kept = pruned_in_blocks(weight, second, choose, 4 if pattern is Pattern.TWO_OF_FOUR else BLOCK)
    return least_squares(weight, second, kept, start), kept
