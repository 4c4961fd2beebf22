"""Finds the tests that execute a line of the product. Each file of tests runs once, with coverage.py in its processes.

A file that has a record is not run again, so that a recording goes on after an interruption.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from tests.bench.mutants.tree import Tree

_IMPORT = ""
MAX_FILE_SECONDS = 900.0
_CONFIGURATION = """[run]
parallel = true
data_file = {data}/coverage
source =
    {sources}
context = ${{PYTEST_CURRENT_TEST-}}
sigterm = true
patch = _exit
"""
_STARTED_WITH_PYTHON = "import coverage\n\ncoverage.process_startup()\n"


class Executed:
    """Knows, of some tests, the lines that each executes, and its seconds. folder: where the records are."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tests: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
        self.seconds: dict[str, float] = {}
        """Seconds of each test that passed."""

    def record(self, tree: Tree, files: Sequence[str], folders: Sequence[str], report: Callable[[str], None]) -> None:
        """Runs each file of tests that has no record. folders: of the product, whose lines count."""
        self._folder.mkdir(parents=True, exist_ok=True)
        startup = self._folder / "startup"
        startup.mkdir(exist_ok=True)
        (startup / "sitecustomize.py").write_text(_STARTED_WITH_PYTHON)
        for number, file in enumerate(files, 1):
            target = self._record_of(file)
            if target.exists():
                continue
            data = self._folder / "data"
            shutil.rmtree(data, ignore_errors=True)
            data.mkdir()
            configuration = self._folder / "coverage.ini"
            sources = "\n    ".join(str(tree.folder / name) for name in folders)
            configuration.write_text(_CONFIGURATION.format(data=data, sources=sources))
            outcome = data / "outcome.json"
            paths = [str(startup), str(Path(__file__).parent)]
            paths += [str(tree.folder / name) for name in ("", "middleware", "middleware/lab", "calibration")]
            variables = {
                "COVERAGE_PROCESS_START": str(configuration),
                "MUTANTS_RECORD": str(outcome),
                "PYTHONPATH": os.pathsep.join(paths),
            }
            status = tree.pytest([file], MAX_FILE_SECONDS, target.with_suffix(".log"), variables)
            record = {"passed": {}, "failed": [], "lines": {}}
            if outcome.exists():
                record |= json.loads(outcome.read_text()) | {"lines": _lines(data, tree.folder)}
            report(
                f"[{number}/{len(files)}] {file}: {len(record['passed'])} passed, {len(record['failed'])} not"
                + ("" if status is not None else "; stopped after its time")
            )
            partial = target.with_suffix(".partial")
            partial.write_text(json.dumps(record))
            partial.replace(target)

    def load(self, files: Iterable[str]) -> None:
        """Reads the records of some files of tests, in addition to those that were read before."""
        for file in files:
            if not (path := self._record_of(file)).exists():
                continue
            record = json.loads(path.read_text())
            self.seconds |= record["passed"]
            for module, by_line in record["lines"].items():
                for line, tests in by_line.items():
                    self._tests[module][int(line)] |= {
                        test for test in tests if test in record["passed"] or test == _IMPORT
                    }

    def tests_of(self, module: str, lines: Iterable[int]) -> set[str]:
        """Returns the tests that execute one of the lines of a module. For lines that its import executes, these are
        all tests that execute a line of the module."""
        by_line = self._tests.get(module, {})
        found = set().union(*(by_line.get(line, ()) for line in lines))
        return (found if _IMPORT not in found else set().union(*by_line.values())) - {_IMPORT}

    def quickest(self, tests: Iterable[str], seconds: float) -> list[str]:
        """Returns as many tests as take at most `seconds` together, the quickest first."""
        result, total = [], 0.0
        for test in sorted(tests, key=lambda test: (self.seconds[test], test)):
            total += self.seconds[test]
            if result and total > seconds:
                break
            result.append(test)
        return result

    def _record_of(self, file: str) -> Path:
        return self._folder / (file.replace("/", "-").removesuffix(".py") + ".json")


def _lines(data: Path, root: Path) -> dict[str, dict[int, list[str]]]:
    """Returns module -> line -> tests, and `_IMPORT` for what pytest itself executed, which is before any test."""
    from coverage import CoverageData

    result: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for path in data.glob("coverage.*"):
        measured = CoverageData(str(path))
        measured.read()
        for file in measured.measured_files():
            if not Path(file).is_relative_to(root):
                continue
            module = str(Path(file).relative_to(root))
            for line, contexts in measured.contexts_by_lineno(file).items():
                result[module][line] |= {_test(context) for context in contexts}
    return {module: {line: sorted(tests) for line, tests in sorted(found.items())} for module, found in result.items()}


def _test(context: str) -> str:
    """Returns the test of a context; a child process has the phase behind it.

    >>> _test("tests/a.py::test_b[x y] (call)"), _test("tests/a.py::test_b[x y]")
    ('tests/a.py::test_b[x y]', 'tests/a.py::test_b[x y]')
    """
    for phase in (" (setup)", " (call)", " (teardown)"):
        context = context.removesuffix(phase)
    return context
