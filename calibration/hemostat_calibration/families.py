"""The table of calibration families: which parameters a profile of that name holds, and what they add to the logits.

A new family is one entry in `FAMILIES`; profiles, files and the numpy transform follow from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Parameters = Mapping[str, npt.NDArray[np.float32]]
Floats = npt.NDArray[np.float64]
VOCABULARY = "V"
"""The dimension that must equal the profile's `vocab_size`."""


@dataclass(frozen=True, slots=True)
class FamilySpec:
    """One family.

    shapes: parameter name -> shape; a letter is a free dimension, the same wherever it stands, `VOCABULARY` is V.
    shift: (parameters, relative float64 [..., N], ids int [..., N] or None) -> unclamped Δz, float64 [..., N] nats.
        `relative` is z − max z, finite; `ids` names the columns, None when they are the whole vocabulary in order.
    range: (parameters, most float64 [...]) -> (low, high), each [...]: bounds of the unclamped Δz over every id whose
        `relative` is at most `most` (≤ 0), whatever the row; infinite where there is none.
    check: (parameters) -> what is wrong with the values, or "".
    """

    shapes: Mapping[str, tuple[str, ...]]
    shift: Callable[[Parameters, Floats, npt.NDArray[np.integer] | None], Floats]
    range: Callable[[Parameters, Floats], tuple[Floats, Floats]]
    check: Callable[[Parameters], str]


def _temperature_bias_shift(parameters: Parameters, relative: Floats, ids: npt.NDArray[np.integer] | None) -> Floats:
    slope = float(parameters["inverse_temperature"]) - 1.0
    bias = parameters["bias"] if ids is None else parameters["bias"][ids]
    return slope * relative + bias


def _temperature_bias_range(parameters: Parameters, most: Floats) -> tuple[Floats, Floats]:
    # relative lies in (-inf, most]: the slope's part is bounded on one side only.
    slope = float(parameters["inverse_temperature"]) - 1.0
    low, high = float(parameters["bias"].min()), float(parameters["bias"].max())
    edge = slope * most
    unbounded = np.full_like(edge, np.inf)
    return (low - unbounded if slope > 0.0 else low + edge), (high + unbounded if slope < 0.0 else high + edge)


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
