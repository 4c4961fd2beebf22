"""Dataclasses as JSON bytes, for restarts: the fields and their types say what is stored, and what is read.

A value is read as its annotation says, or not at all: no field may be missing or unknown. What a class requires beyond
that is checked by whoever reads it. Arrays are compressed, so that rows that are still 0 cost nothing. Keys that are
bytes are written in hexadecimal digits; if the mapping's values are None, the keys stand behind each other. Of a union
of dataclasses the class's name is stored, too. What is of type Any has to be a JSON value, and is stored as it is.
"""

from __future__ import annotations

import base64
import json
import types
import typing
import zlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, TypeVar, Union

import numpy as np

from hemostat_calibration.arrays import frozen
from hemostat_calibration.errors import InvalidArgumentError

MAX_ARRAY_BYTES = 1 << 26
"""The largest size of one array when it is not compressed."""

T = TypeVar("T")


def encode(state: Any, schema: int) -> bytes:
    """Returns a dataclass as JSON. schema: of what it stores; another number where fields change.

    >>> from hemostat_calibration.statistics.running_mean import RunningMean
    >>> encode(RunningMean(0.0, 1.0), 1)
    b'{"schema":1,"state":{"lo":0.0,"hi":1.0,"observations":0,"total":0.0,"squares":0.0}}'
    """
    stored = {"schema": schema, "state": _plain(state, type(state))}
    return json.dumps(stored, separators=(",", ":")).encode()


