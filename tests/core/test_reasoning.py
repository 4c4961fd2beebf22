"""The split of an output into thinking and answer, compared with a search that is written out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.reasoning import MAX_IDS, MAX_SEQUENCES, Markers, Thinking, find_thinking, thinking_mask

IDS = st.lists(st.integers(0, 4), max_size=24)
SEQUENCES = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=3).map(tuple), max_size=3).map(tuple)


def ids(values: list[int]) -> np.ndarray:
    return np.array(values, np.int32)


def oracle(prompt: list[int], output: list[int], markers: Markers) -> Thinking | None:
    """Position by position."""

    def at(values: list[int], position: int, sequences: tuple[tuple[int, ...], ...]) -> int:
        """Length of the longest sequence that begins there; 0: none does."""
        return max(
            (len(sequence) for sequence in sequences if tuple(values[position : position + len(sequence)]) == sequence),
            default=0,
        )

    def ends(sequences: tuple[tuple[int, ...], ...]) -> int:
        places = [-1]
        for position in range(len(prompt)):
            places += [
                position + len(sequence)
                for sequence in sequences
                if tuple(prompt[position : position + len(sequence)]) == sequence
            ]
        return max(places)

    started, ended = ends(markers.start), ends(markers.end)
    own = next((n for n in range(len(output)) if at(output, n, markers.start)), None)
    first_end = next((n for n in range(len(output)) if at(output, n, markers.end)), None)
    if started > ended or (started == ended == -1 and first_end is not None and (own is None or first_end < own)):
        begin = 0
    elif own is not None:
        begin = own
    else:
        return None
    for position in range(begin, len(output)):
        if length := at(output, position, markers.end):
            return Thinking(begin, position + length, ended=True)
    return Thinking(begin, len(output), ended=False)


@given(IDS, IDS, SEQUENCES, SEQUENCES.filter(bool))
def test_the_split_is_that_of_a_search_by_hand(prompt: list[int], output: list[int], start: tuple, end: tuple) -> None:
    markers = Markers(start, end)
    result = find_thinking(ids(prompt), ids(output), markers)
    assert result == oracle(prompt, output, markers)
    if result is not None:
        assert 0 <= result.begin <= result.answer_start <= len(output)
        assert result.ended or result.answer_start == len(output)
        assert int(thinking_mask(result, 0, len(output)).sum()) == result.tokens


@given(IDS, IDS, SEQUENCES, SEQUENCES.filter(bool), st.data())
def test_the_mask_of_a_part_is_a_part_of_the_mask(
    prompt: list[int], output: list[int], start: tuple, end: tuple, data: st.DataObject
) -> None:
    result = find_thinking(ids(prompt), ids(output), Markers(start, end))
    first = data.draw(st.integers(0, len(output)))
    whole = thinking_mask(result, 0, len(output))
    assert thinking_mask(result, first, len(output) - first).tolist() == whole[first:].tolist()


START, END = 100, 101
ONE_TOKEN = Markers(((START,),), ((END,),))


@pytest.mark.parametrize(
    ("prompt", "output", "expected"),
    [
        pytest.param([1], [START, 2, END, 3], Thinking(0, 3, True), id="the model begins it"),
        pytest.param([1, START], [2, END, 3], Thinking(0, 2, True), id="the template begins it"),
        pytest.param([1, START, END], [2, 3], None, id="the template skips it"),
        pytest.param([1], [2, 3], None, id="no thinking"),
        pytest.param([1], [2, END, 3], Thinking(0, 2, True), id="an end that nothing began"),
        pytest.param([1], [2, END, START, 3], Thinking(0, 2, True), id="an end before the first beginning"),
        pytest.param([START, 5, END, 1], [2, END, 3], None, id="an end behind an earlier turn's thinking"),
        pytest.param([1, START], [2, END], Thinking(0, 2, True), id="ends with the last token"),
        pytest.param([1, START], [2, START, END, 4], Thinking(0, 3, True), id="both begin it"),
        pytest.param([START, 5, END, 1], [START, 2], Thinking(0, 2, False), id="an earlier turn's thinking"),
        pytest.param([1], [START, END, 3, START, END], Thinking(0, 2, True), id="the first span only"),
        pytest.param([1], [9, START, 2, END, 3], Thinking(1, 4, True), id="a word first"),
    ],
)
def test_where_thinking_begins_and_ends(prompt: list[int], output: list[int], expected: Thinking | None) -> None:
    assert find_thinking(ids(prompt), ids(output), ONE_TOKEN) == expected


def test_a_marker_of_several_ids_that_is_cut_in_several_ways() -> None:
    markers = Markers(start=((1, 2, 3),), end=((4, 2, 3), (14, 2, 3), (4, 2, 13)))
    for end in markers.end:
        output = [1, 2, 3, 9, *end, 9]
        assert find_thinking(ids([9]), ids(output), markers) == Thinking(0, 7, True)
    assert find_thinking(ids([9]), ids([1, 2, 3, 9, 4, 2]), markers) == Thinking(0, 6, False)


@pytest.mark.parametrize(
    ("start", "end"),
    [
        (((1,),), ()),
        (((),), ((1,),)),
        (((1,),), (tuple(range(MAX_IDS + 1)),)),
        (((1,),) * (MAX_SEQUENCES + 1), ((1,),)),
    ],
)
def test_markers_that_cannot_be_searched_for(start: tuple, end: tuple) -> None:
    with pytest.raises(InvalidArgumentError):
        Markers(start, end)
