"""A calibration profile: what is added to the compressed model's logits, frozen, versioned by its own digest."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

VERSION_PATTERN = re.compile(r"[0-9a-f]{32}")
"""A version is the first 32 hex digits of the SHA-256 of the profile's bytes: it can name a file or a URL safely."""

IDENTITY = "identity"
"""Family and version of what serves when no profile does."""


@dataclass(frozen=True, slots=True)
class CalibrationProfile:
    """Parameters of one calibration family.

    family: "temperature_bias" today; the contextual family registers beside it (transform.py).
    model: name or digest of the compressed model that it was learned for ("" fits any with that vocabulary).
    vocab_size: V.
    parameters: named float32 arrays; for "temperature_bias": `inverse_temperature` [] and `bias` [V] in nats.
    clamp_nats: every |Δz| is at most this.
    metadata: strings for people (when, on how many tokens); not used in computing.
    """

    family: str
    model: str
    vocab_size: int
    parameters: Mapping[str, npt.NDArray[np.float32]]
    clamp_nats: float
    metadata: Mapping[str, str]

    @property
    def version(self) -> str:
        """First 32 hex digits of the SHA-256 of `to_bytes()`."""
        raise NotImplementedError

    def to_bytes(self) -> bytes:
        """Canonical safetensors bytes: the same profile gives the same bytes."""
        raise NotImplementedError

    @classmethod
    def from_bytes(cls, data: bytes, version: str | None = None) -> CalibrationProfile:
        """Parse and check; raise InvalidProfileError when malformed or when its digest is not `version`."""
        raise NotImplementedError
