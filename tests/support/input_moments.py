"""Second moments of a layer's inputs as a prescription takes them."""

from __future__ import annotations

from typing import Any

from hemostat.models.compression.input_moments import InputMoments
from hemostat.models.compression.pruning.compensation import shrunk


def input_moments_of(rows: Any) -> InputMoments:
    """rows: a tensor [tokens, inputs]."""
    return InputMoments(shrunk((rows.T @ rows).double(), len(rows)), len(rows))
