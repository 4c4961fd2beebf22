"""A calibration profile: what is added to the compressed model's logits, frozen, versioned by its own digest."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from hemostat_calibration.errors import InvalidProfileError
from hemostat_calibration.profiles.families import DTYPES, FAMILIES, VOCABULARY, FamilySpec

VERSION_PATTERN = re.compile(r"[0-9a-f]{32}")
"""A version is the first 32 hex digits of the SHA-256 of the profile's bytes: it can name a file or a URL safely."""

IDENTITY = "identity"
"""The family and the version that mean that there is no profile."""

MAX_BYTES = 512 * 1024 * 1024
"""The largest size of a profile's file: longer input is refused before it is parsed."""
MAX_HEADER_BYTES = 64 * 1024
MAX_ADAPTER_HEADER_BYTES = 1024 * 1024
"""The largest header in format 3. An adapter has about 450 bytes for each layer, and a model of 70B parameters has 560
layers.
"""
MAX_VOCABULARY = 1 << 24
MAX_CLAMP_NATS = 20.0

_FORMATS = ("1", "2", "3")
"""The formats of a profile's file. In format 1 every parameter is float32, in format 2 each has its family's type, in
format 3 the type may be int8 and the header longer. A profile is written in the first format that can hold it, so that
versions made before a format was added are still valid."""
_LENGTH = struct.Struct("<Q")
_ALIGNMENT = 8
_METADATA_PREFIX = "metadata."


@dataclass(frozen=True, slots=True, eq=False)
class CalibrationProfile:
    """The parameters of one calibration family. Equal when their versions are.

    family: a key of `families.FAMILIES`.
    model: name or digest of the compressed model that it was learned for ("" fits any with that vocabulary).
    vocab_size: V.
    parameters: named arrays of the family's shapes and types, read-only; see the family's module.
    clamp_nats: every |Δz| is at most this; above 0 and at most `MAX_CLAMP_NATS`.
    metadata: strings for readers (when, on how many tokens); they change no figure, but are part of the version.

    Raises InvalidProfileError if a value breaks these rules.
    """

    family: str
    model: str
    vocab_size: int
    parameters: Mapping[str, npt.NDArray[Any]]
    clamp_nats: float
    metadata: Mapping[str, str]
    version: str = field(init=False)
    """The first 32 hex digits of the SHA-256 of `to_bytes()`."""

    def __post_init__(self) -> None:
        _check_fields(self)
        frozen: dict[str, npt.NDArray[Any]] = {}
        for name in sorted(self.parameters):
            array = np.array(self.parameters[name], order="C", copy=True)
            array.flags.writeable = False
            frozen[name] = array
        object.__setattr__(self, "parameters", MappingProxyType(frozen))
        object.__setattr__(self, "clamp_nats", float(self.clamp_nats))
        object.__setattr__(self, "metadata", MappingProxyType(dict(self.metadata)))
        data = self.to_bytes()
        if len(data) > MAX_BYTES:
            raise InvalidProfileError(f"profile of {len(data)} bytes: at most {MAX_BYTES} are allowed")
        object.__setattr__(self, "version", _digest(data))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CalibrationProfile) and self.version == other.version

    def __hash__(self) -> int:
        return hash(self.version)

    def __reduce__(self) -> tuple[Any, ...]:
        return CalibrationProfile.from_bytes, (self.to_bytes(),)

    @property
    def spec(self) -> FamilySpec:
        """The specification of its family."""
        return FAMILIES[self.family]

    @property
    def changes_weights(self) -> bool:
        """It is True if the profile changes the model's weights, and adds nothing to the logits."""
        return self.spec.changes_weights

    def to_bytes(self) -> bytes:
        """Returns canonical safetensors bytes: the same profile gives the same bytes.

        The header is written here because the safetensors library keeps no order among metadata keys.
        """
        dtypes = {name: p.dtype for name, p in FAMILIES[self.family].parameters_of(self.parameters).items()}
        entries: dict[str, Any] = {
            "__metadata__": {
                "clamp_nats": repr(self.clamp_nats),
                "family": self.family,
                "format": _format(set(dtypes.values())),
                "model": self.model,
                "vocab_size": str(self.vocab_size),
                **{_METADATA_PREFIX + key: value for key, value in self.metadata.items()},
            }
        }
        chunks: list[bytes] = []
        offset = 0
        for name, array in self.parameters.items():
            data = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
            entries[name] = {
                "dtype": dtypes[name],
                "shape": list(array.shape),
                "data_offsets": [offset, offset + len(data)],
            }
            chunks.append(data)
            offset += len(data)
        header = json.dumps(entries, sort_keys=True, separators=(",", ":")).encode()
        header += b" " * (-len(header) % _ALIGNMENT)
        return b"".join([_LENGTH.pack(len(header)), header, *chunks])

    @classmethod
    def from_bytes(cls, data: bytes, version: str | None = None) -> CalibrationProfile:
        """Returns the profile in a file, parsed and checked. Raises InvalidProfileError if it is malformed, or if its
        digest is not `version`.

        Only the canonical bytes of a valid profile are accepted, so that one profile has one version.
        """
        if len(data) > MAX_BYTES:
            raise InvalidProfileError(f"profile of {len(data)} bytes: at most {MAX_BYTES} are allowed")
        if version is not None and _digest(data) != version:
            raise InvalidProfileError(f"profile's digest is {_digest(data)}, not {_short(version)}: fetch it again")
        fields = _read_header(data)
        try:
            tensors = safetensors.numpy.load(data)
        except safetensors.SafetensorError as error:
            raise InvalidProfileError(f"profile is not a safetensors file: {_short(error)}") from None
        try:
            profile = cls(
                family=fields["family"],
                model=fields["model"],
                vocab_size=int(fields["vocab_size"]),
                parameters=tensors,
                clamp_nats=float(fields["clamp_nats"]),
                metadata={
                    key.removeprefix(_METADATA_PREFIX): value
                    for key, value in fields.items()
                    if key.startswith(_METADATA_PREFIX)
                },
            )
        except KeyError as error:
            raise InvalidProfileError(f"profile's header has no {error}: write it with to_bytes()") from None
        except ValueError as error:
            raise InvalidProfileError(f"profile's header holds a bad number: {_short(error)}") from None
        if profile.to_bytes() != data:
            raise InvalidProfileError("profile is not in its canonical form: write it with to_bytes()")
        return profile


