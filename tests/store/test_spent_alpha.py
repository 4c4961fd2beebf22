"""The numbers of tests that spend alpha: given once, stored before they are used, and read from any state."""

from __future__ import annotations

import json

import pytest
from tests.support.stores import LateWrites

from hemostat.store import spent_alpha
from hemostat.store.spent_alpha import OTHERS, SpentAlpha

KEY = "a sort.tests"


def restarted(writes: LateWrites) -> SpentAlpha:
    spent = SpentAlpha(KEY, writes)
    spent.restore(writes.states.get(KEY))
    return spent


def test_a_number_is_usable_once_it_is_stored() -> None:
    writes = LateWrites()
    writes.away = True
    spent = restarted(writes)
    spent.spend({"a": 1})
    assert not spent.is_stored(1, "a")
    writes.write()
    assert spent.is_stored(1, "a")
    writes.away = True
    spent.spend({"a": 2, "b": 1})
    assert spent.is_stored(1, "a"), "an older test goes on"
    assert not spent.is_stored(2, "a")
    assert not spent.is_stored(1, "b")
    writes.lose()
    spent = restarted(writes)
    assert (spent.get("a"), spent.get("b")) == (1, 0)
    assert spent.is_stored(1, "a")


def test_numbers_that_were_given_already_write_nothing() -> None:
    writes = LateWrites()
    spent = restarted(writes)
    spent.spend({"a": 3})
    queued = writes.queued()
    spent.spend({"a": 3})
    spent.spend({"a": 1})
    spent.spend({})
    assert (writes.queued(), spent.get("a")) == (queued, 3)


def test_a_single_number_is_stored_as_it_was_before() -> None:
    writes = LateWrites()
    writes.states[KEY] = "7"
    spent = restarted(writes)
    assert spent.is_stored(7)
    spent.spend({OTHERS: 8})
    assert writes.states[KEY] == "8"
    assert restarted(writes).get("any name") == 8


def test_the_number_of_names_is_bounded_and_no_number_is_given_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spent_alpha, "MAX_NAMES", 3)
    writes = LateWrites()
    spent = restarted(writes)
    given: dict[str, list[int]] = {}
    for n in [*range(10), 0, 0, *range(10)]:
        name = f"kind {n}"
        number = spent.get(name) + 1
        spent.spend({name: number})
        assert spent.is_stored(number, name)
        assert number not in given.setdefault(name, [])
        given[name].append(number)
    assert len(spent.counts) == 4
    assert restarted(writes).counts == spent.counts


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ("nonsense", {}),
        ("[1]", {}),
        ("null", {}),
        ("true", {}),
        ('{"a": 2, "b": "x", "c": -1, "d": 1.5, "e": true}', {"a": 2}),
        (json.dumps({"a": 1, "": 4}), {"a": 1, "": 4}),
    ],
)
def test_what_is_damaged_does_not_hide_the_rest(stored: str, expected: dict[str, int]) -> None:
    writes = LateWrites()
    writes.states[KEY] = stored
    assert restarted(writes).counts == expected
