"""The spelling of the guard's tests in the store: it is one to one, and reads what earlier versions have stored."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hemostat.profiles.guard_keys import WATCH, GuardKey

VERSIONS = st.text(st.characters(exclude_characters=" "), min_size=1, max_size=40)
KEYS = st.one_of(st.just(WATCH), VERSIONS.map(GuardKey))


@given(KEYS)
def test_what_is_stored_is_read_as_the_same_key(key: GuardKey) -> None:
    assert GuardKey.parse(key.stored) == key


@given(KEYS, KEYS)
def test_two_keys_have_two_spellings(one: GuardKey, other: GuardKey) -> None:
    assert (one.stored == other.stored) == (one == other)


@given(st.one_of(st.text(max_size=20), st.text(max_size=20).map("candidate {}".format)))
def test_a_text_is_the_spelling_of_the_key_that_it_is_read_as_or_of_none(text: str) -> None:
    key = GuardKey.parse(text)
    assert key is None or key.stored == text


def test_the_spelling_does_not_change() -> None:
    assert WATCH.stored == "serving"
    assert GuardKey("0123abcd").stored == "candidate 0123abcd "
    assert GuardKey("serving") != WATCH, "a version of this name is a candidate's"


@pytest.mark.parametrize("other", ["", "candidate", "candidate  ", "candidate v", "candidate v /v1/chat", "serving "])
def test_tests_that_this_version_does_not_have_are_no_key(other: str) -> None:
    assert GuardKey.parse(other) is None
