"""The change that a profile makes to logits, in numpy.

Δz is the change of the logits, in nats; |Δz| ≤ the profile's clamp. It is made of z − max z, so that it depends on
the distribution alone: adding a constant to every logit of a row (as turning logits into log-probabilities does)
changes nothing. The maximum runs over finite entries. Entries that are not finite get Δz = 0 and stay as they are:
-inf is a mask and stays one, a NaN is passed on for the caller to see.

An adapter adds nothing to the logits that the model has with it.

A family with anchors depends on a row's logits at those ids alone. They give the row's code, of which Δz
at every id is a function. A row any of whose anchors is not finite has the code 0, identity.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from hemostat_calibration.arrays import Floats
from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.profiles.families import ANCHORS
from hemostat_calibration.profiles.profile import CalibrationProfile


def anchors(profile: CalibrationProfile) -> npt.NDArray[np.int32] | None:
    """Returns the ids whose logits the profile reads, int32 [N]; None for a family without.

    >>> from hemostat_calibration.profiles.contextual import probe_profile
    >>> profile = probe_profile("m", 4, np.array([1, 3]), clamp_nats=1.0)
    >>> anchors(profile).tolist()
    [1, 3]
    """
    return profile.parameters[ANCHORS] if profile.spec.code is not None else None


def anchors_digest(ids: npt.NDArray[np.integer]) -> str:
    """Returns 32 hex digits that name a set of anchors [N], in its order.

    >>> anchors_digest(np.array([1, 3]))
    '30656bde983020b4a04d4fb8027463ad'
    """
    return hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest()[:32]


def anchor_set(profile: CalibrationProfile) -> str:
    """Returns the digest of the token ids whose logits the profile reads; "" if it reads none.

    >>> from hemostat_calibration.profiles.contextual import probe_profile
    >>> anchor_set(probe_profile("m", 4, np.array([1, 3]), clamp_nats=1.0))
    '30656bde983020b4a04d4fb8027463ad'
    """
    ids = anchors(profile)
    return "" if ids is None else anchors_digest(ids)


def code(profile: CalibrationProfile, anchored: npt.NDArray[np.floating]) -> Floats:
    """Returns the code of a row, float64 [..., r], from its logits or log-probabilities (natural) at the profile's
    anchors, [..., N]; only their differences matter. 0 where one is not finite. Raises InvalidArgumentError for a
    family without anchors, or another number of logits.

    >>> from hemostat_calibration.profiles.contextual import probe_profile
    >>> profile = probe_profile("m", 4, np.array([1, 3]), clamp_nats=1.0)
    >>> code(profile, np.array([0.5, 1.5])).tolist()
    [0.0]
    """
    read, ids = profile.spec.code, anchors(profile)
    if read is None or ids is None:
        raise InvalidArgumentError(f"profile is of the family {profile.family}, which reads no anchors")
    if anchored.ndim < 1 or anchored.shape[-1] != len(ids):
        raise InvalidArgumentError(f"anchored has shape {anchored.shape}: its last axis must be {len(ids)}")
    finite = np.isfinite(anchored).all(axis=-1, keepdims=True)
    result = read(profile.parameters, np.where(finite, anchored, 0.0).astype(np.float64))
    return np.where(finite, result, 0.0)


def shift_at(
    profile: CalibrationProfile,
    ids: npt.NDArray[np.integer],
    logprobs: npt.NDArray[np.floating],
    row_code: npt.NDArray[np.floating] | None = None,
) -> Floats:
    """Returns Δz, float64 [..., K] in nats, at some `ids` [..., K] of a row, from their log-probabilities [..., K].

    lp − max lp = z − max z: the row's most likely id must be among `ids`, as it is in a top-K list. Padding (id -1,
    -inf) gets 0. row_code: the row's code, [..., r]; a family with anchors requires it, another ignores it. Raises
    InvalidArgumentError if shapes or ids do not fit, or row_code is missing.

    >>> from hemostat_calibration.profiles.contextual import contextual_profile
    >>> profile = contextual_profile(
    ...     model="m",
    ...     anchors=np.array([0]),
    ...     linear=np.zeros((1, 1)),
    ...     offset=np.ones(1),
    ...     up=np.array([[0.0], [0.25], [2.0]]),
    ...     clamp_nats=1.0,
    ... )
    >>> ids, logprobs = np.array([1, 2]), np.log([0.5, 0.25])
    >>> shift_at(profile, ids, logprobs, code(profile, np.zeros(1))).tolist()
    [0.25, 1.0]
    """
    if ids.shape != logprobs.shape or ids.ndim < 1:
        raise InvalidArgumentError(f"ids has shape {ids.shape}, logprobs {logprobs.shape}: they must be the same")
    if ids.size and (ids.max() >= profile.vocab_size or ids.min() < -1):
        raise InvalidArgumentError(f"ids run from {ids.min()} to {ids.max()}: the vocabulary has {profile.vocab_size}")
    family = profile.spec
    if family.code is not None and row_code is None:
        raise InvalidArgumentError(f"row_code is missing: a profile of the family {profile.family} requires it")
    finite = np.isfinite(logprobs) & (ids >= 0)
    relative = relative_logits(logprobs, finite)
    codes = None if row_code is None else row_code.astype(np.float64)
    raw = family.shift(profile.parameters, relative, np.where(finite, ids, 0), codes)
    return np.where(finite, np.clip(raw, -profile.clamp_nats, profile.clamp_nats), 0.0)


def max_shift(profile: CalibrationProfile) -> float:
    """Returns a bound of |Δz| at every id, in any row, in nats: the profile's clamp, or 0 for an adapter.

    >>> from hemostat_calibration.profiles.contextual import probe_profile
    >>> max_shift(probe_profile("m", 4, np.array([1, 3]), clamp_nats=1.0))
    1.0
    """
    return 0.0 if profile.changes_weights else profile.clamp_nats


def relative_logits(values: npt.NDArray[np.floating], finite: npt.NDArray[np.bool_]) -> Floats:
    """Returns z − max z over the last axis where z is finite; 0 elsewhere (the shift there is discarded).

    >>> z = np.array([1.0, 3.0, -np.inf])
    >>> relative_logits(z, np.isfinite(z)).tolist()
    [-2.0, 0.0, 0.0]
    """
    masked = np.where(finite, values, -np.inf).astype(np.float64)
    top = masked.max(axis=-1, keepdims=True, initial=-np.inf)
    return np.where(finite, masked - np.where(np.isfinite(top), top, 0.0), 0.0)
