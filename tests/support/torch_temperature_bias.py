"""Applies the tests' family to logits, as an engine does; it is registered where this module is imported."""

from __future__ import annotations

import torch
from tests.support.temperature_bias import TEMPERATURE_BIAS

from hemostat_engine import transform


def _shift(parameters: transform.Parameters, logits: torch.Tensor, rows: torch.Tensor | None) -> transform.Shift:
    z = (logits if rows is None else logits.index_select(0, rows)).float()
    masked = ~torch.isfinite(z)
    top = z.masked_fill(masked, -torch.inf).amax(dim=-1, keepdim=True)
    delta = (z - top).mul_(parameters["inverse_temperature"] - 1.0).add_(parameters["bias"])
    return transform.Shift(delta.masked_fill_(masked, 0.0))


transform.FAMILIES[TEMPERATURE_BIAS] = transform.Family(_shift)
