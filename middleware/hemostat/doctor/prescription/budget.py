"""The budget of bytes, from the command line or from COMPRESSED."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hemostat.doctor.options import DoctorError, parse_budget
from hemostat.models.checkpoint import Checkpoint


def budget_bytes(given: str | None, dense: int, compressed: Path, layers: Sequence[str]) -> int:
    """Bytes for the linear layers `layers`; None: as many as COMPRESSED stores. dense: of them at 16 bits.

    Raises DoctorError where COMPRESSED stores them dense, so that its size is no budget, and AdaptError.
    """
    if given is not None:
        value = parse_budget(given)
        return round(value * dense) if value <= 1.0 else int(value)
    checkpoint = Checkpoint(compressed, "COMPRESSED")
    if not all(checkpoint.is_quantized(name) for name in layers):
        raise DoctorError(
            "--budget: not all layers of COMPRESSED are stored quantized, so that its size is no budget; give a number "
            "of bytes, or a share of REFERENCE's"
        )
    return sum(checkpoint.stored_bytes(name) for name in layers)
