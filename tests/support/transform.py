"""The plugin's transform on all rows of a batch."""

from __future__ import annotations

import torch

from hemostat_engine.transform import HeldProfile, apply_to_rows


def apply_to_all(held: HeldProfile, logits: torch.Tensor) -> None:
    """Add Δz in place to every row of `logits` [N, V]; how many rows were masked or limited is not returned."""
    counts = torch.zeros(2, dtype=torch.int64)
    apply_to_rows(held, logits, None, counts, on_device=lambda part: torch.tensor(part, dtype=torch.int64))
