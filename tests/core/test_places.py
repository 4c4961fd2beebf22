"""Figures by position, length of the context and phase: each token is in one bucket of each."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.records import make_record
from tests.support.world import World

from hemostat_calibration.divergence.places import (
    ANSWER,
    CONTEXT_EDGES,
    POSITION_EDGES,
    THINKING,
    bucket_labels,
    buckets,
    by_context,
    by_phase,
    by_position,
)
from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.reasoning import Thinking

RECORD = make_record(World(noise=0.3).truth(1), 8)
"""Forty tokens."""


@given(st.integers(0, 200_000), st.integers(0, 300), st.sampled_from([POSITION_EDGES, CONTEXT_EDGES, (1,)]))
def test_every_value_is_in_the_bucket_of_its_name(first: int, tokens: int, edges: tuple[int, ...]) -> None:
    names = bucket_labels(edges)
    result = buckets(first, tokens, edges)
    assert len(result) == tokens
    for value, bucket in zip(range(first, first + tokens), result.tolist(), strict=True):
        low, _, high = names[bucket].partition("-")
        assert int(low.rstrip("+")) <= value
        assert not high or value <= int(high)


def test_values_below_zero_have_no_bucket() -> None:
    with pytest.raises(InvalidArgumentError):
        buckets(-1, 3, POSITION_EDGES)


@given(st.integers(0, 5_000), st.integers(0, 200_000), st.data())
def test_a_records_tokens_are_in_one_bucket_each(position: int, context: int, data: st.DataObject) -> None:
    last = position + RECORD.tokens
    begin = data.draw(st.integers(0, last))
    thinking = Thinking(begin, data.draw(st.integers(begin, last)), ended=True)
    record = replace(RECORD, position=position, context_tokens=context, thinking=thinking)
    for masks in (by_position(record), by_context(record), by_phase(record)):
        if masks:
            assert (np.sum(list(masks.values()), axis=0) == 1).all()
        assert all(mask.any() for mask in masks.values())
    assert bool(by_context(record)) == (context > 0)
    result = by_phase(record).get(THINKING, np.zeros(RECORD.tokens, bool))
    assert result.sum() == max(0, thinking.answer_start - max(begin, position))


def test_without_thinking_there_are_no_phases() -> None:
    assert by_phase(RECORD) == {}
    only = by_phase(replace(RECORD, thinking=Thinking(0, RECORD.tokens, ended=False)))
    assert list(only) == [THINKING]
    none = by_phase(replace(RECORD, position=9, thinking=Thinking(0, 5, ended=True)))
    assert list(none) == [ANSWER]
