"""What a profile does to whole rows of logits, in numpy: the reference that the engine's torch transform is tested
against. It follows from the definition of the family alone and takes no care of speed."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from hemostat_calibration.arrays import Floats
from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.profiles.families import FAMILIES
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_calibration.profiles.transform import (
    anchors,
    anchors_digest,
    code,
    max_shift,
    relative_logits,
    shift_at,
)

__all__ = ["anchors", "anchors_digest", "apply", "code", "max_shift", "shift", "shift_at"]


def shift(profile: CalibrationProfile, logits: npt.NDArray[np.floating]) -> Floats:
    """Δz, float64 [..., V] in nats, of logits [..., V] (or log-probabilities, natural)."""
    if logits.ndim < 1 or logits.shape[-1] != profile.vocab_size:
        raise InvalidArgumentError(f"logits has shape {logits.shape}: its last axis must be {profile.vocab_size}")
    finite = np.isfinite(logits)
    relative = relative_logits(logits, finite)
    ids = anchors(profile)
    said = None if ids is None else code(profile, logits[..., ids])
    raw = FAMILIES[profile.family].shift(profile.parameters, relative, None, said)
    return np.where(finite, np.clip(raw, -profile.clamp_nats, profile.clamp_nats), 0.0)


def apply(profile: CalibrationProfile, logits: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """z + Δz, [..., V] in the dtype of `logits`; entries that are not finite are untouched."""
    return (logits + shift(profile, logits)).astype(logits.dtype)
