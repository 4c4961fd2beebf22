"""The choice of the weights of one layer that are kept."""

from __future__ import annotations

from enum import StrEnum

import torch


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