def _format(dtypes: set[str]) -> str:
    if dtypes == {"F32"}:
        return _FORMATS[0]
    return _FORMATS[2] if "I8" in dtypes else _FORMATS[1]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def _short(value: object) -> str:
    return " ".join(str(value).split())[:80]


def _read_header(data: bytes) -> dict[str, str]:
    """Returns the `__metadata__` of a safetensors file whose tensors are of the types that parameters can have."""
    if len(data) < _LENGTH.size:
        raise InvalidProfileError(f"profile of {len(data)} bytes is truncated")
    (length,) = _LENGTH.unpack_from(data)
    if length > MAX_ADAPTER_HEADER_BYTES or _LENGTH.size + length > len(data):
        raise InvalidProfileError(f"profile's header claims {length} bytes: truncated, or not a safetensors file")
    try:
        entries = json.loads(data[_LENGTH.size : _LENGTH.size + length])
    except (ValueError, RecursionError):
        raise InvalidProfileError("profile's header is not JSON: not a safetensors file") from None
    fields = entries.pop("__metadata__", None) if isinstance(entries, dict) else None
    if not isinstance(fields, dict) or not all(isinstance(value, str) for value in fields.values()):
        raise InvalidProfileError("profile's header has no metadata: write it with to_bytes()")
    if fields.get("format") not in _FORMATS:
        known = ", ".join(_FORMATS)
        raise InvalidProfileError(f"profile's format is {_short(fields.get('format'))}: this version reads {known}")
    if length > MAX_HEADER_BYTES and fields["format"] != _FORMATS[2]:
        raise InvalidProfileError(f"profile's header has {length} bytes: at most {MAX_HEADER_BYTES} are allowed")
    for name, entry in entries.items():
        if not isinstance(entry, dict) or entry.get("dtype") not in DTYPES:
            raise InvalidProfileError(f"parameter {_short(name)} has a type other than {', '.join(DTYPES)}")
    return fields


def _check_fields(profile: CalibrationProfile) -> None:
    spec = FAMILIES.get(profile.family)
    if spec is None:
        raise InvalidProfileError(f"family {_short(profile.family)} is unknown: one of {', '.join(FAMILIES)}")
    if not 1 <= profile.vocab_size <= MAX_VOCABULARY:
        raise InvalidProfileError(f"vocab_size is {profile.vocab_size}: it must be 1 to {MAX_VOCABULARY}")
    if not 0.0 < profile.clamp_nats <= MAX_CLAMP_NATS:
        raise InvalidProfileError(f"clamp_nats is {profile.clamp_nats}: it must be above 0, at most {MAX_CLAMP_NATS}")
    parameters = spec.parameters_of(profile.parameters)
    if set(profile.parameters) != set(parameters):
        raise InvalidProfileError(
            f"{_name_difference(profile.parameters, parameters)} in a profile of the family {profile.family}. "
            "If another version of hemostat made it, learn it again, and install the same version in the engine"
        )
    sizes = {VOCABULARY: profile.vocab_size}
    for name, parameter in parameters.items():
        array, dimensions = profile.parameters[name], parameter.shape
        if array.dtype != DTYPES[parameter.dtype]:
            wanted_type = np.dtype(DTYPES[parameter.dtype])
            raise InvalidProfileError(f"parameter {name} is {array.dtype}: it must be {wanted_type}")
        wanted = tuple(sizes.setdefault(letter, size) for letter, size in zip(dimensions, array.shape, strict=False))
        if array.ndim != len(dimensions) or array.shape != wanted:
            known = {letter: sizes[letter] for letter in dimensions if letter in sizes}
            raise InvalidProfileError(f"parameter {name} has shape {array.shape}: it must be {dimensions} with {known}")
        if not np.isfinite(array).all():
            raise InvalidProfileError(f"parameter {name} holds NaN or an infinity")
    problem = spec.check(profile.parameters)
    if problem:
        raise InvalidProfileError(f"parameter {problem}")
    strings = [profile.model, *profile.metadata.keys(), *profile.metadata.values()]
    if not all(isinstance(value, str) for value in strings) or sum(map(len, strings)) > MAX_HEADER_BYTES // 16:
        raise InvalidProfileError(f"model and metadata must be strings, {MAX_HEADER_BYTES // 16} characters in all")


def _name_difference(given: Iterable[str], needed: Iterable[str]) -> str:
    """Returns in words which names differ, "parameters are missing (a, b) and unknown (c)": at most two names of
    each."""
    missing, unknown = sorted(set(needed) - set(given)), sorted(set(given) - set(needed))
    parts = [
        f"{what} ({_short(', '.join(names[:2]))}{', …' if len(names) > 2 else ''})"
        for what, names in (("missing", missing), ("unknown", unknown))
        if names
    ]
    return f"parameters are {' and '.join(parts)}"
