"""The names of the guard's tests: each test has its own, and they are what earlier versions have stored."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hemostat.profiles.guard_keys import WATCH, candidate_key

VERSIONS = st.text(st.characters(exclude_characters=" "), min_size=1, max_size=40)


@given(VERSIONS, VERSIONS)
def test_two_candidates_have_two_names(one: str, other: str) -> None:
    assert (candidate_key(one) == candidate_key(other)) == (one == other)
    assert candidate_key(one) != WATCH


def test_the_names_do_not_change() -> None:
    assert WATCH == "serving"
    assert candidate_key("0123abcd") == "candidate 0123abcd "
    assert candidate_key("serving") != WATCH, "a version of this name is a candidate's"
