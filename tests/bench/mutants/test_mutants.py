"""The bench of mutants and reversals, on a project of one module."""

from __future__ import annotations

import ast
import doctest
import json
import os
from pathlib import Path

import pytest
from tests.bench import bench_mutants
from tests.bench.mutants import executed, mutations, reversals, tree
from tests.bench.mutants.mutations import apply, draw, mutants

MODULE = "calibration/hemostat_calibration/limits.py"
SOURCE = '''"""Limits. 1 + 1"""
import os

LIMIT: int = 3


def allowed(count: int, *, strict: bool = False) -> bool:
    """Returns True if it is allowed."""
    assert count >= 0
    if strict and count == LIMIT:
        return False
    return count <= LIMIT


def message(count: int) -> str:
    print(f"{count + 1}")
    return "ä" * 2 + str(count)
'''
TESTS = """
import os, subprocess, sys
from hemostat_calibration.limits import allowed

def test_in_this_process():
    assert allowed(3)

def test_in_a_child():
    code = "from hemostat_calibration.limits import allowed; sys.exit(allowed(3, strict=True))"
    assert subprocess.run([sys.executable, "-c", "import sys; " + code]).returncode == 0

def test_that_fails():
    assert not allowed(2)
"""


def git(folder: Path, *arguments: str) -> str:
    return tree.git(folder, *arguments)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Three commits: the module, a defect that is mended, and another name of the test's file."""
    root = tmp_path / "repository"
    (root / MODULE).parent.mkdir(parents=True)
    (root / "tests").mkdir()
    (root / "pytest.ini").write_text("[pytest]\nmarkers = vllm\naddopts = -p no:langsmith_plugin\n")
    (root / MODULE).with_name("__init__.py").touch()
    (root / MODULE).write_text(SOURCE.replace("count <= LIMIT", "count < LIMIT"))
    (root / "CHANGELOG.md").write_text("## [Unreleased]\n\n### Added\n- Limits.\n\n### Fixed\n")
    (root / "tests" / "test_limits.py").write_text("")
    git(tmp_path, "init", "--quiet", "--initial-branch=main", str(root))
    for subject in ("Add limits", "Allow the limit itself", "Write more"):
        if subject.startswith("Allow"):
            (root / MODULE).write_text(SOURCE)
            (root / "CHANGELOG.md").write_text((root / "CHANGELOG.md").read_text() + "- The limit itself is allowed.\n")
            (root / "tests" / "test_limits.py").write_text(TESTS)
        if subject.startswith("Write"):
            git(root, "mv", "tests/test_limits.py", "tests/test_allowed.py")
            (root / "CHANGELOG.md").write_text((root / "CHANGELOG.md").read_text() + "  More of it.\n")
        git(root, "add", "--all")
        git(root, "commit", "--quiet", "--message", subject)
    return root


@pytest.fixture
def checkout(repository: Path, tmp_path: Path) -> tree.Tree:
    return tree.Tree(repository, tmp_path / "tree", "HEAD")


def test_every_mutant_is_another_program_and_only_its_place_changes() -> None:
    found = mutants(MODULE, SOURCE)
    assert len({apply(mutant, SOURCE) for mutant in found}) == len(found)
    for mutant in found:
        changed = apply(mutant, SOURCE)
        assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(SOURCE)), mutant
        unchanged = [line for n, line in enumerate(SOURCE.splitlines(), 1) if n != mutant.line]
        assert [line for n, line in enumerate(changed.splitlines(), 1) if n != mutant.line] == unchanged


def test_operators_conditions_numbers_and_statements_are_changed_and_nothing_else() -> None:
    texts = {str(mutant).partition(": ")[2] for mutant in mutants(MODULE, SOURCE)}
    assert {
        "count <= LIMIT -> (count < LIMIT)",
        "strict and count == LIMIT -> (strict or count == LIMIT)",
        "strict and count == LIMIT -> (not (strict and count == LIMIT))",
        "count == LIMIT -> (count != LIMIT)",
        "False -> (True)",
        "3 -> (4)",
        "2 -> (3)",
        'print(f"{count + 1}") -> pass',
    } <= texts
    assert not [text for text in texts if text.startswith(("count >=", "1 + 1", "count + 1", "int", "import"))]


def test_the_draw_depends_on_the_seed_and_the_weights() -> None:
    found = mutants(MODULE, SOURCE)
    assert draw(found, 5, "a") == draw(found, 5, "a") != draw(found, 5, "b")
    assert len(set(draw(found, len(found) + 5, "a"))) == len(found)
    weights = [1.0 if index in {2, 3} else 0.0 for index in range(len(found))]
    assert set(draw(found, 5, "a", weights)) == set(found[2:4])
    heavy = [1000.0 if index == 0 else 1.0 for index in range(len(found))]
    assert sum(draw(found, 1, str(seed), heavy) == found[:1] for seed in range(50)) >= 45


def test_a_reversal_changes_the_product_alone(checkout: tree.Tree) -> None:
    (commit,) = reversals.mended(checkout)
    assert (commit.subject, commit.tests) == ("Allow the limit itself", ("tests/test_allowed.py",))
    line = SOURCE.splitlines().index("    return count <= LIMIT") + 1
    assert reversals.reverse(checkout, commit.commit) == {MODULE: [line]}
    assert "count < LIMIT" in (checkout.folder / MODULE).read_text()
    assert git(checkout.folder, "diff", "--name-only").split() == [MODULE]
    checkout.restore()
    assert (checkout.folder / MODULE).read_text() == SOURCE


