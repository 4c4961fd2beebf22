"""The axes of a sweep (`hemostat doctor --sweep`)."""

from __future__ import annotations

from enum import StrEnum


class Axis(StrEnum):
    BITS = "bits"
    SPARSITY = "sparsity"
    STRUCTURE = "structure"
    DECODING = "decoding"
    COMBINATIONS = "combinations"
