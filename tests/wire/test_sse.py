"""The parser against an implementation of the standard that reads the whole stream at once."""

from __future__ import annotations

import itertools

from hypothesis import example, given
from hypothesis import strategies as st
from tests.support.memory import kept_bytes

from hemostat.openai import sse

NEWLINES = st.sampled_from([b"\n", b"\r\n", b"\r"])
LINES = st.one_of(
    st.just(b""),
    st.binary(max_size=6).map(lambda value: b"data: " + value.replace(b"\n", b"").replace(b"\r", b"")),
    st.sampled_from([b"data", b"data:", b"data:x", b"data:  y", b"datum: z", b": comment", b"event: e", b"id: 1"]),
)


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    return b"".join(draw(LINES) + draw(NEWLINES) for _ in range(draw(st.integers(0, 12)))) + draw(LINES)


@st.composite
def cuts(draw: st.DrawFn, data: bytes) -> list[bytes]:
    places = sorted({0, len(data), *draw(st.lists(st.integers(0, len(data)), max_size=8))})
    return [data[a:b] for a, b in itertools.pairwise(places)]


def oracle(stream: bytes) -> list[bytes]:
    """The data of every complete event by the standard: lines, and then a blank line that dispatches the event."""
    lines, line, position = [], b"", 0
    while position < len(stream):
        if stream[position : position + 2] == b"\r\n":
            width = 2
        elif stream[position : position + 1] in (b"\r", b"\n"):
            width = 1
        else:
            line += stream[position : position + 1]
            position += 1
            continue
        lines.append(line)
        line = b""
        position += width
    events: list[bytes] = []
    data: list[bytes] = []
    for line in lines:
        if not line:
            if data:
                events.append(b"\n".join(data))
            data = []
            continue
        name, colon, value = line.partition(b":")
        if name == b"data":
            data.append(value.removeprefix(b" ") if colon else b"")
    return events


@given(st.data())
def test_any_chunking_gives_the_events_of_the_standard_and_every_byte(data: st.DataObject) -> None:
    stream = data.draw(streams())
    parser = sse.Parser()
    events = [event for piece in data.draw(cuts(stream)) for event in parser.feed(piece)]
    rest = parser.flush()
    assert [event.data for event in events if event.data is not None] == oracle(stream)
    assert b"".join(event.raw for event in events) + rest == stream


@given(st.data())
@example(None)
def test_a_replaced_event_reads_as_its_new_data(data: st.DataObject | None) -> None:
    stream = b"event: e\r\ndata: a\r\ndata: b\r\n\r\n" if data is None else data.draw(streams())
    for event in sse.Parser().feed(stream):
        if event.data is not None:
            [changed] = [event.data for event in sse.Parser().feed(event.replace(b'{"x":1}')) if event.data is not None]
            assert changed == b'{"x":1}'


def test_an_event_is_returned_with_its_last_byte() -> None:
    parser = sse.Parser()
    assert parser.feed(b"data: 1\n") == []
    [event] = parser.feed(b"\n")
    assert event.data == b"1"
    [event] = parser.feed(b"data: 2\r\n\r")
    assert event.data == b"2"
    [event] = parser.feed(b"\ndata: 3\n\n")
    assert event.data == b"3"


def test_only_the_data_changes_in_a_one_line_event() -> None:
    [event] = sse.Parser().feed(b": note\nid: 4\ndata:{}\nretry: 5\n\n")
    assert event.replace(b"[1]") == b": note\nid: 4\ndata:[1]\nretry: 5\n\n"


def test_an_oversized_event_is_passed_on_in_bounded_memory_and_the_next_is_parsed() -> None:
    parser = sse.Parser(max_event=100)
    empty = kept_bytes(parser)
    stream = b"data: " + b"x" * 1000 + b"\n\ndata: after\n\n"
    events = []
    for start in range(0, len(stream), 7):
        events += parser.feed(stream[start : start + 7])
        assert kept_bytes(parser) <= empty + 250
    assert b"".join(event.raw for event in events) == stream
    assert [event.data for event in events if event.data is not None] == [b"after"]
