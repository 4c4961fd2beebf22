"""The last commits that mended a defect, and their reversal in a tree."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

from tests.bench.mutants.tree import PRODUCT, Tree, git


@dataclass(frozen=True, slots=True)
class Mended:
    """A commit that added an entry to "Fixed" of the changelog, and changed the product."""

    commit: str
    subject: str
    tests: tuple[str, ...]
    """The files of tests that it changed, by the names that they have in the revision of the tree."""


class ConflictError(Exception):
    """A commit cannot be reversed any more; the text says why."""


def mended(tree: Tree) -> Iterator[Mended]:
    """Yields these commits, the newest first."""
    listed = git(tree.folder, "log", "--no-merges", "--format=%H %s", tree.revision, "--", "CHANGELOG.md")
    for row in listed.splitlines():
        commit, _, subject = row.partition(" ")
        changed = git(tree.folder, "diff-tree", "-r", "--no-commit-id", "--name-only", commit).splitlines()
        if not any(path.startswith(PRODUCT) for path in changed):
            continue
        if fixed(_changelog(tree, commit)) - fixed(_changelog(tree, f"{commit}^")):
            tests = [path for path in changed if re.fullmatch(r"tests/.*test_\w+\.py", path)]
            renamed = _renamed(tree, commit)
            yield Mended(commit, subject, tuple(renamed.get(path, path) for path in tests))


def fixed(changelog: str) -> set[str]:
    """Returns the first lines of the entries below each "Fixed".

    >>> sorted(fixed("## [1]\\n### Added\\n- a\\n### Fixed\\n- b\\n  more\\n- c\\n## [0]\\n- d\\n"))
    ['b', 'c']
    """
    sections = re.findall(r"^### Fixed\n(.*?)(?=^##|\Z)", changelog, re.MULTILINE | re.DOTALL)
    return {entry for section in sections for entry in re.findall(r"^- (.+)$", section, re.MULTILINE)}


def reverse(tree: Tree, commit: str, *, in_part: bool = False) -> dict[str, list[int]]:
    """Reverses a commit's changes of the product, and of nothing else. Returns module -> lines that change, as they are
    numbered in the revision of the tree. Raises ConflictError.

    in_part: what has been changed again since then stays as it is now, and the rest is reversed.
    """
    try:
        git(tree.folder, "revert", "--no-commit", *(["--strategy-option=ours"] if in_part else []), commit)
    except subprocess.CalledProcessError:
        conflicts = git(tree.folder, "diff", "--name-only", "--diff-filter=U").splitlines()
        of_product = [path for path in conflicts if path.startswith(PRODUCT)]
        if not conflicts or (of_product and not in_part):
            raise ConflictError(f"conflict in {', '.join(of_product) or 'the commit as a whole'}") from None
        for path in of_product:  # it has gone meanwhile, or was there only before
            (tree.folder / path).unlink(missing_ok=True)
            if git(tree.folder, "ls-tree", "HEAD", "--", path):
                git(tree.folder, "checkout", "--quiet", "HEAD", "--", path)
    # Everything but the product is the revision's again.
    others = [":/", *(f":(exclude){folder}" for folder in PRODUCT)]
    git(tree.folder, "reset", "--quiet")
    git(tree.folder, "checkout", "--quiet", "--", *others)
    added = git(tree.folder, "ls-files", "--others", "--exclude-standard", "--", "tests").splitlines()
    for path in added:
        (tree.folder / path).unlink()
    difference = git(tree.folder, "diff", "--unified=0", "--no-renames", "--", *PRODUCT)
    if not any(_meaning(tree, path) for path in _changed(tree)):
        raise ConflictError("nothing of it is left")
    result: dict[str, list[int]] = {}
    module = ""
    for line in difference.splitlines():
        if line.startswith("--- "):
            module = line.removeprefix("--- ").removeprefix("a/")
        elif (hunk := re.match(r"@@ -(\d+)(?:,(\d+))? ", line)) and module.endswith(".py"):
            first, count = int(hunk[1]), int(hunk[2] or 1)
            # Where lines are only added, the lines around them are the ones that have to be executed.
            lines = range(first, first + count) if count else range(first, first + 2)
            result.setdefault(module, []).extend(lines)
    return result


def _changed(tree: Tree) -> list[str]:
    """Returns the files of the product that differ from the revision."""
    new = git(tree.folder, "ls-files", "--others", "--exclude-standard", "--", *PRODUCT).splitlines()
    return git(tree.folder, "diff", "--name-only", "--no-renames", "--", *PRODUCT).splitlines() + new


def _meaning(tree: Tree, path: str) -> bool:
    """Returns if a changed file means something else than in the revision: not only its comments and docstrings."""
    if not path.endswith(".py"):
        return True
    before = git(tree.folder, "show", f"HEAD:{path}") if git(tree.folder, "ls-tree", "HEAD", "--", path) else ""
    now = (tree.folder / path).read_text(encoding="utf-8") if (tree.folder / path).exists() else ""
    return _code(before) != _code(now)


def _code(source: str) -> str:
    """Returns what a source does, without its docstrings.

    >>> _code("def f():\\n    'One.'\\n    return 1  # one\\n") == _code("def f():\\n    return 1\\n")
    True
    """
    tree = ast.parse(source)
    for node in ast.walk(tree):
        for name, value in ast.iter_fields(node):
            if isinstance(value, list):
                kept = [
                    part for part in value if not (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))
                ]
                setattr(node, name, kept)
    return ast.dump(tree)


def _renamed(tree: Tree, commit: str) -> dict[str, str]:
    """Returns the names that files of tests had in a commit, and have now."""
    options = ("--find-renames", "--diff-filter=R", "--name-status")
    rows = git(tree.folder, "diff", *options, commit, tree.revision, "--", "tests").splitlines()
    return {before: now for _, before, now in (row.split("\t") for row in rows)}


def _changelog(tree: Tree, revision: str) -> str:
    try:
        return git(tree.folder, "show", f"{revision}:CHANGELOG.md")
    except subprocess.CalledProcessError:  # it was not there yet
        return ""
