"""Hemostat's logits processor, as vLLM loads it; one profile raises when it is applied, whichever has RAISING_CLAMP."""

from __future__ import annotations

from typing import Any

import torch

from hemostat_engine import LogitsProcessor
from hemostat_engine.transform import HeldProfile, Shift

RAISING_CLAMP = 13.0
"""Its `clamp_nats`."""

_shift = HeldProfile.shift


def _raising(held: HeldProfile, *arguments: Any) -> Shift:
    if held.clamp_nats == RAISING_CLAMP:
        raise torch.OutOfMemoryError("injected")
    return _shift(held, *arguments)


HeldProfile.shift = _raising  # type: ignore[method-assign]

__all__ = ["RAISING_CLAMP", "LogitsProcessor"]
