"""Tests of which `make test` runs a part, and `make test-slow` the rest."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import pytest


def slow_unless(quick: Collection[Any], cases: Sequence[Any]) -> list[Any]:
    """For `parametrize`: the cases, each a tuple of values or one value; those that are not `quick` are slow."""
    assert set(quick) <= set(cases), "a case of that name is gone"
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=[] if case in quick else pytest.mark.slow)
        for case in cases
    ]


MIN_EXAMPLES = 20
_part = 3
"""`make test` draws one in so many examples of a property: anew each time, and what was found once is pinned."""


def draw(part: int) -> None:
    """From now on: one example in so many, at least MIN_EXAMPLES. 1, all: `make test-slow`."""
    global _part  # noqa: PLW0603 - settings of hypothesis are made while test modules are imported
    _part = part


def examples(count: int) -> int:
    """For `max_examples` of hypothesis: how many of `count` this run draws."""
    return max(count // _part, min(count, MIN_EXAMPLES))
