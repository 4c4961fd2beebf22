"""The examples in the docstrings are right (tests/core/test_doctests.py runs those of the core)."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import hemostat
import hemostat_lab

MODULES = [
    ".".join((package.__name__, *path.relative_to(root).with_suffix("").parts))
    for package in (hemostat, hemostat_lab)
    for root in (Path(package.__file__).parent,)
    for path in sorted(root.rglob("*.py"))
    if ">>>" in path.read_text()
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0
    assert result.attempted > 0