def decode(kind: type[T], data: bytes, schema: int, older: Collection[int] = ()) -> T:
    """Returns what `encode` wrote. Raises InvalidArgumentError, in one line that names the field, if it is anything
    else.

    older: schemas that are read, too. They had fewer fields; a field that they did not have has its default.

    >>> from hemostat_calibration.statistics.running_mean import RunningMean
    >>> decode(RunningMean, encode(RunningMean(0.0, 1.0), 1), 1)
    RunningMean(lo=0.0, hi=1.0, observations=0, total=0.0, squares=0.0)
    >>> decode(RunningMean, b'{"schema": 1, "state": {"lo": 0.0, "hi": 1.0, "observations": 3, "total": 0.5}}', 1)
    Traceback (most recent call last):
    hemostat_calibration.errors.InvalidArgumentError: RunningMean.squares is missing
    """
    try:
        stored = json.loads(data)
        stored_schema = stored["schema"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InvalidArgumentError(f"not a stored {kind.__name__}: {data[:20]!r}") from None
    if stored_schema != schema and stored_schema not in older:
        raise InvalidArgumentError(
            f"the stored {kind.__name__} has schema {str(stored_schema)[:20]}, this version reads {schema}"
        )
    value: T = _typed(stored.get("state"), kind, kind.__name__, fill=stored_schema != schema)
    return value


def _field_types(kind: Any) -> Mapping[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


_hints: Callable[[Any], Mapping[str, Any]] = cache(_field_types)


def _plain(value: Any, hint: Any) -> Any:
    if value is None or hint in {int, float, str, bool, Any}:
        return value
    if isinstance(value, np.ndarray):
        data = base64.b64encode(zlib.compress(np.ascontiguousarray(value).tobytes(), 1)).decode()
        return [value.dtype.str, list(value.shape), data]
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in {Union, types.UnionType}:
        kinds = [kind for kind in inner if kind is not type(None)]
        if len(kinds) == 1:
            return _plain(value, kinds[0])
        return {"is": type(value).__name__, **_plain(value, type(value))}
    if is_dataclass(value):
        return {name: _plain(getattr(value, name), hint) for name, hint in _hints(type(value)).items()}
    if isinstance(value, Mapping):
        if inner[1] is None:
            size = len(next(iter(value), b""))
            return [size, base64.b64encode(b"".join(value)).decode()]
        return {_key(key): _plain(item, inner[1]) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item, hint) for item, hint in zip(value, _items(inner, len(value)), strict=True)]
    if isinstance(value, Enum):
        return value.value
    raise TypeError(f"{hint} cannot be stored")


def _key(key: Any) -> str:
    return key.hex() if isinstance(key, bytes) else str(key)


def _items(inner: tuple[Any, ...], length: int) -> tuple[Any, ...]:
    """Returns the types of a sequence's items."""
    return (inner[0],) * length if len(inner) == 1 or inner[1] is Ellipsis else inner


def _typed(value: Any, hint: Any, where: str, *, fill: bool) -> Any:
    """Returns a JSON value as the type that the hint names. Raises InvalidArgumentError if it does not fit. where: the
    field, as messages name it. fill: True if a field that is missing has its default."""
    if hint is Any:
        return value
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in {Union, types.UnionType}:
        kinds = [kind for kind in inner if kind is not type(None)]
        if value is None and len(kinds) < len(inner):
            return None
        if len(kinds) == 1:
            return _typed(value, kinds[0], where, fill=fill)
        named = {kind.__name__: kind for kind in kinds}
        _require(isinstance(value, dict) and value.get("is") in named, value, where, f"one of {', '.join(named)}")
        return _typed({key: item for key, item in value.items() if key != "is"}, named[value["is"]], where, fill=fill)
    if is_dataclass(hint):
        return _object(value, hint, where, fill=fill)  # type: ignore[arg-type]  # a class, not an instance
    if origin is np.ndarray:
        return _array(value, np.dtype(typing.get_args(inner[1])[0]), where)
    if origin in {tuple, list}:
        _require(isinstance(value, list), value, where, "a list")
        kinds = list(_items(inner, len(value)))
        _require(len(kinds) == len(value), value, where, f"a list of {len(kinds)}")
        return origin(
            _typed(item, kind, f"{where}[{n}]", fill=fill)
            for n, (item, kind) in enumerate(zip(value, kinds, strict=True))
        )
    if origin is not None and issubclass(origin, Mapping):
        if inner[1] is None:
            return dict.fromkeys(_digests(value, where))
        _require(isinstance(value, dict), value, where, "an object")
        read = _bytes if inner[0] is bytes else inner[0]
        return {
            _read(read, key, where): _typed(item, inner[1], f"{where}[{key!r}]", fill=fill)
            for key, item in value.items()
        }
    if hint is float:
        _require(type(value) in {int, float}, value, where, "a number")
        return float(value)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _read(hint, value, where)
    _require(type(value) is hint, value, where, {int: "a whole number", bool: "true or false"}.get(hint, "a string"))
    return value


def _object(value: Any, kind: type[Any], where: str, *, fill: bool) -> Any:
    _require(isinstance(value, dict), value, where, "an object")
    hints = _hints(kind)
    if fill:
        defaults = {f.name for f in fields(kind) if (f.default, f.default_factory) != (MISSING, MISSING)}
        hints = {name: hint for name, hint in hints.items() if name in value or name not in defaults}
    for name in sorted(value.keys() ^ hints.keys()):
        raise InvalidArgumentError(f"{where}.{name[:40]} is {'missing' if name in hints else 'unknown'}")
    read = {name: _typed(value[name], hint, f"{where}.{name}", fill=fill) for name, hint in hints.items()}
    late = {field.name for field in fields(kind) if not field.init}
    if kind.__dataclass_params__.frozen:
        read = {name: frozen(item) if isinstance(item, np.ndarray) else item for name, item in read.items()}
    result = kind(**{name: item for name, item in read.items() if name not in late})
    for name in late & read.keys():
        setattr(result, name, read[name])
    return result


def _array(value: Any, dtype: np.dtype[Any], where: str) -> Any:
    try:
        written, shape, data = value
        if np.dtype(written) != dtype:
            raise ValueError("another type of numbers")
        raw = zlib.decompressobj().decompress(base64.b64decode(data, validate=True), MAX_ARRAY_BYTES)
        return np.frombuffer(raw, dtype).reshape(shape).copy()
    except (ValueError, TypeError, zlib.error) as error:
        raise InvalidArgumentError(f"{where} is no array of {dtype}: {error}") from None


def _digests(value: Any, where: str) -> list[bytes]:
    try:
        size, text = value
        data = base64.b64decode(text, validate=True)
        return [data[at : at + size] for at in range(0, len(data), size)] if data else []
    except (ValueError, TypeError) as error:
        raise InvalidArgumentError(f"{where} is no list of digests: {error}") from None


def _read(read: Callable[[Any], Any], value: Any, where: str) -> Any:
    try:
        return read(value)
    except (ValueError, TypeError):
        raise InvalidArgumentError(f"{where} has {str(value)[:20]!r}, which is not known") from None


def _bytes(key: str) -> bytes:
    return bytes.fromhex(key)


def _require(holds: bool, value: Any, where: str, what: str) -> None:
    if not holds:
        raise InvalidArgumentError(f"{where} is {str(value)[:20]!r}: it must be {what}")
