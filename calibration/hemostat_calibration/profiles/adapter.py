"""Profiles of the family adapter: a low-rank correction of weights, by layer, and optionally a map of the logits.

The engine serves the correction as LoRA. Its factors are stored as int8 with a scale for each row. The map is a
contextual profile that was learned on the logits that the model has with the correction.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from hemostat_calibration.adapters.factors import LowRank
from hemostat_calibration.adapters.int8 import dequantize_rows, quantize_rows
from hemostat_calibration.errors import InvalidArgumentError, InvalidProfileError
from hemostat_calibration.profiles.families import (
    ADAPTER,
    CONTEXTUAL,
    FACTOR_PARAMETERS,
    MAP_PREFIX,
    MODULE_PATTERN,
    layer_names,
    map_parameters,
)
from hemostat_calibration.profiles.profile import CalibrationProfile

NO_MAP_CLAMP_NATS = 1.0
"""`clamp_nats` of an adapter without a map, where it has no meaning."""


def adapter_profile(
    *,
    model: str,
    vocab_size: int,
    layers: Mapping[str, LowRank],
    map: CalibrationProfile | None = None,
    metadata: Mapping[str, str] | None = None,
) -> CalibrationProfile:
    """Profile of an adapter.

    layers: by the name of the module in the checkpoint, without `.weight`. Those of rank 0 are left out; one or more
        must be left. The ranks may differ.
    map: a contextual profile for the same vocabulary, applied to the logits that the model has with the adapter. Its
        `clamp_nats` becomes the profile's; its metadata are not kept.
    Raises InvalidProfileError, naming the layer, on a value that is not finite or a name that cannot be a module's.

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
    if map is not None:
        _require_map(map, vocab_size)
        parameters |= {MAP_PREFIX + name: value for name, value in map.parameters.items()}
    return CalibrationProfile(
        family=ADAPTER,
        model=model,
        vocab_size=vocab_size,
        parameters=parameters,
        clamp_nats=NO_MAP_CLAMP_NATS if map is None else map.clamp_nats,
        metadata=metadata or {},
    )


def adapter_layers(profile: CalibrationProfile) -> dict[str, LowRank]:
    """The factors by module, in float32. Empty for a profile of another family.

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


def has_map(profile: CalibrationProfile) -> bool:
    """Whether it is an adapter that changes logits, too: the engine must then apply the profile beside serving it.

    >>> import numpy as np
    >>> from hemostat_calibration.profiles.profile import temperature_bias
    >>> has_map(temperature_bias("m", 3, 2.0, np.zeros(3), clamp_nats=1.0))
    False
    """
    return profile.family == ADAPTER and any(name.startswith(MAP_PREFIX) for name in profile.parameters)


def map_of(profile: CalibrationProfile) -> CalibrationProfile | None:
    """The map of an adapter as a contextual profile, with a version of its own; None where it has none.

    >>> from hemostat_calibration.profiles.contextual import probe_profile
    >>> import numpy as np
    >>> layers = {"mlp": LowRank(np.ones((1, 3), np.float32), np.ones((2, 1), np.float32))}
    >>> probe = probe_profile("m", 4, np.array([1]), clamp_nats=1.0)
    >>> map_of(adapter_profile(model="m", vocab_size=4, layers=layers, map=probe)) == probe
    True
    """
    if not has_map(profile):
        return None
    return CalibrationProfile(
        family=CONTEXTUAL,
        model=profile.model,
        vocab_size=profile.vocab_size,
        parameters=map_parameters(profile.parameters),
        clamp_nats=profile.clamp_nats,
        metadata={},
    )


def with_map(
    profile: CalibrationProfile, map: CalibrationProfile, metadata: Mapping[str, str] | None = None
) -> CalibrationProfile:
    """The adapter with a map that was learned on top of it, in place of the one that it may have.

    Its layers are kept to the bit. map: see `adapter_profile`. metadata: beside the adapter's own. Raises
    InvalidProfileError for a profile of another family, or a map for another vocabulary.

    >>> from hemostat_calibration.profiles.contextual import probe_profile
    >>> import numpy as np
    >>> layers = {"mlp": LowRank(np.ones((1, 3), np.float32), np.ones((2, 1), np.float32))}
    >>> adapter = adapter_profile(model="m", vocab_size=4, layers=layers)
    >>> both = with_map(adapter, probe_profile("m", 4, np.array([1]), clamp_nats=0.5), {"map_tokens": "9"})
    >>> both.clamp_nats, dict(both.metadata), has_map(both), layers_digest(both) == layers_digest(adapter)
    (0.5, {'map_tokens': '9'}, True, True)
    """
    if profile.family != ADAPTER:
        raise InvalidProfileError(f"profile is of the family {profile.family}, not an adapter")
    _require_map(map, profile.vocab_size)
    layers = {name: value for name, value in profile.parameters.items() if not name.startswith(MAP_PREFIX)}
    return CalibrationProfile(
        family=ADAPTER,
        model=profile.model,
        vocab_size=profile.vocab_size,
        parameters=layers | {MAP_PREFIX + name: value for name, value in map.parameters.items()},
        clamp_nats=map.clamp_nats,
        metadata={**profile.metadata, **(metadata or {})},
    )


def layers_digest(profile: CalibrationProfile) -> str:
    """First 32 hex digits of the SHA-256 of an adapter's layers: adapters that differ in their map alone have the same.
    "" for another family.

    >>> import numpy as np
    >>> layers = {"mlp": LowRank(np.ones((1, 3), np.float32), np.ones((2, 1), np.float32))}
    >>> one, other = (adapter_profile(model=name, vocab_size=4, layers=layers) for name in "mn")
    >>> one == other, layers_digest(one) == layers_digest(other)
    (False, True)
    """
    result = hashlib.sha256()
    names = _layer_names(profile)
    for name in names:
        for key in FACTOR_PARAMETERS:
            array = profile.parameters[f"{name}.{key}"]
            result.update(f"{name}.{key} {array.shape}".encode())
            result.update(np.ascontiguousarray(array).data)
    return result.hexdigest()[:32] if names else ""


def max_rank(profile: CalibrationProfile) -> int:
    """The largest rank of a layer: vLLM's `--max-lora-rank` must be this or more. 0 for another family.

    >>> import numpy as np
    >>> layers = {"mlp": LowRank(np.ones((2, 3), np.float32), np.ones((2, 2), np.float32))}
    >>> max_rank(adapter_profile(model="m", vocab_size=4, layers=layers))
    2
    """
    return max((profile.parameters[f"{name}.a"].shape[0] for name in _layer_names(profile)), default=0)


def adapter_bytes(profile: CalibrationProfile) -> int:
    """Bytes of the factors as they are stored and sent: int8 and scales, without the map.

    >>> import numpy as np
    >>> layers = {"mlp": LowRank(np.ones((2, 3), np.float32), np.ones((2, 2), np.float32))}
    >>> adapter_bytes(adapter_profile(model="m", vocab_size=4, layers=layers))
    26
    """
    names = _layer_names(profile)
    return sum(profile.parameters[f"{name}.{key}"].nbytes for name in names for key in FACTOR_PARAMETERS)


def _require_map(map: CalibrationProfile, vocab_size: int) -> None:
    if map.family != CONTEXTUAL or map.vocab_size != vocab_size:
        raise InvalidProfileError(
            f"map is of the family {map.family} for a vocabulary of {map.vocab_size}: it must be {CONTEXTUAL}, "
            f"for {vocab_size}"
        )


def _layer_names(profile: CalibrationProfile) -> list[str]:
    return layer_names(profile.parameters) if profile.family == ADAPTER else []
