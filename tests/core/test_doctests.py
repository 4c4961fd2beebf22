"""The examples in the core's docstrings are right."""

import doctest
import importlib
import pkgutil

import pytest

import hemostat_calibration

MODULES = sorted(
    module.name for module in pkgutil.walk_packages(hemostat_calibration.__path__, "hemostat_calibration.")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.failed == 0
