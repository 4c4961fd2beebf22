"""One verb pair, as river has it: `update` takes an observation, and `get` or a property gives the estimate."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = (
    *("calibration/hemostat_calibration", "calibration/hemostat_engine"),
    *("middleware/hemostat", "middleware/lab/hemostat_lab"),
)
OTHER_VERBS = frozenset(
    {
        *("add", "count", "feed", "hear", "learn", "note", "observe", "offer"),
        *("receive", "record", "register", "remember", "see", "use"),
    }
)


def methods(tree: ast.Module) -> Iterator[str]:
    """Yields `Class.method` for every public method of a public class whose name begins with one of the other verbs."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for method in node.body:
                is_method = isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef)
                if is_method and method.name.split("_")[0] in OTHER_VERBS:
                    yield f"{node.name}.{method.name}"


def exceptions() -> set[str]:
    """Returns the methods of the table in CONTRIBUTING.md."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.split("## One verb pair", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", section, re.MULTILINE)
    return {f"{name}.{verb}" for verb, classes in rows for name in re.findall(r"`(\w+)`", classes)}


def test_what_takes_an_observation_is_called_update() -> None:
    found = {
        name
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        for name in methods(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert sorted(found - exceptions()) == [], "rename it, or add it to the table in CONTRIBUTING.md"
    assert sorted(exceptions() - found) == [], "it does not exist any more: remove it from the table"


def test_other_verbs_are_found() -> None:
    source = "class A:\n    def update(self): ...\n    def note_gain(self): ...\n    async def use(self): ...\n"
    hidden = "class B:\n    def _add(self): ...\nclass _C:\n    def add(self): ...\n"
    assert list(methods(ast.parse(source + hidden))) == ["A.note_gain", "A.use"]
