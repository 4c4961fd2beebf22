"""Tokens that a request asks for, in place of those that would be sampled: canaries decode the same tokens again.

vLLM's raw log-probabilities, the default, are taken before: for a forced token they are the model's own.
"""

from __future__ import annotations

import torch


def force(logits: torch.Tensor, ids: torch.Tensor) -> None:
    """Leaves one token in each row, in place. logits: float [N, V]. ids: int64 [N] on the same device; -1: the row
    stays as it is, as it does where the token is masked (-inf).

    >>> logits = torch.tensor([[1.0, 2.0], [1.0, 2.0], [-torch.inf, 2.0]])
    >>> force(logits, torch.tensor([0, -1, 0]))
    >>> logits.tolist()
    [[1.0, -inf], [1.0, 2.0], [-inf, 2.0]]
    """
    column = ids.clamp(min=0).unsqueeze(1)
    values = logits.gather(1, column)
    logits.masked_fill_((ids >= 0).unsqueeze(1) & (values > -torch.inf), -torch.inf)
    logits.scatter_(1, column, values)


def put(ids: torch.Tensor, tokens: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Returns `ids` with one request's tokens, if only the device knows its rows.

    ids, positions (in the output): int64 [N]. tokens: int64 [F]. rows: bool [N], the request's.

    >>> put(torch.tensor([-1, -1, -1]), torch.tensor([7, 8]), torch.tensor([0, 1, 2]), torch.tensor([True, True, True]))
    tensor([ 7,  8, -1])
    """
    inside = rows & (positions >= 0) & (positions < len(tokens))
    return torch.where(inside, tokens[positions.clamp(0, len(tokens) - 1)], ids)
