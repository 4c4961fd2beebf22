"""The table of calibration families: which parameters a profile of that name holds, and what they add to the logits.

A new family is one entry in `FAMILIES`; profiles, files and the numpy transform follow from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Parameters = Mapping[str, npt.NDArray[np.float32]]
VOCABULARY = "V"
"""The dimension that must equal the profile's `vocab_size`."""


@dataclass(frozen=True, slots=True)
class FamilySpec:
    """One family.

    shapes: parameter name -> shape; a letter is a free dimension, the same wherever it stands, `VOCABULARY` is V.
    shift: (parameters, relative float64 [..., N], ids int [..., N] or None) -> unclamped Δz, float64 [..., N] nats.
        `relative` is z − max z, finite; `ids` names the columns, None when they are the whole vocabulary in order.
    range: (parameters) -> (low, high): bounds of the unclamped Δz over every possible row; infinite where it has none.
    check: (parameters) -> what is wrong with the values, or "".
    """

    shapes: Mapping[str, tuple[str, ...]]
    shift: Callable[[Parameters, npt.NDArray[np.float64], npt.NDArray[np.integer] | None], npt.NDArray[np.float64]]
    range: Callable[[Parameters], tuple[float, float]]
    check: Callable[[Parameters], str]


def _temperature_bias_shift(
    parameters: Parameters, relative: npt.NDArray[np.float64], ids: npt.NDArray[np.integer] | None
) -> npt.NDArray[np.float64]:
    slope = float(parameters["inverse_temperature"]) - 1.0
    bias = parameters["bias"] if ids is None else parameters["bias"][ids]
    return slope * relative + bias


def _temperature_bias_range(parameters: Parameters) -> tuple[float, float]:
    # relative lies in (-inf, 0]: the slope's part is one-sided.
    slope = float(parameters["inverse_temperature"]) - 1.0
    bias = parameters["bias"]
    low = float(bias.min()) if slope <= 0.0 else -np.inf
    high = float(bias.max()) if slope >= 0.0 else np.inf
    return low, high


def _temperature_bias_check(parameters: Parameters) -> str:
    beta = float(parameters["inverse_temperature"])
    return "" if beta > 0.0 else f"inverse_temperature is {beta}: it must be above 0"


TEMPERATURE_BIAS = "temperature_bias"

FAMILIES: Mapping[str, FamilySpec] = {
    TEMPERATURE_BIAS: FamilySpec(
        shapes={"inverse_temperature": (), "bias": (VOCABULARY,)},
        shift=_temperature_bias_shift,
        range=_temperature_bias_range,
        check=_temperature_bias_check,
    ),
}
