"""Cases of a test of which `make test` runs a part, and `make test-slow` the others."""

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
