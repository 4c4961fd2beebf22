"""The examples in the core's docstrings are right, and every public numeric function has one."""

import ast
import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import hemostat_calibration

MODULES = sorted(
    module.name for module in pkgutil.walk_packages(hemostat_calibration.__path__, "hemostat_calibration.")
)
ROOT = Path(hemostat_calibration.__file__).parent
WITHOUT = {
    "exact_gains",
    "hidden_sample",
    "list_examples",
    "make_basis",
    "moments_in_basis",
    "no_progress",
    "rows_of",
    "to_profile",
}
"""Steps of the contextual learner, whose arguments are what other steps made: `ContextualLearner` has the example."""


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_public_function_has_an_example(path: Path) -> None:
    missing = [
        node.name
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
        if node.name not in WITHOUT and ">>>" not in (ast.get_docstring(node) or "")
    ]
    assert not missing
