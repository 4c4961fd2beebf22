"""One linear layer's weight, pruned: which of its weights are kept, and what they become."""

from __future__ import annotations

from enum import StrEnum

import torch

from hemostat_lab.compression.error_compensation import BLOCK, damped
from hemostat_lab.compression.pruning.compensation import compensated, pruned_in_blocks
from hemostat_lab.models.checkpoint_folders import CompressError


class Pattern(StrEnum):
    """The sets of weights that can be dropped together."""

    UNSTRUCTURED = "unstructured"
    TWO_OF_FOUR = "2:4"
    """Two of each four consecutive inputs are kept, as sparse tensor cores want it."""
    ROWS = "rows"
    """Whole neurons of MLPs and heads of attention."""


def kept_weights(scores: torch.Tensor, zeros: int, floor: int = 0) -> torch.Tensor:
    """Bool [out, in], False for the `zeros` least scores [out, in], exactly.

    floor: each row keeps at least its so many best: zeros is at most out · (in − floor).

    >>> kept_weights(torch.tensor([[1.0, 2.0], [3.0, 5.0]]), 2).tolist()
    [[False, False], [True, True]]
    >>> kept_weights(torch.tensor([[1.0, 2.0], [3.0, 5.0]]), 2, floor=1).tolist()
    [[False, True], [False, True]]
    """
    if floor:
        scores = scores.scatter(1, scores.topk(floor, dim=1).indices, torch.inf)
    kept = torch.ones(scores.shape, dtype=torch.bool, device=scores.device)
    kept.view(-1)[scores.flatten().topk(zeros, largest=False, sorted=False).indices] = False
    return kept


def kept_two_of_four(scores: torch.Tensor) -> torch.Tensor:
    """Bool [out, in]: of each four consecutive inputs the two with the largest scores [out, in].

    >>> kept_two_of_four(torch.tensor([[1.0, 5.0, 2.0, 3.0]])).tolist()
    [[False, True, False, True]]
    """
    groups = scores.unflatten(1, (-1, 4))
    kept = torch.zeros_like(groups, dtype=torch.bool)
    return kept.scatter_(-1, groups.argsort(dim=-1, stable=True)[..., 2:], True).flatten(1)


def kept_rows(scores: torch.Tensor, rows: int) -> torch.Tensor:
    """Bool [out, in], False in the `rows` rows whose scores [out, in] have the least sums."""
    kept = torch.ones(scores.shape, dtype=torch.bool, device=scores.device)
    kept[scores.sum(1).argsort(stable=True)[:rows]] = False
    return kept


def kept_share(scores: torch.Tensor, kept: torch.Tensor) -> float:
    """The part of the sum of the scores that the kept weights have; 1 where all are 0."""
    total = float(scores.sum(dtype=torch.float64))
    return float(scores[kept].sum(dtype=torch.float64)) / total if total > 0.0 else 1.0


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
