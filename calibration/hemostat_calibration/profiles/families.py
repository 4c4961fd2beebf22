"""The table of calibration families: which parameters a profile of that name holds, and what they add to the logits.

A new family is one entry in `FAMILIES`; profiles, files and the numpy transform follow from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hemostat_calibration.arrays import Floats, Indices

Parameters = Mapping[str, npt.NDArray[Any]]
VOCABULARY = "V"
"""The dimension that must equal the profile's `vocab_size`."""
ANCHORS = "anchors"
"""The parameter that holds the ids whose logits a family reads, int32 [N]."""

DTYPES: Mapping[str, npt.DTypeLike] = {"F32": np.float32, "F16": np.float16, "I32": np.int32}
"""Element types of parameters, by their safetensors names."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """An array of a family. shape: a letter is a free dimension, the same in all parameters; `VOCABULARY` is V."""

    shape: tuple[str, ...]
    dtype: str = "F32"


@dataclass(frozen=True, slots=True)
class FamilySpec:
    """One family.

    parameters: by name.
    shift: (parameters, relative float64 [..., N], ids int [..., N] or None, code float64 [..., r] or None) -> unclamped
        Δz, float64 [..., N] nats. `relative` is z − max z, finite; `ids` are the columns, None when they are the whole
        vocabulary in order; `code` is the result of the function of that name.
    range: (parameters, most float64 [...]) -> (low, high), each [...]: bounds of the unclamped Δz over every id whose
        `relative` is at most `most` (≤ 0), whatever the row; infinite where there is none.
    check: (parameters) -> what is wrong with the values, or "" where nothing is.
    code: (parameters, anchored float64 [..., N]) -> float64 [..., r]: the code of a row, from its finite logits at the
        ids of the parameter `ANCHORS`; a constant added to them changes nothing. None for a family without anchors.
    """

    parameters: Mapping[str, Parameter]
    shift: Callable[[Parameters, Floats, Indices | None, Floats | None], Floats]
    range: Callable[[Parameters, Floats], tuple[Floats, Floats]]
    check: Callable[[Parameters], str]
    code: Callable[[Parameters, Floats], Floats] | None = None


def _temperature_bias_shift(parameters: Parameters, relative: Floats, ids: Indices | None, _: Floats | None) -> Floats:
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


def silu(a: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """a / (1 + e^-a), without overflow.

    >>> silu(np.array([0.0, 1000.0])).tolist()
    [0.0, 1000.0]
    """
    return a * (0.5 + 0.5 * np.tanh(0.5 * a))


def _contextual_code(parameters: Parameters, anchored: Floats) -> Floats:
    """y = offset + linear x + out silu(middle silu(hidden x + hidden_offset) + middle_offset), shrunk so that
    yᵀ fisher y ≤ 2 kl_limit."""
    features = parameters["linear"].shape[1]
    x = (anchored - anchored.mean(axis=-1, keepdims=True))[..., :features]
    y: Floats = parameters["offset"].astype(np.float64) + x @ parameters["linear"].T.astype(np.float64)
    if parameters["hidden"].shape[0]:
        units = silu(x @ parameters["hidden"].T.astype(np.float64) + parameters["hidden_offset"])
        units = silu(units @ parameters["middle"].T.astype(np.float64) + parameters["middle_offset"])
        y += units @ parameters["out"].T.astype(np.float64)
    twice_kl = ((y @ parameters["fisher"].astype(np.float64)) * y).sum(axis=-1, keepdims=True)
    most = 2.0 * float(parameters["kl_limit"])
    scaled: Floats = y * np.sqrt(most / np.maximum(twice_kl, most))
    return scaled


def _contextual_shift(parameters: Parameters, relative: Floats, ids: Indices | None, code: Floats | None) -> Floats:
    assert code is not None
    up = parameters["up"]
    if ids is None:
        return code @ up.T.astype(np.float64)
    shift: Floats = (up[ids].astype(np.float64) @ code[..., None])[..., 0]
    return shift


def _contextual_range(parameters: Parameters, most: Floats) -> tuple[Floats, Floats]:
    unbounded = np.full_like(most, np.inf)
    return -unbounded, unbounded


def _contextual_check(parameters: Parameters) -> str:
    anchors, features = parameters[ANCHORS], parameters["linear"].shape[1]
    vocabulary = parameters["up"].shape[0]
    if anchors.size == 0 or anchors.min() < 0 or anchors.max() >= vocabulary or len(np.unique(anchors)) < anchors.size:
        return f"anchors must be distinct ids of the vocabulary of {vocabulary}, at least one"
    if not 1 <= features <= anchors.size:
        return f"linear reads {features} features: 1 to the {anchors.size} anchors are allowed"
    if not parameters["linear"].shape[0]:
        return "linear has no rows: the rank must be 1 or more"
    if (parameters["hidden"].shape[0] == 0) != (parameters["middle"].shape[0] == 0):
        return "hidden and middle must both have rows, or neither"
    limit = float(parameters["kl_limit"])
    return "" if limit > 0.0 else f"kl_limit is {limit}: it must be above 0"


TEMPERATURE_BIAS = "temperature_bias"
CONTEXTUAL = "contextual"
ADAPTER = "adapter"

FAMILIES: Mapping[str, FamilySpec] = {
    TEMPERATURE_BIAS: FamilySpec(
        parameters={"inverse_temperature": Parameter(()), "bias": Parameter((VOCABULARY,))},
        shift=_temperature_bias_shift,
        range=_temperature_bias_range,
        check=_temperature_bias_check,
    ),
    CONTEXTUAL: FamilySpec(
        parameters={
            ANCHORS: Parameter(("N",), "I32"),
            "linear": Parameter(("r", "A")),
            "offset": Parameter(("r",)),
            "hidden": Parameter(("H", "A")),
            "hidden_offset": Parameter(("H",)),
            "middle": Parameter(("G", "H")),
            "middle_offset": Parameter(("G",)),
            "out": Parameter(("r", "G")),
            "fisher": Parameter(("r", "r")),
            "kl_limit": Parameter(()),
            "up": Parameter((VOCABULARY, "r"), "F16"),
        },
        shift=_contextual_shift,
        range=_contextual_range,
        check=_contextual_check,
        code=_contextual_code,
    ),
}
