"""Which weights of one layer are kept.

Every score is w² · f with a factor f that does not depend on the weight: so a weight that was updated meanwhile is
scored again without data. f is 1 for magnitude, Σ x_j² for Wanda (Sun et al. 2023, arXiv 2306.11695), (Σ |g_i x_j|)²
for the first-order and Σ g_i² x_j² for the second-order Taylor score (Molchanov et al. 2019, arXiv 1906.10771), with
the inputs x of the layer and the gradients g at its outputs, summed over tokens.
"""

from __future__ import annotations

from enum import StrEnum

import torch


class Score(StrEnum):
    """What says how much a weight matters."""

    MAGNITUDE = "magnitude"
    WANDA = "wanda"
    TAYLOR = "taylor"
    FISHER = "fisher"


class Pattern(StrEnum):
    """Which weights can be dropped together."""

    UNSTRUCTURED = "unstructured"
    TWO_OF_FOUR = "2:4"
    """Two of each four consecutive inputs are kept, as sparse tensor cores want it."""
    ROWS = "rows"
    """Whole neurons of MLPs and heads of attention."""


def kept_weights(scores: torch.Tensor, zeros: int, by_row: bool = False) -> torch.Tensor:
    """Bool [out, in], False for the `zeros` least scores [out, in], exactly.

    by_row: every output loses the same number, at most one more than another, as Wanda has it.

    >>> kept_weights(torch.tensor([[1.0, 5.0], [2.0, 3.0]]), 2).tolist()
    [[False, True], [False, True]]
    """
    kept = torch.ones(scores.shape, dtype=torch.bool, device=scores.device)
    if by_row:
        each, more = divmod(zeros, len(scores))
        order = scores.argsort(dim=1, stable=True)
        kept.scatter_(1, order[:, :each], False)
        if more:
            following = order[:, each : each + 1]
            rows = scores.gather(1, following)[:, 0].argsort(stable=True)[:more]
            kept[rows, following[rows, 0]] = False
        return kept
    kept.view(-1)[scores.flatten().argsort(stable=True)[:zeros]] = False
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


def comparable_scores(weight: torch.Tensor, factor: torch.Tensor, score: Score) -> torch.Tensor:
    """Scores [out, in] in the unit in which layers are compared: w² · f for the second-order score, which is a rise of
    the divergence; the square root for the others, which are linear in the weight."""
    scores = weight.float().square() * factor
    return scores if score is Score.FISHER else scores.sqrt()


def kept_share(scores: torch.Tensor, kept: torch.Tensor) -> float:
    """The part of the sum of `comparable_scores` that the kept weights have; 1 where all are 0."""
    total = float(scores.sum(dtype=torch.float64))
    return float(scores[kept].sum(dtype=torch.float64)) / total if total > 0.0 else 1.0
