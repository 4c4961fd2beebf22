"""Frames, cut anywhere."""

from __future__ import annotations

import io
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hemostat.ipc.framing import FrameReader, frame, read_frames


@given(st.lists(st.binary(max_size=40), max_size=6), st.lists(st.integers(0, 300), max_size=8))
def test_bodies_come_out_whole_wherever_the_stream_is_cut(bodies: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(map(frame, bodies))
    edges = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    reader = FrameReader()
    result = [body for start, end in itertools.pairwise(edges) for body in reader.feed(stream[start:end])]
    assert result == bodies
    assert list(read_frames(io.BytesIO(stream))) == bodies


def test_an_incomplete_last_frame_is_dropped() -> None:
    assert list(read_frames(io.BytesIO(frame(b"whole") + frame(b"cut")[:-1]))) == [b"whole"]


def test_a_frame_that_is_too_long_is_refused_before_it_is_read() -> None:
    reader = FrameReader(max_bytes=10)
    assert reader.feed(frame(b"x" * 10)) == [b"x" * 10]
    with pytest.raises(ValueError, match="at most 10"):
        reader.feed((11).to_bytes(4, "big"))
