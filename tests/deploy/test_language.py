"""The check of the language finds habits, and its list of cases only shrinks."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def language() -> ModuleType:
    spec = importlib.util.spec_from_file_location("language", ROOT / "deploy" / "language.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("text", "habits"),
    [
        ("Of the engine, in seconds.", ["fragment"]),
        ("Whether the relay serves.", ["fragment"]),
        ("What came of a request.", ["fragment"]),
        ("By version: why it is not loaded.", ["fragment"]),
        ("The weights and those of the reference.", ["pointer"]),
        ("The panel beside the chart.", ["pointer"]),
        ("Whatever vLLM says, like that of an older one.", ["fragment", "pointer"]),
        ("Returns the share of the tokens.", []),
        ("With none, there is no limit.", []),
        ("Between two replays, the engine is left alone.", []),
        ("True if the relay serves.", []),
    ],
)
def test_habits_are_found(language: ModuleType, text: str, habits: list[str]) -> None:
    assert [case.habit for case in language.in_text(text, "here", docstring=True)] == habits


def test_docstrings_of_attributes_are_read_and_other_strings_are_not(language: ModuleType) -> None:
    source = (
        '"""A module."""\nLIMIT = 3\n"""Of all."""\n"""Of nothing, which is no docstring."""\n'
        'class A:\n    x: int\n    """Of A."""\n'
    )
    assert [text for _, text in language.docstrings(ast.parse(source))] == ["A module.", "Of all.", "Of A."]


def test_code_in_a_guide_is_not_read(language: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("The copy beside `that of x`.\n```sh\nls those of\n```\nThose of the engine.\n", encoding="utf-8")
    assert [case.place for case in language.in_guide(page, tmp_path)] == ["page.md:1", "page.md:5"]


def test_a_new_case_is_an_error_and_a_case_that_is_gone_has_to_leave_the_list(language: ModuleType) -> None:
    def case(text: str) -> object:
        return language.Case("fragment", text, "here")

    listed = Counter({"fragment: Of a.": 1, "fragment: Of b.": 2})
    new, gone = language.compare([case("Of a."), case("Of b."), case("Of c.")], listed)
    assert [case.text for case in new] == ["Of c."]
    assert gone == Counter({"fragment: Of b.": 1})
