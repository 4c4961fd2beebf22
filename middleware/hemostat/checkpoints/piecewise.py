"""A causal language model of transformers that reads texts piece by piece, and keeps its state in between. Torch.

The state is a KV cache, or the recurrent state of a state-space model.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from hemostat.checkpoints.architectures import is_recurrent
from hemostat_calibration.errors import HemostatError

STATE_NAMES = ("cache", "past_key_values", "cache_params")
"""Names under which models take their state and return it: all of them from transformers 5.24 on, KV caches before,
Mamba's state before."""


class StatelessModelError(HemostatError):
    """The model returns no state, so it cannot continue a text."""


class PiecewiseReader:
    """Reads a batch of texts piece by piece.

    A recurrent model reads every piece after the first one token by token: transformers' Mamba starts a piece of
    several tokens from an empty state.
    """

    def __init__(self, model: Any, *, keep_state: bool = True) -> None:
        """keep_state: False where a single piece is read, to save the memory of the state."""
        self._model = model
        self._takes = inspect.signature(model.forward).parameters
        self._keep_state = keep_state
        self._state: dict[str, Any] = {}
        """The state that the next call gets, by the name of the argument; empty before the first piece."""

    def read(self, ids: torch.Tensor, keep: int | None = None, **arguments: Any) -> torch.Tensor:
        """Logits [B, keep, V] at the last `keep` positions of the next piece, ids [B, T]; None: at all T.

        arguments: further ones of the model's `forward`, such as a mask; those that it does not have are left out.
        Raises StatelessModelError before the second piece of a model without a state.
        """
        length = ids.shape[1]
        keep = length if keep is None else keep
        further = {name: value for name, value in arguments.items() if name in self._takes}
        if self._state and length > 1 and is_recurrent(self._model):
            steps = [self._call(ids[:, t : t + 1], 1, further) for t in range(length)]
            return torch.cat(steps[length - keep :], dim=1)
        return self._call(ids, keep, further)

    def _call(self, ids: torch.Tensor, keep: int, arguments: dict[str, Any]) -> torch.Tensor:
        # Without `logits_to_keep` the model computes the logits of all positions.
        limited = {"logits_to_keep": keep} if "logits_to_keep" in self._takes else {}
        answer = self._model(input_ids=ids, use_cache=self._keep_state, **limited, **self._state, **arguments)
        if self._keep_state:
            self._state = self._state_of(answer)
        logits: torch.Tensor = answer.logits[:, -keep:]
        return logits

    def _state_of(self, answer: Any) -> dict[str, Any]:
        for name in STATE_NAMES:
            if name in self._takes and (state := getattr(answer, name, None)) is not None:
                return {name: state}
        raise StatelessModelError(f"{type(self._model).__name__} keeps no state between calls (such as a KV cache)")
