"""The rules in the life of a profile that depend on its family. A new family needs an entry in `FAMILY_RULES`.

(What a family computes is declared in `hemostat_calibration.profiles.families`; who learns it, in `proposals`.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hemostat_calibration.divergence.gain import Gain
from hemostat_calibration.profiles.contextual import NO_KL_LIMIT
from hemostat_calibration.profiles.families import ADAPTER, CONTEXTUAL, TEMPERATURE_BIAS
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_calibration.profiles.transform import anchors, anchors_digest
from hemostat_calibration.records import TokenRecord

Floats = npt.NDArray[np.float64]

MAX_IDENTITY_NORMALIZER_NATS = 1e-4
"""A row's log-normalizer is within this of 0 where the engine applied nothing to the row."""


@dataclass(frozen=True, slots=True)
class FamilyRules:
    """The rules of one family.

    queue_priority: candidates with a lower number are tested first. kl_limit: (profile) -> the largest KL from identity
    that it enforces, nats; None if it enforces none.

    token_gains: (record, profile, gain, normalizer float64 [T], NaN where the engine gave none) -> lower and upper ends
    of the gain at the tokens that are evidence, [S] each with S ≤ T; None if no token is. For an adapter it is always
    None: what an adapter does to the weights does not follow from a record of the compressed model. Its evidence, and
    the evidence of whatever is compared with it, is the total variation in `TokenRecord.distances`
    (`hemostat_calibration.guard.decisions.Figure`).
    """

    queue_priority: int
    kl_limit: Callable[[CalibrationProfile], float | None]
    token_gains: Callable[[TokenRecord, CalibrationProfile, Gain, Floats], tuple[Floats, Floats] | None]


def anchor_set(profile: CalibrationProfile) -> str:
    """Returns the digest of the token ids whose logits the profile reads; "" if it reads none."""
    ids = anchors(profile)
    return "" if ids is None else anchors_digest(ids)


def _all_tokens(
    record: TokenRecord, profile: CalibrationProfile, gain: Gain, normalizer: Floats
) -> tuple[Floats, Floats]:
    return gain.lower, gain.upper


def _contextual_tokens(
    record: TokenRecord, profile: CalibrationProfile, gain: Gain, normalizer: Floats
) -> tuple[Floats, Floats] | None:
    """Returns the lower and the upper ends of the gains of the tokens that are known, nats; None if none is. Tokens
    whose features were lost are left out. If an anchor is masked, the engine applies nothing, and the gain is 0."""
    features = record.features
    has_features: npt.NDArray[np.bool_] = np.zeros(record.tokens, dtype=np.bool_)
    if features is not None and features.anchors == anchor_set(profile):
        has_features = ~np.isnan(features.values.sum(axis=1))
    not_applied = ~has_features & ~gain.exact & (np.abs(normalizer) < MAX_IDENTITY_NORMALIZER_NATS)
    known = has_features | gain.exact | not_applied
    if not known.any():
        return None
    return np.where(not_applied, 0.0, gain.lower)[known], np.where(not_applied, 0.0, gain.upper)[known]


def _no_tokens(record: TokenRecord, profile: CalibrationProfile, gain: Gain, normalizer: Floats) -> None:
    return None


def _contextual_kl_limit(profile: CalibrationProfile) -> float | None:
    limit = float(profile.parameters["kl_limit"])
    return limit if limit < NO_KL_LIMIT else None


FAMILY_RULES: Mapping[str, FamilyRules] = {
    # It gains most: it is tested first.
    ADAPTER: FamilyRules(
        queue_priority=-1,
        kl_limit=lambda profile: None,
        token_gains=_no_tokens,
    ),
    CONTEXTUAL: FamilyRules(
        queue_priority=0,
        kl_limit=_contextual_kl_limit,
        token_gains=_contextual_tokens,
    ),
    # Temperature and bias rarely win much: all others are tested first.
    TEMPERATURE_BIAS: FamilyRules(
        queue_priority=1,
        kl_limit=lambda profile: None,
        token_gains=_all_tokens,
    ),
}
