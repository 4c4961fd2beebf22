"""Second moments of what linear layers read, and what is derived from them, once for all layers that read the same."""

from __future__ import annotations

from functools import cached_property

import torch

from hemostat_lab.compression.error_compensation import GptqFactor, damped
from hemostat_lab.compression.pruning.compensation import shrunk


class InputMoments:
    """total: Σ x xᵀ [inputs, inputs], each token weighted or not. tokens: the number of vectors x."""

    def __init__(self, total: torch.Tensor, tokens: int) -> None:
        self.total = total
        self.tokens = tokens

    @cached_property
    def damped(self) -> torch.Tensor:
        """`error_compensation.damped`."""
        return damped(self.total)

    @cached_property
    def factor(self) -> GptqFactor:
        """Returns the factor of `damped` that `gptq` needs."""
        return GptqFactor.of(self.damped)

    @cached_property
    def shrunk(self) -> torch.Tensor:
        """`pruning.compensation.shrunk`."""
        return shrunk(self.total, self.tokens)
