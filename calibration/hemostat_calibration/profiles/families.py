"""The table of calibration families: which parameters a profile of that name holds, and what they add to the logits.

A new family is one entry in `FAMILIES`; profiles, files and the numpy transform follow from it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hemostat_calibration.arrays import Floats, Indices

TEMPERATURE_BIAS = "temperature_bias"
CONTEXTUAL = "contextual"
ADAPTER = "adapter"

Parameters = Mapping[str, npt.NDArray[Any]]
VOCABULARY = "V"
"""The dimension that must equal the profile's `vocab_size`."""
ANCHORS = "anchors"
"""The parameter that holds the ids whose logits a family reads, int32 [N]."""

DTYPES: Mapping[str, npt.DTypeLike] = {"F32": np.float32, "F16": np.float16, "I32": np.int32, "I8": np.int8}
"""The element types of parameters, by their safetensors names."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """An array of a family. shape: names of dimensions, one name is one size in all parameters; `VOCABULARY` is V."""

    shape: tuple[str, ...]
    dtype: str = "F32"


@dataclass(frozen=True, slots=True)
class FamilySpec:
    """One family.

    parameters: by name; those that every profile of the family has.
    named: (names of a profile's parameters) -> all parameters that a profile with these names must have; None for a
        family whose names are fixed.
    shift: (parameters, relative float64 [..., N], ids int [..., N] or None, code float64 [..., r] or None) -> unclamped
        Δz, float64 [..., N] nats. `relative` is z − max z, finite; `ids` are the columns, None when they are the whole
        vocabulary in order; `code` is the result of the function of that name.
    range: (parameters, most float64 [...]) -> (low, high), each [...]: bounds of the unclamped Δz over every id whose
        `relative` is at most `most` (≤ 0), whatever the row; infinite where there is none.
    check: (parameters) -> what is wrong with the values, or "" if nothing is.
    code: (parameters, anchored float64 [..., N]) -> float64 [..., r]: the code of a row, from its finite logits at the
        ids of the parameter `ANCHORS`; a constant added to them changes nothing. None for a family without anchors.
    """

    parameters: Mapping[str, Parameter]
    shift: Callable[[Parameters, Floats, Indices | None, Floats | None], Floats]
    range: Callable[[Parameters, Floats], tuple[Floats, Floats]]
    check: Callable[[Parameters], str]
    code: Callable[[Parameters, Floats], Floats] | None = None
    named: Callable[[Iterable[str]], Mapping[str, Parameter]] | None = None

    def parameters_of(self, names: Iterable[str]) -> Mapping[str, Parameter]:
        """Returns the parameters that a profile must have some of whose parameters are `names`."""
        return self.parameters if self.named is None else self.named(names)


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


def _contextual_code(parameters: Parameters, anchored: Floats) -> Floats:
    """Returns y = offset + linear x, shrunk so that yᵀ fisher y ≤ 2 kl_limit."""
    features = parameters["linear"].shape[1]
    x = (anchored - anchored.mean(axis=-1, keepdims=True))[..., :features]
    y: Floats = parameters["offset"].astype(np.float64) + x @ parameters["linear"].T.astype(np.float64)
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
    limit = float(parameters["kl_limit"])
    return "" if limit > 0.0 else f"kl_limit is {limit}: it must be above 0"


_CONTEXTUAL_PARAMETERS: Mapping[str, Parameter] = {
    ANCHORS: Parameter(("N",), "I32"),
    "linear": Parameter(("r", "A")),
    "offset": Parameter(("r",)),
    "fisher": Parameter(("r", "r")),
    "kl_limit": Parameter(()),
    "up": Parameter((VOCABULARY, "r"), "F16"),
}

FACTOR_PARAMETERS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "a": (("rank", "inputs"), "I8"),
    "a_scale": (("rank",), "F32"),
    "b": (("outputs", "rank"), "I8"),
    "b_scale": (("outputs",), "F32"),
}
"""An adapter's parameters for each layer, `<module>.<name>`: dimensions and type. The layer's factors are
a × a_scale (by row) and b × b_scale (by row)."""
MODULE_PATTERN = re.compile(r"\w{1,64}(?:\.\w{1,64}){0,31}", re.ASCII)
"""The names of layers that an adapter may change: names of modules in Python."""

MAX_SCALE = 1e15
"""The largest scale of an adapter's factors: the product of two factors is within float32 and bfloat16."""


def layer_names(names: Iterable[str]) -> list[str]:
    """Returns the layers, sorted, some parameter of which is among the names of an adapter's parameters.

    >>> layer_names(["model.layers.0.mlp.up_proj.a", "model.layers.0.mlp.up_proj.b", "stray"])
    ['model.layers.0.mlp.up_proj']
    """
    parts = (name.rpartition(".") for name in names)
    return sorted({m for m, _, last in parts if last in FACTOR_PARAMETERS and MODULE_PATTERN.fullmatch(m)})


def _adapter_parameters(names: Iterable[str]) -> Mapping[str, Parameter]:
    return {
        f"{module}.{name}": Parameter(tuple(f"{letter} of {module}" for letter in shape), dtype)
        for module in layer_names(names)
        for name, (shape, dtype) in FACTOR_PARAMETERS.items()
    }


def _adapter_check(parameters: Parameters) -> str:
    layers = layer_names(parameters)
    if not layers:
        return "names have no layer: an adapter needs one or more, <module>.a, .a_scale, .b and .b_scale of each"
    for layer in layers:
        a, b = parameters[f"{layer}.a"], parameters[f"{layer}.b"]
        if not (a.size and b.size):
            return f"{layer}.a has shape {a.shape}, {layer}.b {b.shape}: leave out a layer whose rank is 0"
        for name in (f"{layer}.a_scale", f"{layer}.b_scale"):
            if not 0.0 <= parameters[name].min() <= parameters[name].max() <= MAX_SCALE:
                return f"{name} has a value below 0 or above {MAX_SCALE:g}"
    return ""


def _no_shift(parameters: Parameters, relative: Floats, ids: Indices | None, code: Floats | None) -> Floats:
    return np.zeros_like(relative)


def _no_range(parameters: Parameters, most: Floats) -> tuple[Floats, Floats]:
    return np.zeros_like(most), np.zeros_like(most)


FAMILIES: Mapping[str, FamilySpec] = {
    TEMPERATURE_BIAS: FamilySpec(
        parameters={"inverse_temperature": Parameter(()), "bias": Parameter((VOCABULARY,))},
        shift=_temperature_bias_shift,
        range=_temperature_bias_range,
        check=_temperature_bias_check,
    ),
    CONTEXTUAL: FamilySpec(
        parameters=_CONTEXTUAL_PARAMETERS,
        shift=_contextual_shift,
        range=_contextual_range,
        check=_contextual_check,
        code=_contextual_code,
    ),
    # An adapter changes weights: to the logits that the model has with it, it adds nothing.
    ADAPTER: FamilySpec(
        parameters={},
        shift=_no_shift,
        range=_no_range,
        check=_adapter_check,
        named=_adapter_parameters,
    ),
}
