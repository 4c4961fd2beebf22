"""The contextual family: Δz = up y, where y is a linear map of the row's logits at a few anchor ids."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from hemostat_calibration.arrays import Floats, Indices
from hemostat_calibration.profiles.families import ANCHORS, VOCABULARY, FamilySpec, Parameter, Parameters, register
from hemostat_calibration.profiles.profile import CalibrationProfile

CONTEXTUAL = "contextual"
NO_KL_LIMIT = 1e30
"""A `kl_limit` that never binds."""


def contextual_profile(
    *,
    model: str,
    anchors: npt.NDArray[np.integer],
    linear: npt.NDArray[np.floating],
    offset: npt.NDArray[np.floating],
    up: npt.NDArray[np.floating],
    clamp_nats: float,
    fisher: npt.NDArray[np.floating] | None = None,
    kl_limit: float = NO_KL_LIMIT,
    metadata: Mapping[str, str] | None = None,
) -> CalibrationProfile:
    """Returns the profile with Δz = clip(up y, ±clamp_nats), y = s (offset + linear x).

    x is z[anchors] − mean z[anchors], the first A of it; s = min(1, √(2 kl_limit / yᵀ fisher y)): the KL divergence of
    the row from what it was is at most about `kl_limit` nats, to second order.

    anchors: [N] ids, distinct, N ≥ A. linear: [r, A]. offset: [r]. up: [V, r], stored as float16.
    fisher: [r, r], symmetric; None together with no limit.
    Raises InvalidProfileError on a bad value.

    >>> profile = contextual_profile(
    ...     model="m",
    ...     anchors=np.array([2, 0]),
    ...     linear=np.ones((1, 1)),
    ...     offset=np.zeros(1),
    ...     up=np.ones((3, 1)),
    ...     clamp_nats=1.0,
    ... )
    >>> profile.family, profile.vocab_size
    ('contextual', 3)
    """
    rank = linear.shape[0]
    with np.errstate(over="ignore"):  # an infinity is refused below
        up = np.asarray(up, dtype=np.float16)
    return CalibrationProfile(
        family=CONTEXTUAL,
        model=model,
        vocab_size=up.shape[0],
        parameters={
            "anchors": np.asarray(anchors, dtype=np.int32),
            "linear": np.asarray(linear, dtype=np.float32),
            "offset": np.asarray(offset, dtype=np.float32),
            "fisher": np.asarray(np.zeros((rank, rank)) if fisher is None else fisher, dtype=np.float32),
            "kl_limit": np.asarray(kl_limit, dtype=np.float32),
            "up": up,
        },
        clamp_nats=clamp_nats,
        metadata=metadata or {},
    )


def probe_profile(
    model: str, vocab_size: int, anchors: npt.NDArray[np.integer], clamp_nats: float
) -> CalibrationProfile:
    """Returns a profile that changes nothing: an engine that holds it reports the logits at its anchors, before
    anything has been learned from them. anchors: [N]. Raises InvalidProfileError on a bad value.

    >>> probe_profile("m", 4, np.array([1, 3]), clamp_nats=1.0).parameters["anchors"].tolist()
    [1, 3]
    """
    return contextual_profile(
        model=model,
        anchors=anchors,
        linear=np.zeros((1, 1)),
        offset=np.zeros(1),
        up=np.zeros((vocab_size, 1)),
        clamp_nats=clamp_nats,
    )


def _code(parameters: Parameters, anchored: Floats) -> Floats:
    """Returns y = offset + linear x, shrunk so that yᵀ fisher y ≤ 2 kl_limit."""
    features = parameters["linear"].shape[1]
    x = (anchored - anchored.mean(axis=-1, keepdims=True))[..., :features]
    y: Floats = parameters["offset"].astype(np.float64) + x @ parameters["linear"].T.astype(np.float64)
    twice_kl = ((y @ parameters["fisher"].astype(np.float64)) * y).sum(axis=-1, keepdims=True)
    most = 2.0 * float(parameters["kl_limit"])
    scaled: Floats = y * np.sqrt(most / np.maximum(twice_kl, most))
    return scaled


def _shift(parameters: Parameters, relative: Floats, ids: Indices | None, code: Floats | None) -> Floats:
    assert code is not None
    up = parameters["up"]
    if ids is None:
        return code @ up.T.astype(np.float64)
    shift: Floats = (up[ids].astype(np.float64) @ code[..., None])[..., 0]
    return shift


def _check(parameters: Parameters) -> str:
    anchors, features = parameters[ANCHORS], parameters["linear"].shape[1]
    vocabulary = parameters["up"].shape[0]
    if anchors.size == 0 or anchors.min() < 0 or anchors.max() >= vocabulary or len(np.unique(anchors)) < anchors.size:
        return f"anchors must be distinct ids of the vocabulary of {vocabulary}, at least one"
    if not 1 <= features <= anchors.size:
        return f"linear reads {features} features: 1 to the {anchors.size} anchors are allowed"
    if not parameters["linear"].shape[0]:
        return "linear has no rows: the rank must be 1 or more"
    limit = float(parameters["kl_limit"])
    return "" if limit > 0.0 else f"kl_limit is {limit}: it must be above 0"


def _kl_limit(parameters: Parameters) -> float | None:
    limit = float(parameters["kl_limit"])
    return limit if limit < NO_KL_LIMIT else None


_PARAMETERS: Mapping[str, Parameter] = {
    ANCHORS: Parameter(("N",), "I32"),
    "linear": Parameter(("r", "A")),
    "offset": Parameter(("r",)),
    "fisher": Parameter(("r", "r")),
    "kl_limit": Parameter(()),
    "up": Parameter((VOCABULARY, "r"), "F16"),
}

register(
    CONTEXTUAL,
    FamilySpec(
        parameters=_PARAMETERS,
        shift=_shift,
        check=_check,
        code=_code,
        basis=lambda parameters: parameters["up"],
        kl_limit=_kl_limit,
    ),
)
