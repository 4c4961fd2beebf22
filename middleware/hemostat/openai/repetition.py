"""Answers that repeat themselves to their end."""

from __future__ import annotations

from typing import Final

LOOP_COPIES: Final = 4
MIN_LOOP_CHARACTERS: Final = 48
"""A loop: the text ends in LOOP_COPIES copies of one block, MIN_LOOP_CHARACTERS or more in all. A run of one character
(the ruler `-----`) is not a loop."""


def ends_in_loop(text: str) -> bool:
    """Returns True if the text ends in LOOP_COPIES copies of one block that is not a run of one character.

    >>> ends_in_loop("It began well. " + "and then again " * 12)
    True
    >>> ends_in_loop("-" * 100)
    False
    """
    if len(text) < MIN_LOOP_CHARACTERS:
        return False
    end = text[-MIN_LOOP_CHARACTERS // LOOP_COPIES :]
    if end[0] == end[1] and end == end[0] * len(end):
        return False
    # In a loop, the last characters also stand one period earlier: the nearest such place is the only candidate.
    before = text.rfind(end, 0, len(text) - 1)
    if before < 0:
        return False
    period = len(text) - len(end) - before
    whole = max(LOOP_COPIES * period, MIN_LOOP_CHARACTERS)
    return len(text) >= whole and text[-whole:-period] == text[-whole + period :]
