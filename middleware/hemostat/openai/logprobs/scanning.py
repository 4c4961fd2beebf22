"""vLLM's own serialization of a chat's `logprobs`, read with arithmetic on eight characters at a time.

Nine tenths of such JSON are the same characters again and again, and any parser needs about a nanosecond for each. So
the ids are found by the only letter `d` of an entry,

    {"token":"token_id:485","logprob":-0.7262895703315735,"bytes":[116,…,53]}
                      ^
and the digits that follow are turned into numbers for all entries at once: eight characters are one 64-bit integer (the
first character in its lowest byte), and numpy computes with all of these integers together. Known as SWAR, "SIMD within
a register"; the steps of `_number` are those of D. Lemire, "Quickly parsing eight digits" (2018).

Whatever is not exactly of this form is left to `rows.parse_rows`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

_Words = npt.NDArray[np.uint64]
_Places = npt.NDArray[np.int64]

_PADDING = bytes(64)
"""After the last entry, so that eight characters can be read from any place that is looked at."""
_u64 = np.uint64
_DIGITS = _u64(0x3030303030303030)
_BYTE_ABOVE_9 = _u64(0x7676767676767676)
_HIGH_BITS = _u64(0x8080808080808080)
_LOW_HALVES = _u64(0x0F0F0F0F0F0F0F0F)
_PAIRS, _QUADS, _ALL = _u64(0x00FF00FF00FF00FF), _u64(0x0000FFFF0000FFFF), _u64(0xFFFFFFFF)
_QUOTES_OF_ENTRY = 8
_QUOTES_OF_POSITION = 2
"""Of `"top_logprobs"`."""
_QUOTES_OF_PIECE = 2
"""Of `"content"`."""
_END = b"]}]}]}"
"""Of a piece."""
_BETWEEN = len('","logprob":')
"""Between an id and its log-probability."""

_float: msgspec.json.Decoder[float] = msgspec.json.Decoder(float)


def _word(text: bytes) -> np.uint64:
    return _u64(int.from_bytes(text, "little"))


_ID_NAME, _NAME_START, _NAME_END = _word(b"oken_id:"), _word(b'","logpr'), _word(b'ogprob":')


def scan_chat(
    pieces: Sequence[bytes], output: Sequence[int], top_k: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], npt.NDArray[np.float32]] | None:
    """See `rows.Rows`; None where the JSON has another form, is malformed, or does not fit `output`.

    It has to list at each position the emitted id, then `top_k` different ones of which the first is that id again.
    What the arrays `bytes` hold is not looked at. Numbers are exact to 1e-15, so that those that were float32 are the
    same again.
    """
    if sys.byteorder == "big" or not output or not all(piece.endswith(_END) for piece in pieces):
        return None
    data = b"".join([*pieces, _PADDING])
    characters = np.frombuffer(data, np.uint8)
    shape = (len(output), top_k + 1)
    starts = _places_of(characters, ord("d"))
    quotes = _QUOTES_OF_ENTRY * len(starts) + _QUOTES_OF_POSITION * len(output) + _QUOTES_OF_PIECE * len(pieces)
    if starts.size != shape[0] * shape[1] or np.count_nonzero(characters == ord('"')) != quotes:
        return None
    starts += 2
    words: _Words = as_strided(characters[:8].view(_u64), (len(data) - 7,), (1,))
    ids, digits = _integers(words, starts)
    ends = starts + digits
    named = (words[starts - len("oken_id:")] == _ID_NAME) & (words[ends] == _NAME_START)
    if not (named & (words[ends + 4] == _NAME_END) & (digits > 0) & (digits < 8)).all():
        return None
    ids = ids.reshape(shape)
    emitted = ids[:, 0]
    if (emitted != np.asarray(output)).any() or (ids[:, 1] != emitted).any():
        return None
    values = _decimals(data, characters, words, ends + _BETWEEN)
    return None if values is None else _sorted(ids[:, 1:], values.reshape(shape))


def _places_of(characters: npt.NDArray[np.uint8], character: int) -> _Places:
    """Where this character is, if no two of its places are within eight characters of each other."""
    found = characters == character
    eights: _Words = found[: len(found) // 8 * 8].view(_u64)
    at = np.flatnonzero(eights != 0)
    places: _Places = (at << 3) + (np.bitwise_count(eights[at] - _u64(1)) >> 3)
    return places


def _digits(words: _Words) -> tuple[_Words, _Words, npt.NDArray[np.int64]]:
    """The characters as values of digits, a mask of the bits of those before the first that is none, their number."""
    values = words ^ _DIGITS
    others = ((values + _BYTE_ABOVE_9) | values) & _HIGH_BITS
    lowest = others & (~others + _u64(1))
    mask = (lowest >> _u64(7)) - _u64(1)
    return values, mask, (np.bitwise_count(mask) >> 3).astype(np.int64)


def _number(digits: _Words) -> _Words:
    """The number that eight digits are; the first is in the lowest byte."""
    pairs = (digits * _u64(10) + (digits >> _u64(8))) & _PAIRS
    quads = (pairs * _u64(100) + (pairs >> _u64(16))) & _QUADS
    return (quads * _u64(10_000) + (quads >> _u64(32))) & _ALL


def _integers(words: _Words, starts: _Places) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """The numbers of fewer than eight digits that begin there, and how many digits each has."""
    values, _, digits = _digits(words[starts])
    shift = ((8 - digits) << 3).astype(_u64)
    return _number(values << shift).astype(np.int32), digits


def _decimals(
    data: bytes, characters: npt.NDArray[np.uint8], words: _Words, starts: _Places
) -> npt.NDArray[np.float64] | None:
    """The numbers that begin there and end before a comma; None where one is malformed.

    Fast for a minus, one or two digits, a point and up to 23 digits, of which 16 count.
    """
    integers, _, places = _digits(words[starts + 1])
    first, second = integers & _u64(15), (integers >> _u64(8)) & _u64(15)
    whole = np.where(places == 1, first, first * _u64(10) + second)
    point = starts + places + 1
    fraction = words[np.stack((point + 1, point + 9, point + 17))]
    values, mask, digits = _digits(fraction)
    parts = _number(values[:2] & mask[:2] & _LOW_HALVES)
    first_full = digits[0] == 8
    count = digits[0] + first_full * (digits[1] + (digits[1] == 8) * digits[2])
    found: npt.NDArray[np.float64] = -(whole + (parts[0] * 1e-8 + first_full * parts[1] * 1e-16))
    usual = (
        (characters[starts] == ord("-"))
        & (characters[point] == ord("."))
        & (places > 0)
        & (places < 3)
        & ((first > 0) | (places == 1))
        & (count > 0)
        & (count < 24)
        & (characters[point + 1 + count] == ord(","))
    )
    for at in np.flatnonzero(~usual).tolist():
        start = int(starts[at])
        try:
            found[at] = _float.decode(data[start : data.index(b",", start)])
        except (ValueError, msgspec.MsgspecError):
            return None
    return found


def _sorted(ids: npt.NDArray[np.int32], values: npt.NDArray[np.float64]) -> tuple[Any, Any, Any] | None:
    """ids: [T, top_k]; values: [T, top_k + 1], the emitted id's first. None where an id is there twice."""
    listed = values[:, 1:]
    if (listed[:, 1:] > listed[:, :-1]).any():
        # vLLM lists the emitted token first, whatever its rank.
        order = np.argsort(-listed, axis=1, kind="stable")
        ids, listed = np.take_along_axis(ids, order, 1), np.take_along_axis(listed, order, 1)
    by_id = np.sort(ids, axis=1)
    if (by_id[:, 1:] == by_id[:, :-1]).any():
        return None
    rows, width = values.shape
    padded_ids, padded = np.full((rows, width), -1, np.int32), np.full((rows, width), -np.inf, np.float32)
    padded_ids[:, :-1], padded[:, :-1] = ids, listed
    return padded_ids, padded, values[:, 0].astype(np.float32)
