"""The names under which the guard has its tests, here and in the store."""

from __future__ import annotations

from typing import NewType

GuardKey = NewType("GuardKey", str)
"""The name of a test of the guard: of the test of a candidate, or of the watch of what serves."""
WATCH = GuardKey("serving")
"""The name of the tests of what serves."""


def candidate_key(version: str) -> GuardKey:
    """Returns the name of the tests of a candidate.

    The space at its end is in what earlier versions have stored, too: the scope followed it, and an empty one was all
    traffic.

    >>> candidate_key("0123abcd")
    'candidate 0123abcd '
    """
    return GuardKey(f"candidate {version} ")
