"""Profiles of the family adapter: a low-rank correction of weights, by layer.

The engine serves the correction as LoRA. Its factors are stored as int8 with a scale for each row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt

from hemostat_calibration.adapters.factors import LowRank
from hemostat_calibration.adapters.int8 import dequantize_rows, quantize_rows
from hemostat_calibration.errors import InvalidArgumentError, InvalidProfileError
from hemostat_calibration.profiles.families import (
    ADAPTER,
    FACTOR_PARAMETERS,
    MODULE_PATTERN,
    layer_names,
)
from hemostat_calibration.profiles.profile import CalibrationProfile

CLAMP_NATS = 1.0
"""The `clamp_nats` of an adapter's profile, where it has no meaning."""


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
    >>> profile.family, adapter_layers(profile)["model.layers.0.mlp.up_proj"].product().round(3).tolist()
    ('adapter', [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
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
    >>> from hemostat_calibration.profiles.profile import temperature_bias
    >>> adapter_layers(temperature_bias("m", 3, 2.0, np.zeros(3), clamp_nats=1.0))
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
