"""The layout of the source tree: sizes of files and packages, and what tests may import."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PRODUCT = [path for folder in ("middleware", "calibration", "deploy") for path in sorted((ROOT / folder).rglob("*.py"))]
MAX_LINES = 600
MAX_ENTRIES = 30
MAX_PRIVATE_READS = 58
"""It only goes down."""
OWN = {"self", "cls", "super()"}
FOREIGN = {"logits._version"}
"""Attributes of other projects' objects: how often a tensor of torch was written to."""


def imported_modules(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)


def test_no_file_of_the_product_is_too_long() -> None:
    assert len(PRODUCT) > 100
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in PRODUCT}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


def test_the_middleware_has_few_entries() -> None:
    package = ROOT / "middleware" / "hemostat"
    entries = [path.name for path in (*package.glob("*.py"), *(file.parent for file in package.glob("*/__init__.py")))]
    assert len(entries) <= MAX_ENTRIES, sorted(entries)


def test_tests_import_shared_code_from_support_only() -> None:
    """`tests.characterization` and `tests.bench` have shared modules of their own. Only the program that records golden
    files (tests/characterization/record.py) imports test modules."""
    result = {}
    for path in sorted((ROOT / "tests").rglob("*.py")):
        if path == ROOT / "tests" / "characterization" / "record.py":
            continue
        allowed = {"support"} | {path.relative_to(ROOT / "tests").parts[0]} & {"characterization", "bench"}
        modules = [module.split(".") for module in imported_modules(path)]
        shared = [
            ".".join(parts)
            for parts in modules
            if parts[0] == "tests" and len(parts) > 1
            if parts[1] not in allowed or parts[-1].startswith("test_")
        ]
        if shared:
            result[str(path.relative_to(ROOT))] = shared
    assert result == {}


def private_reads(path: Path, names: frozenset[str]) -> Iterator[str]:
    """Yields the attributes of other objects by these names that a file reads or sets."""
    for node in ast.walk(ast.parse(path.read_text())):
        # A name with underscores at both ends is a protocol's, such as _repr_html_ of notebooks.
        if not isinstance(node, ast.Attribute) or node.attr not in names or node.attr.endswith("_"):
            continue
        if ast.unparse(node.value) not in OWN and ast.unparse(node) not in FOREIGN:
            yield f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"


def test_tests_look_into_few_private_parts_of_the_product() -> None:
    """A test that does has to be changed with the part, although what the part does is the same."""
    sources = "".join(path.read_text() for path in PRODUCT)
    names = frozenset(re.findall(r"(?:\bself\.|\bdef |^)(_[a-z]\w*)", sources, re.M))
    found = [read for path in sorted((ROOT / "tests").rglob("*.py")) for read in private_reads(path, names)]
    assert len(found) <= MAX_PRIVATE_READS, "use what is public:\n" + "\n".join(found)


PACKAGES = [
    file.parent
    for root in (
        *("middleware/hemostat", "middleware/lab/hemostat_lab"),
        *("calibration/hemostat_calibration", "calibration/hemostat_engine"),
    )
    for file in sorted((ROOT / root).rglob("__init__.py"))
]


def modules(package: Path) -> set[str]:
    """Returns the names of a package's modules and packages, without those with underscores at both ends."""
    files = {path.stem for path in package.glob("*.py")} | {path.parent.name for path in package.glob("*/__init__.py")}
    return {name for name in files if not name.startswith("__")}


def listed(docstring: str) -> set[str]:
    """Returns the names in the first column of a docstring's list of modules."""
    columns = re.findall(r"^(?: {4})?(\w[\w./]*(?:, \w[\w./]*)*)  +\S", docstring, re.MULTILINE)
    return {name.removesuffix(".py").removesuffix("/") for column in columns for name in column.split(", ")}


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: str(package.relative_to(ROOT)))
def test_the_docstring_of_a_package_says_where_things_are(package: Path) -> None:
    """Every module is named there, and what its list names exists."""
    docstring = ast.get_docstring(ast.parse((package / "__init__.py").read_text(encoding="utf-8"))) or ""
    assert [name for name in sorted(modules(package)) if not re.search(rf"\b{name}\b", docstring)] == []
    assert sorted(listed(docstring) - modules(package)) == []


def test_a_list_of_modules_is_read() -> None:
    assert listed("It is.\n\n    a, b.py  two modules,\n             in two lines\n    c/       a package") == {
        *("a", "b", "c")
    }


@pytest.mark.parametrize("script", sorted((ROOT / "tests" / "bench").glob("bench_*.py")), ids=lambda path: path.name)
def test_a_benchmark_finds_shared_test_code_when_it_is_run_as_a_script(script: Path) -> None:
    """Python then looks for modules in the folder of the script only, so the root has to be on the path before."""
    lines = script.read_text(encoding="utf-8").splitlines()
    imports = [number for number, line in enumerate(lines) if line.startswith("from tests.")]
    inserts = [number for number, line in enumerate(lines) if line.strip().startswith("sys.path.insert(0, str(ROOT))")]
    assert not imports or (inserts and inserts[0] < imports[0])
