"""Captures as Arrow columns, and back: the schema of segments, which docs/formats.md explains."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

import msgspec
import numpy as np
import pyarrow as pa

from hemostat.ipc.messages import Capture
from hemostat.scoring.spool.spooled import Spooled, SpooledTap

SCHEMA_VERSION: Final = "1"
VERSION_KEY: Final = b"hemostat.captures"
"""The key of the schema's metadata that has its version."""

MAX_COLUMN_BYTES = 2**31 - 1
"""The largest size of a column in one piece: its offsets are int32."""
_TEXT, _BYTES = pa.string(), pa.binary()
_SCALARS: dict[str, pa.DataType] = {
    "request_id": _TEXT,
    "choice": pa.int32(),
    "choices": pa.int32(),
    "route": _TEXT,
    "model": _TEXT,
    "adapter": _TEXT,
    "label": _TEXT,
    "kind": _TEXT,
    "arm": _TEXT,
    "requested": _TEXT,
    "conversation": _BYTES,
    "client": _BYTES,
    "engine": _TEXT,
    "engine_drawn": pa.bool_(),
    "stream": pa.bool_(),
    "tools": pa.bool_(),
    "reasoning": pa.bool_(),
    "grammar": pa.bool_(),
    "temperature": pa.float64(),
    "top_p": pa.float64(),
    "sampling_top_k": pa.int32(),
    "min_p": pa.float64(),
    "decoding": _BYTES,
    "finish_reason": _TEXT,
    "top_k": pa.int32(),
}
"""The columns that are fields of a `Capture` as they are."""
_ARRAYS = ("prompt_token_ids", "output_token_ids", "candidate_ids", "candidate_logprobs", "emitted_logprobs")
"""The columns that are arrays of a `Capture`, as their little-endian bytes. They are no lists, since DuckDB 2.0 cannot
read a nested column of an encrypted file.
"""
_COMPRESSED = frozenset({"prompt_token_ids", "output_token_ids", "tap"})
"""The columns that are compressed. Candidates hardly repeat, and would take more processor time than all else. The
other columns are short."""
SCHEMA = pa.schema(
    [
        pa.field("at", pa.float64()),
        pa.field("probability", pa.float64()),
        *(pa.field(name, kind) for name, kind in _SCALARS.items()),
        *(pa.field(name, _BYTES) for name in _ARRAYS),
        pa.field("tap", _BYTES),
    ],
    {VERSION_KEY: SCHEMA_VERSION.encode()},
)

PART_ROWS = 128
"""The number of rows that are written at a time: more of them leave the processor's caches."""
COMPRESSION: Final = {name: "zstd" if name in _COMPRESSED else "none" for name in SCHEMA.names}
"""The compression of each column, as the control process writes it."""


def in_parts(captures: Iterable[Spooled]) -> Iterator[pa.Table]:
    """Yields captures as rows, some at a time: memory that is used again takes half of the time."""
    rest = iter(captures)
    while part := list(itertools.islice(rest, PART_ROWS)):
        yield to_rows(part)


def to_rows(captures: Sequence[Spooled]) -> pa.Table:
    """Returns captures as rows. Each has its candidates as arrays (`capture_arrays.decode_capture`)."""
    taps = [None if spooled.tap is None else msgspec.msgpack.encode(spooled.tap) for spooled in captures]
    columns: list[Any] = [
        pa.array([spooled.at for spooled in captures], pa.float64()),
        pa.array([spooled.probability for spooled in captures], pa.float64()),
        *(pa.array([getattr(s.capture, name) for s in captures], kind) for name, kind in _SCALARS.items()),
        *(_column([getattr(s.capture, name) for s in captures]) for name in _ARRAYS),
        pa.array(taps, _BYTES),
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def _column(values: Sequence[bytes]) -> pa.Array:
    """Returns a column of bytes. Arrow's own way copies again each time that its buffer grows."""
    ends = np.cumsum([0, *map(len, values)])
    if ends[-1] > MAX_COLUMN_BYTES:
        return pa.array(values, _BYTES)  # in several chunks
    buffers = [None, pa.py_buffer(ends.astype("<i4")), pa.py_buffer(b"".join(values))]
    return pa.Array.from_buffers(_BYTES, len(values), buffers)


def from_rows(rows: pa.Table) -> Iterator[Spooled]:
    """Yields the captures of rows, in their order. Columns that the schema does not have are left alone."""
    for values in rows.select(SCHEMA.names).to_pylist():
        at, probability, tap = values.pop("at"), values.pop("probability"), values.pop("tap")
        capture = Capture(nonce="", captured_at=0.0, **values)
        result = None if tap is None else msgspec.msgpack.decode(tap, type=SpooledTap)
        yield Spooled(capture, at, probability, result)
