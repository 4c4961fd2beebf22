"""The examples in the middleware's docstrings are right (tests/core/test_doctests.py runs those of the core)."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import hemostat

ROOT = Path(hemostat.__file__).parent
MODULES = [
    ".".join(("hemostat", *path.relative_to(ROOT).with_suffix("").parts))
    for path in sorted(ROOT.rglob("*.py"))
    if ">>>" in path.read_text()
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0
    assert result.attempted > 0
