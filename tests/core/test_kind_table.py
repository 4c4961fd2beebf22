"""Kinds of traffic are followed in bounded memory, and frequent ones find a place."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.statistics.kind_table import (
    HALF_LIFE_SECONDS,
    MAX_COUNTED,
    MAX_NAME_LENGTH,
    MIN_SEEN,
    KindTable,
)


def table(names: list[str], limit: int = 2) -> KindTable:
    made = KindTable(limit)
    for name in names:
        made = made.update(name)
    return made


def test_a_free_place_is_given_at_first_sight_and_kept_against_a_kind_as_frequent() -> None:
    assert table(["a", "b", "c"] * 500).followed == ("a", "b")


def test_a_kind_seen_more_than_twice_as_often_takes_the_place_of_the_rarest() -> None:
    names = ["a"] * 100 + ["b"] * 40
    assert table(names + ["c"] * 80).followed == ("a", "b")
    assert table(names + ["c"] * 81).followed == ("a", "c")


def test_a_few_requests_take_no_place() -> None:
    assert table(["a", "b"] + ["c"] * (MIN_SEEN - 1)).followed == ("a", "b")
    assert table(["a", "b"] + ["c"] * MIN_SEEN).followed == ("b", "c")


def test_a_name_that_must_be_kept_does_not_lose_its_place() -> None:
    made = table(["a", "b", "b"])
    for _ in range(100):
        made = made.update("c", keep={"a"})
    assert made.followed == ("a", "c")
    for _ in range(500):
        made = made.update("d", keep={"a", "c"})
    assert made.followed == ("a", "c")


def test_names_that_are_seen_once_each_take_no_place() -> None:
    """With Space-Saving their counts grow with the least one; only what is certainly theirs counts."""
    made = table(["a", "b"] * 30 + [f"n{n}" for n in range(40 * MAX_COUNTED)])
    assert made.followed == ("a", "b")
    assert len(made.counts) == MAX_COUNTED
    assert max(map(made.seen, made.counts)) == 30


@pytest.mark.parametrize("name", ["", "x" * (MAX_NAME_LENGTH + 1)])
def test_a_name_that_is_missing_or_too_long_is_not_counted(name: str) -> None:
    assert table([name]) == KindTable(2)


@given(st.lists(st.sampled_from([f"n{n}" for n in range(300)]), max_size=600), st.integers(1, 24))
def test_it_is_bounded_and_never_counts_too_much(names: list[str], limit: int) -> None:
    made = KindTable(limit)
    for name in names:
        before, made = made, made.update(name)
        assert len(set(made.followed) - set(before.followed)) <= 1
        assert len(set(before.followed) - set(made.followed)) <= 1
    assert len(made.followed) <= limit
    assert len(made.counts) <= MAX_COUNTED
    assert all(made.seen(name) <= names.count(name) for name in made.counts)
    assert KindTable.load(made.save(), limit) == made


def test_a_smaller_limit_keeps_the_most_frequent() -> None:
    made = table(["a", "b", "b", "c", "c", "c"], limit=3)
    assert KindTable.load(made.save(), 2).followed == ("b", "c")
    assert KindTable.load(made.save(), 4).update("d").followed == ("a", "b", "c", "d")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{}",
        b'{"counts": {}, "followed": ["a"]}',
        b'{"counts": {"a": [1, 2]}, "followed": []}',
        b'{"counts": {"a": 1}, "followed": []}',
        b'{"counts": {"a": [1, 0]}, "followed": ["a"]}',
        b'{"counts": {"a": [Infinity, 0]}, "followed": ["a"], "decayed": 0}',
        b'{"counts": {"a": [1, 0]}, "followed": ["a", "a"]}',
    ],
)
def test_damaged_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidArgumentError, match="not a table of kinds"):
        KindTable.load(data, 2)


@pytest.mark.parametrize("limit", [0, MAX_COUNTED])
def test_a_limit_out_of_range_is_refused(limit: int) -> None:
    with pytest.raises(InvalidArgumentError, match="limit"):
        KindTable(limit)


def test_a_shift_of_the_traffic_changes_what_is_followed() -> None:
    names = list(itertools.chain(*(["a", "b", "c"] * 50, ["d"] * 120)))
    assert table(names, limit=3).followed == ("b", "c", "d")


def test_counts_decay_with_time_and_not_with_requests() -> None:
    made = KindTable(2)
    for _ in range(1000):
        made = made.update("a", now=1e6)
    assert made.seen("a") == 1000.0
    made = made.update("b", now=1e6 + HALF_LIFE_SECONDS)
    assert (made.seen("a"), made.seen("b"), made.total) == (500.0, 1.0, 501.0)
    assert KindTable.load(made.save(), 2) == made
    assert made.update("b", now=0.0).seen("a") == 500.0, "a clock that goes back"


def test_every_request_is_counted_once_in_the_total() -> None:
    table = KindTable(limit=2)
    for n in range(3 * MAX_COUNTED):
        table = table.update(f"kind {n}")
    assert table.total == 3 * MAX_COUNTED
