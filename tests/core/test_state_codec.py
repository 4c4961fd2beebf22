"""What is stored of a dataclass is read as its fields say, or refused in one line that names the field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
import pytest

from hemostat_calibration.arrays import Floats
from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.state_codec import decode, encode


class Colour(StrEnum):
    RED = "red"


@dataclass(frozen=True)
class One:
    number: float


@dataclass(frozen=True)
class Other:
    number: float


@dataclass(slots=True)
class Whole:
    count: int
    colour: Colour
    part: One | Other
    none: One | None
    rows: Floats
    by_name: Mapping[str, One]
    pairs: list[tuple[int, float]]
    clients: dict[bytes, int]
    digests: dict[bytes, None]
    late: bool = field(init=False, default=False)


def whole() -> Whole:
    rows = np.array([[1.5, np.inf], [0.0, 0.0]])
    made = Whole(3, Colour.RED, Other(2.0), None, rows, {"a": One(1.0)}, [(1, 0.5)], {b"\x01": 2}, {b"ab": None})
    made.late = True
    return made


def test_what_is_read_is_what_was_stored() -> None:
    result = decode(Whole, encode(whole(), 1), 1)
    assert (result.rows == whole().rows).all()
    assert result.rows.dtype == np.float64
    result.rows[0] = 0.0  # a mutable class changes its arrays
    assert repr(result) == repr(decode(Whole, encode(result, 1), 1))
    assert (result.part, result.none, result.colour, result.late) == (Other(2.0), None, Colour.RED, True)
    assert (result.by_name, result.pairs) == ({"a": One(1.0)}, [(1, 0.5)])
    assert (result.clients, result.digests) == ({b"\x01": 2}, {b"ab": None})


@pytest.mark.parametrize(
    ("written", "other", "says"),
    [
        (b'"count":3', b'"count":3.0', "Whole.count is '3.0': it must be a whole number"),
        (b'"count":3', b'"count":true', "Whole.count is 'True'"),
        (b'"count":3,', b"", "Whole.count is missing"),
        (b'"count":3', b'"count":3,"more":1', "Whole.more is unknown"),
        (b'"red"', b'"blue"', "Whole.colour has 'blue', which is not known"),
        (b'"is":"Other"', b'"is":"int"', "Whole.part is .*: it must be one of One, Other"),
        (b'"number":2.0', b'"number":"2"', "Whole.part.number is '2': it must be a number"),
        (b'"none":null', b'"none":1', "Whole.none is '1': it must be an object"),
        (b'["<f8",[2,2]', b'["<f8",[2,3]', "Whole.rows is no array of float64"),
        (b'["<f8",[2,2]', b'["<i8",[2,2]', "Whole.rows is no array of float64"),
        (b'"a":', b'"b":0,"a":', r"Whole.by_name\['b'\] is '0'"),
        (b"[[1,0.5]]", b"[[1,0.5,2]]", r"Whole.pairs\[0\] is .*: it must be a list of 2"),
        (b'{"01":2}', b'{"0":2}', "Whole.clients has '0', which is not known"),
        (b'[2,"', b'[0,"', "Whole.digests is no list of digests"),
        (b'"schema":1', b'"schema":2', "has schema 2, this version reads 1"),
        (b'{"schema"', b'["schema"', "not a stored Whole"),
    ],
)
def test_anything_else_is_refused_with_the_field(written: bytes, other: bytes, says: str) -> None:
    data = encode(whole(), 1)
    assert written in data
    with pytest.raises(InvalidArgumentError, match=says) as raised:
        decode(Whole, data.replace(written, other), 1)
    assert "\n" not in str(raised.value)


def test_an_array_that_is_too_large_is_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(whole(), 1)
    monkeypatch.setattr("hemostat_calibration.state_codec.MAX_ARRAY_BYTES", 16)
    with pytest.raises(InvalidArgumentError, match=r"Whole\.rows is no array"):
        decode(Whole, data, 1)


@dataclass(frozen=True)
class _WithJson:
    value: Mapping[str, Any] | None


@pytest.mark.parametrize("value", [None, {}, {"a": [1, None, {"b": "c"}]}])
def test_a_json_value_is_stored_as_it_is(value: dict[str, Any] | None) -> None:
    assert decode(_WithJson, encode(_WithJson(value), 1), 1) == _WithJson(value)
