"""The family adapter: a low-rank correction of weights, by layer.

The engine serves the correction as LoRA. Its factors are stored as int8 with a scale for each row.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from hemostat_calibration.adapters.factors import LowRank, dequantize_rows, quantize_rows
from hemostat_calibration.arrays import Floats, Indices
from hemostat_calibration.errors import InvalidArgumentError, InvalidProfileError
from hemostat_calibration.profiles.families import FamilySpec, Parameter, Parameters, register
from hemostat_calibration.profiles.profile import CalibrationProfile

ADAPTER = "adapter"

CLAMP_NATS = 1.0
"""The `clamp_nats` of an adapter's profile, where it has no meaning."""

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


def adapter_profile(
    *,
    model: str,
    vocab_size: int,
    layers: Mapping[str, LowRank],
    metadata: Mapping[str, str] | None = None,
) -> CalibrationProfile:
    """Returns the profile of an adapter.

    layers: by the name of the module in the checkpoint, without `.weight`. Layers of rank 0 are left out; one or more
    must be left. The ranks may differ. Raises InvalidProfileError, which names the layer, on a value that is not finite
    or a name that cannot be a module's.

    >>> import numpy as np
    >>> layers = {"model.layers.0.mlp.up_proj": LowRank(np.ones((1, 3), np.float32), np.ones((2, 1), np.float32))}
    >>> profile = adapter_profile(model="m", vocab_size=5, layers=layers)
    >>> profile.family, adapter_layers(profile)["model.layers.0.mlp.up_proj"].a.round(3).tolist()
    ('adapter', [[1.0, 1.0, 1.0]])
    """
    parameters: dict[str, npt.NDArray[Any]] = {}
    for name, layer in layers.items():
        if not MODULE_PATTERN.fullmatch(name):
            raise InvalidProfileError(f"layer {name[:80]!r} cannot be the name of a module")
        if layer.rank == 0:
            continue
        for factor, value in (("a", layer.a), ("b", layer.b)):
            try:
                parameters[f"{name}.{factor}"], parameters[f"{name}.{factor}_scale"] = quantize_rows(value)
            except InvalidArgumentError:
                raise InvalidProfileError(f"layer {name}: {factor} holds NaN or an infinity") from None
    return CalibrationProfile(
        family=ADAPTER,
        model=model,
        vocab_size=vocab_size,
        parameters=parameters,
        clamp_nats=CLAMP_NATS,
        metadata=metadata or {},
    )


def adapter_layers(profile: CalibrationProfile) -> dict[str, LowRank]:
    """Returns the factors by module, in float32. Empty for a profile of another family.

    >>> import numpy as np
    >>> from hemostat_calibration.profiles.contextual import probe_profile
    >>> adapter_layers(probe_profile("m", 3, np.array([0]), clamp_nats=1.0))
    {}
    """
    result = {}
    for name in _layer_names(profile):
        a, a_scale, b, b_scale = (profile.parameters[f"{name}.{key}"] for key in FACTOR_PARAMETERS)
        result[name] = LowRank(dequantize_rows(a, a_scale), dequantize_rows(b, b_scale))
    return result


def max_rank(profile: CalibrationProfile) -> int:
    """Returns the largest rank of a layer: vLLM's `--max-lora-rank` must be this or more. 0 for another family.

    >>> import numpy as np
    >>> layers = {"mlp": LowRank(np.ones((2, 3), np.float32), np.ones((2, 2), np.float32))}
    >>> max_rank(adapter_profile(model="m", vocab_size=4, layers=layers))
    2
    """
    return max((profile.parameters[f"{name}.a"].shape[0] for name in _layer_names(profile)), default=0)


def adapter_bytes(profile: CalibrationProfile) -> int:
    """Returns the number of bytes of the factors as they are stored and sent: int8 and scales.

    >>> import numpy as np
    >>> layers = {"mlp": LowRank(np.ones((2, 3), np.float32), np.ones((2, 2), np.float32))}
    >>> adapter_bytes(adapter_profile(model="m", vocab_size=4, layers=layers))
    26
    """
    names = _layer_names(profile)
    return sum(profile.parameters[f"{name}.{key}"].nbytes for name in names for key in FACTOR_PARAMETERS)


def _layer_names(profile: CalibrationProfile) -> list[str]:
    return layer_names(profile.parameters) if profile.family == ADAPTER else []


def _parameters(names: Iterable[str]) -> Mapping[str, Parameter]:
    return {
        f"{module}.{name}": Parameter(tuple(f"{letter} of {module}" for letter in shape), dtype)
        for module in layer_names(names)
        for name, (shape, dtype) in FACTOR_PARAMETERS.items()
    }


def _check(parameters: Parameters) -> str:
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


register(
    ADAPTER,
    FamilySpec(
        parameters={},
        shift=_no_shift,
        check=_check,
        named=_parameters,
        changes_weights=True,
        # It gains most: it is tested first.
        queue_priority=-1,
    ),
)
