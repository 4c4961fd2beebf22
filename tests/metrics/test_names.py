"""Every metric has one name, written once, and one declaration."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

from hemostat.metrics import names
from hemostat.metrics.catalogue import GROUPS, METRICS

ROOT = Path(__file__).parents[2]
NAMES_FILE = ROOT / "middleware" / "hemostat" / "metrics" / "names.py"
CONSTANTS = {name: value for name, value in vars(names).items() if name.isupper()}


def product_files() -> list[Path]:
    """Python files that are shipped, or that make what is shipped."""
    return sorted(path for folder in ("middleware", "calibration", "deploy") for path in (ROOT / folder).rglob("*.py"))


def string_constants(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def test_no_other_product_file_has_a_metric_name_as_a_string() -> None:
    files = product_files()
    assert len(files) > 100
    result = {
        (str(path.relative_to(ROOT)), text)
        for path in files
        if path != NAMES_FILE
        for text in string_constants(path) & set(CONSTANTS.values())
    }
    assert not result, "use the constant of hemostat.metrics.names"


def test_no_name_is_written_twice() -> None:
    counted = Counter(re.findall(r'"(hemostat_\w+)"', NAMES_FILE.read_text()))
    assert {name: times for name, times in counted.items() if times > 1} == {}
    assert set(counted) == set(CONSTANTS.values())


def test_each_constant_is_the_name_without_prefix_and_total() -> None:
    for constant, name in CONSTANTS.items():
        assert constant == name.removeprefix("hemostat_").removesuffix("_total").upper()


def test_every_name_is_declared_exactly_once() -> None:
    declared = Counter(metric.name for metrics in GROUPS.values() for metric in metrics)
    assert declared == Counter(CONSTANTS.values())
    assert len(METRICS) == declared.total()


def test_the_names_are_a_leaf() -> None:
    imported = [node for node in ast.walk(ast.parse(NAMES_FILE.read_text())) if isinstance(node, ast.ImportFrom)]
    assert [node.module for node in imported] == ["__future__"]
