"""What a client may send, and how long it may take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes in bytes, times in seconds."""

    head_bytes: int = 64 * 1024
    header_count: int = 128
    body_bytes: int = 256 * 1024 * 1024
    head_seconds: float = 30.0
    """From the first byte of a head to its last."""
    body_seconds: float = 60.0
    """Between two reads of an incomplete body."""
    idle_seconds: float = 75.0
    """Between two requests of one connection."""
