"""A family that the product does not have: Δz_i = (1/temperature − 1)(z_i − max z) + bias_i.

It is registered where this module is imported, and nowhere else. `tests.support.engine_profiles` has what the engine
computes of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from hemostat_calibration.arrays import Floats, Indices
from hemostat_calibration.errors import InvalidProfileError
from hemostat_calibration.profiles.families import VOCABULARY, FamilySpec, Parameter, Parameters, register
from hemostat_calibration.profiles.profile import CalibrationProfile

TEMPERATURE_BIAS = "temperature_bias"


def temperature_bias(
    model: str,
    vocab_size: int,
    temperature: float,
    bias: npt.NDArray[np.floating],
    clamp_nats: float,
    metadata: Mapping[str, str] | None = None,
) -> CalibrationProfile:
    """Returns the profile with Δz_i = clip((1/temperature − 1)(z_i − max z) + bias_i, ±clamp_nats).

    temperature: above 0; 1 leaves the spread as it is.
    bias: [V], nats.
    Raises InvalidProfileError on a bad value.
    """
    if not (math.isfinite(temperature) and temperature > 0.0):
        raise InvalidProfileError(f"temperature is {temperature}: it must be a number above 0")
    return CalibrationProfile(
        family=TEMPERATURE_BIAS,
        model=model,
        vocab_size=vocab_size,
        parameters={
            "inverse_temperature": np.array(1.0 / temperature, dtype=np.float32),
            "bias": np.asarray(bias, dtype=np.float32),
        },
        clamp_nats=clamp_nats,
        metadata=metadata or {},
    )


def _shift(parameters: Parameters, relative: Floats, ids: Indices | None, _: Floats | None) -> Floats:
    slope = float(parameters["inverse_temperature"]) - 1.0
    bias = parameters["bias"] if ids is None else parameters["bias"][ids]
    return slope * relative + bias


def _check(parameters: Parameters) -> str:
    beta = float(parameters["inverse_temperature"])
    return "" if beta > 0.0 else f"inverse_temperature is {beta}: it must be above 0"


register(
    TEMPERATURE_BIAS,
    FamilySpec(
        parameters={"inverse_temperature": Parameter(()), "bias": Parameter((VOCABULARY,))},
        shift=_shift,
        check=_check,
        queue_priority=1,  # all others are tested first
    ),
)