def test_what_was_not_changed_again_is_reversed_alone(repository: Path, tmp_path: Path) -> None:
    (repository / MODULE).write_text(SOURCE + "\n\n# The end.\nUNUSED = 1\n")
    (repository / "CHANGELOG.md").write_text("## [1]\n### Fixed\n- The limit itself.\n- Nothing is unused.\n")
    git(repository, "commit", "--quiet", "--all", "--message", "First")
    (repository / MODULE).write_text(
        SOURCE.replace("count <= LIMIT", "LIMIT >= count") + "\n\n# The end.\nUNUSED = 2\n"
    )
    (repository / "CHANGELOG.md").write_text("## [1]\n### Fixed\n- The limit itself.\n- Nothing is unused.\n- Two.\n")
    git(repository, "commit", "--quiet", "--all", "--message", "Both")
    again = SOURCE.replace("count <= LIMIT", "LIMIT > count - 1") + "\n\n# The end.\nUNUSED = 2\n"
    (repository / MODULE).write_text(again)
    git(repository, "commit", "--quiet", "--all", "--message", "Word the limit anew")
    now = tree.Tree(repository, tmp_path / "now", "HEAD")
    commit = next(found for found in reversals.mended(now) if found.subject == "Both")
    with pytest.raises(reversals.ConflictError, match=MODULE):
        reversals.reverse(now, commit.commit)
    now.restore()
    assert reversals.reverse(now, commit.commit, in_part=True) == {MODULE: [len(again.splitlines())]}
    assert (now.folder / MODULE).read_text() == again.replace("UNUSED = 2", "UNUSED = 1")


def test_what_was_written_anew_cannot_be_reversed(repository: Path, tmp_path: Path) -> None:
    (repository / MODULE).write_text("def allowed(count):\n    return True\n")
    git(repository, "commit", "--quiet", "--all", "--message", "Write anew")
    anew = tree.Tree(repository, tmp_path / "anew", "HEAD")
    (commit,) = reversals.mended(anew)
    with pytest.raises(reversals.ConflictError, match=MODULE):
        reversals.reverse(anew, commit.commit)
    anew.restore()
    assert git(anew.folder, "status", "--short") == ""


def test_the_tests_of_a_line_are_those_that_passed_with_child_processes(checkout: tree.Tree, tmp_path: Path) -> None:
    pytest.importorskip("coverage")
    known = executed.Executed(tmp_path / "records")
    file = "tests/test_allowed.py"
    known.record(checkout, [file], tree.PRODUCT, print)
    known.load([file])
    here, child = f"{file}::test_in_this_process", f"{file}::test_in_a_child"
    assert set(known.seconds) == {here, child}
    lines = SOURCE.splitlines()
    assert known.tests_of(MODULE, [lines.index("        return False") + 1]) == {child}
    assert known.tests_of(MODULE, [lines.index("    return count <= LIMIT") + 1]) == {here}
    assert known.tests_of(MODULE, [lines.index("LIMIT: int = 3") + 1]) == {here, child}
    assert known.tests_of(MODULE, [len(lines)]) == set()
    assert known.quickest({here, child}, 1000.0) == sorted({here, child}, key=known.seconds.__getitem__)
    reported: list[str] = []
    known.record(checkout, [file], tree.PRODUCT, reported.append)
    assert reported == [], "it has a record"


def test_changes_are_found_or_survive_and_a_second_run_runs_nothing(checkout: tree.Tree, tmp_path: Path) -> None:
    known = executed.Executed(tmp_path / "records")
    tests = [f"tests/test_allowed.py::{name}" for name in ("test_in_this_process", "test_in_a_child")]
    numbers = {str(n): tests for n in (7, 10, 11, 12)}
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "tests-test_allowed.json").write_text(
        json.dumps({"passed": dict.fromkeys(tests, 0.1), "failed": [], "lines": {MODULE: numbers}})
    )
    known.load(["tests/test_allowed.py"])
    bench = bench_mutants.Bench(checkout, known, tmp_path / "results")
    by_text = {str(mutant).partition(": ")[2]: mutant for mutant in mutants(MODULE, SOURCE)}
    verdicts = {
        text: bench.mutant(by_text[text])["verdict"]
        for text in (
            "count <= LIMIT -> (count < LIMIT)",
            "strict and count == LIMIT -> (strict or count == LIMIT)",
            "2 -> (3)",
        )
    }
    assert list(verdicts.values()) == ["found", "found", "no test"]
    survivor = bench.mutant(by_text["count == LIMIT -> (count != LIMIT)"])
    assert survivor["verdict"] == "found"
    (commit,) = reversals.mended(checkout)
    row = bench.reversal(commit.commit, commit.subject, commit.tests)
    assert (row["verdict"], row["why"]) == ("found", f"{tests[0]} (AssertionError)")
    assert git(checkout.folder, "status", "--short") == ""
    again = bench_mutants.Bench(checkout, known, tmp_path / "results")
    assert len(again.done) == 5
    os.rename(checkout.folder, tmp_path / "gone")
    assert again.reversal(commit.commit, commit.subject, commit.tests) == row


def test_examples() -> None:
    for module in (bench_mutants, executed, mutations, reversals):
        assert doctest.testmod(module).failed == 0
