"""A contextual profile that ignores its context: for processes that know the product's families alone."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from hemostat_calibration.profiles.contextual import contextual_profile
from hemostat_calibration.profiles.profile import CalibrationProfile


def constant_profile(
    model: str, bias: npt.NDArray[np.floating], clamp_nats: float, metadata: Mapping[str, str] | None = None
) -> CalibrationProfile:
    """Returns the profile that adds `bias` [V] to the logits, clipped to ±clamp_nats, if the logit of id 1 is finite.

    bias: it is rounded to float16.
    """
    return contextual_profile(
        model=model,
        anchors=np.array([1]),
        linear=np.zeros((1, 1)),
        offset=np.ones(1),
        up=bias[:, None],
        clamp_nats=clamp_nats,
        metadata=metadata,
    )
