"""Stores what temperature and bias were learned from as bytes, for a restart: safetensors, the masses in float32."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from hemostat_calibration.arrays import Floats, frozen
from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.learning.temperature_bias import TemperatureBiasLearner, TemperatureBiasState

FORMAT = "hemostat.temperature_bias.1"
MAX_STATES = 64
_ENTRY = "learned"
_MAX_HEADER_BYTES = 1 << 20
_SUMS = ("information", "moment", "depth", "deep_tokens", "weight")


def save(
    states: Mapping[str, TemperatureBiasState], learner: TemperatureBiasLearner, about: str, notes: str = ""
) -> bytes:
    """Returns states by name as bytes, 8 bytes × vocabulary each. about: the caller's name of the two models. notes:
    text that is kept with them.

    >>> learner = TemperatureBiasLearner()
    >>> states, notes = load(save({"": learner.init("m", 4)}, learner, "m", "x"), learner, "m")
    >>> states[""].vocab_size, notes
    (4, 'x')
    """
    arrays: dict[str, npt.NDArray[Any]] = {}
    described = []
    for n, (name, state) in enumerate(list(states.items())[:MAX_STATES]):
        arrays[f"{n}.masses"] = np.stack([state.reference_mass, state.compressed_mass]).astype(np.float32)
        numbers = {key: getattr(state, key) for key in (*_SUMS, "tokens", "requests")}
        described.append({"name": name, "model": state.model, "vocab_size": state.vocab_size, **numbers})
    fields = {"format": FORMAT, "about": about, "learner": repr(learner), "states": described, "notes": notes}
    return bytes(safetensors.numpy.save(arrays, {_ENTRY: json.dumps(fields)}))


def load(data: bytes, learner: TemperatureBiasLearner, about: str) -> tuple[dict[str, TemperatureBiasState], str]:
    """Returns what `save` wrote, and its notes. Raises InvalidArgumentError if it is damaged, or comes from another
    learner or other models.

    >>> learner = TemperatureBiasLearner()
    >>> load(save({}, learner, "m", "notes"), learner, "m")
    ({}, 'notes')
    """
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + min(length, _MAX_HEADER_BYTES)])
        fields = json.loads(header["__metadata__"][_ENTRY])
        same = (fields["format"], fields["about"], fields["learner"]) == (FORMAT, about, repr(learner))
        described, notes = fields["states"], str(fields["notes"])
        arrays = safetensors.numpy.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidArgumentError(f"what was learned cannot be read: {str(error)[:100]}") from None
    if not same:
        raise InvalidArgumentError("what was learned is of other models or other settings")
    if not isinstance(described, list) or len(described) > MAX_STATES:
        raise InvalidArgumentError("what was learned describes no states")
    try:
        return {str(entry["name"]): _state(entry, arrays[f"{n}.masses"]) for n, entry in enumerate(described)}, notes
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise InvalidArgumentError(f"what was learned is damaged: {str(error)[:100]}") from None


def _state(entry: Mapping[str, Any], masses: npt.NDArray[Any]) -> TemperatureBiasState:
    vocab_size = entry["vocab_size"]
    if masses.dtype != np.float32 or masses.shape != (2, vocab_size) or not np.isfinite(masses).all():
        raise ValueError(f"masses are {masses.dtype} {masses.shape}, or not finite")
    tokens, requests = entry["tokens"], entry["requests"]
    if not all(type(count) is int and 0 <= count < 1 << 62 for count in (vocab_size, tokens, requests)):
        raise ValueError(f"counts are {tokens} and {requests}")
    sums = {name: float(entry[name]) for name in _SUMS}
    negative = min(sums["information"], sums["depth"], sums["deep_tokens"], sums["weight"], float(masses.min())) < 0.0
    if negative or not all(map(math.isfinite, sums.values())):
        raise ValueError(f"sums are {sums}")
    reference, compressed = masses.astype(np.float64)
    return TemperatureBiasState(
        model=str(entry["model"]),
        vocab_size=vocab_size,
        reference_mass=_own(reference),
        compressed_mass=_own(compressed),
        information=sums["information"],
        moment=sums["moment"],
        depth=sums["depth"],
        deep_tokens=sums["deep_tokens"],
        weight=sums["weight"],
        tokens=tokens,
        requests=requests,
    )


def _own(array: Floats) -> Floats:
    return frozen(array.copy())
